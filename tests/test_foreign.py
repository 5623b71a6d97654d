"""Habits from other libraries meet an error that says what to write here."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from mghf_loss import DinoJSDLoss, MGHFLoss, MGHFnLoss

LOSSES = [MGHFLoss, MGHFnLoss, DinoJSDLoss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"data_range": 255}, r"use input_range=\(black, white\)"),
        ({"normalize": True}, r"use input_range=\(0, 1\) for images in \[0, 1\]"),
        ({"loss_weight": 0.1}, r"multiply the loss, 0\.5 \* criterion\(sr, gt\)"),
        ({"size_average": True}, 'use reduction="mean"'),
    ],
)
def test_arguments_of_other_libraries_are_answered_with_ours(loss, options, remedy):
    (name,) = options
    with pytest.raises(TypeError, match=f"{loss.__name__} has no argument '{name}': {remedy}"):
        loss(**options)


def test_a_call_answers_too_and_refuses_what_nobody_knows(inn):
    criterion = MGHFnLoss(inn)
    images = torch.rand(2, 1, 3, 16, 16)
    with pytest.raises(TypeError, match=r"MGHFnLoss has no argument 'normalize': use input_range=\(0, 1\)"):
        criterion(*images, normalize=True)
    with pytest.raises(TypeError, match="MGHFnLoss takes sr, gt and options, got an unknown colour"):
        criterion(*images, colour=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        MGHFnLoss(inn, colour=1)


@pytest.mark.parametrize("loss", LOSSES)
def test_constructors_keep_their_signatures(loss):
    assert "input_range" in inspect.signature(loss).parameters
    assert "kwargs" not in inspect.signature(loss).parameters


def test_a_loss_of_a_subclass_is_built_once_and_copied(inn):
    class Own(MGHFnLoss):
        def __init__(self, inn, loss_weight) -> None:
            super().__init__(inn, reduction="sum")
            self.loss_weight = loss_weight

    criterion = Own(inn, loss_weight=0.1)  # a word of its own
    images = torch.rand(2, 1, 3, 16, 16)
    assert torch.equal(copy.deepcopy(criterion)(*images), criterion(*images))
    with pytest.raises(TypeError, match="Own has no argument 'data_range'"):
        Own(data_range=1)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((1, 4, 32, 32), r"got 4 .*drop alpha with sr\[:, :3\], or decode latents to images first"),
        ((2, 5, 3, 32, 32), r"for video \(B, T, 3, H, W\) flatten time into the batch, sr\.flatten\(0, 1\)"),
        ((3, 32, 32), r"for one image use sr\[None\]"),
        ((1, 1, 32, 32), r"for grey images use sr\.expand\(-1, 3, -1, -1\)"),
    ],
)
def test_shapes_of_other_data_are_answered_with_the_step_that_is_missing(shape, remedy, inn):
    images = torch.rand(2, *shape)
    with pytest.raises(ValueError, match=remedy):
        MGHFnLoss(inn)(*images)
