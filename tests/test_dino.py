"""The DINO term: divergence against scipy, resizing, tokens, options."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import timm
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from mghf_loss import DinoJSDLoss
from mghf_loss.dino import jensen_shannon


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 10.0])
def test_divergence_is_scipys(spread):
    a = torch.randn(20, 50, dtype=torch.double)
    b = a + spread * torch.randn_like(a)
    expected = jensenshannon(softmax(a.numpy(), axis=1), softmax(b.numpy(), axis=1), axis=1) ** 2
    np.testing.assert_allclose(jensen_shannon(a, b).numpy(), expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("spread", [1e-3, 1e-2, 0.3, 1.0, 30.0])
def test_float32_keeps_its_digits_near_equality_and_when_saturated(spread):
    a = torch.randn(20, 50, dtype=torch.double)
    b = a + spread * torch.randn_like(a)
    torch.testing.assert_close(jensen_shannon(a.float(), b.float()).double(), jensen_shannon(a, b), rtol=2e-3, atol=0)


def test_divergence_by_hand():
    # p = (1/4, 3/4), q = (3/4, 1/4), m = (1/2, 1/2): KL(p || m) = ln 2 - H(p)
    a = torch.tensor([0.0, math.log(3.0)])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert jensen_shannon(a, -a + math.log(3.0)).item() == pytest.approx(math.log(2) - entropy, rel=1e-6)


def test_divergence_is_symmetric_bounded_and_zero_at_equality():
    a, b = 50 * torch.randn(2, 30, 20, dtype=torch.double)
    divergence = jensen_shannon(a, b)
    torch.testing.assert_close(divergence, jensen_shannon(b, a))
    assert divergence.min() > 0
    assert divergence.max() <= math.log(2) + 1e-12
    assert (jensen_shannon(a, a) == 0).all()
    disjoint = jensen_shannon(torch.tensor([200.0, 0.0]), torch.tensor([0.0, 200.0]))
    assert disjoint.item() == pytest.approx(math.log(2))


def test_divergence_gradcheck():
    a, b = torch.randn(2, 3, 7, dtype=torch.double).unbind(0)
    a.requires_grad_()
    assert torch.autograd.gradcheck(jensen_shannon, (a, b))
    close = (a.detach() + 1e-3 * torch.randn_like(a)).requires_grad_()
    assert torch.autograd.gradcheck(jensen_shannon, (close, a.detach()), eps=1e-5, atol=1e-7)


@pytest.mark.parametrize("tokens", ["class", "patch"])
def test_loss_is_the_divergence_of_the_models_tokens(tokens, tiny_dino):
    sr, gt = torch.rand(2, 2, 3, 28, 42).unbind(0)
    criterion = DinoJSDLoss(tiny_dino, tokens=tokens, temperature=0.5)
    mean, std = (torch.tensor(tiny_dino.pretrained_cfg[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))

    def embedding(image: torch.Tensor) -> np.ndarray:
        tokens_out = tiny_dino.forward_features((image - mean) / std)
        return (tokens_out[:, :1] if tokens == "class" else tokens_out[:, 1:]).double().detach().numpy()

    assert embedding(sr).shape[1] == (1 if tokens == "class" else 6)
    p, q = (softmax(embedding(image) / 0.5, axis=-1) for image in (sr, gt))
    expected = (jensenshannon(p, q, axis=-1) ** 2).mean(-1).mean()
    assert criterion(sr, gt).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("size", "resized"), [((28, 28), (28, 28)), ((30, 41), (28, 42)), ((1, 5), (14, 14)), ((64, 21), (70, 28))]
)
def test_images_are_resized_to_the_nearest_multiple_of_the_patch(size, resized, tiny_dino, monkeypatch):
    seen = []
    forward = tiny_dino.forward_features
    monkeypatch.setattr(tiny_dino, "forward_features", lambda x: seen.append(tuple(x.shape[-2:])) or forward(x))
    sr = torch.rand(1, 3, *size, requires_grad=True)
    DinoJSDLoss(tiny_dino)(sr, torch.rand(1, 3, *size)).backward()
    assert seen == [resized, resized]
    assert sr.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "all"}, "tokens must be one of .* got 'all'"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": math.inf}, "temperature must be a finite number above 0, got inf"),
        ({"temperature": True}, "temperature must be a finite number above 0, got True"),
        ({"reduction": "max"}, "reduction must be one of .* got 'max'"),
        ({"model": torch.nn.Linear(2, 2)}, "model must be a timm vision transformer, got Linear"),
    ],
)
def test_bad_options_are_refused_by_name(options, message, tiny_dino):
    with pytest.raises(ValueError, match=message):
        DinoJSDLoss(**{"model": tiny_dino, **options})


def vit(name: str = "vit_small_patch14_dinov2.lvd142m", **options) -> torch.nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=0, embed_dim=32, depth=1, num_heads=2, **options)


WITHOUT_CLASS_TOKEN = {"name": "vit_base_patch16_siglip_224", "img_size": 32, "dynamic_img_size": True}


def test_class_token_of_a_model_without_one_is_refused():
    """Its first token is a patch."""
    with pytest.raises(ValueError, match='the model has no class token: use tokens="patch"'):
        DinoJSDLoss(vit(**WITHOUT_CLASS_TOKEN))


def test_patch_tokens_of_a_model_without_class_token_are_all_compared():
    image = torch.rand(1, 3, 48, 32)
    assert DinoJSDLoss(vit(**WITHOUT_CLASS_TOKEN), tokens="patch").embed(image).shape == (1, 6, 32)


def test_registers_are_no_patches():
    registers = vit("vit_small_patch14_reg4_dinov2.lvd142m", img_size=28, dynamic_img_size=True)
    assert DinoJSDLoss(registers, tokens="patch").embed(torch.rand(1, 3, 28, 42)).shape == (1, 6, 32)


def test_model_of_one_size_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"one size alone: build it with timm.create_model\(.*dynamic_img_size=True\)"):
        DinoJSDLoss(vit(img_size=28))


def test_half_precision_of_a_model_or_a_loss_computes_in_float32(tiny_dino):
    sr, gt = torch.rand(2, 1, 3, 28, 28).unbind(0)
    criterion = DinoJSDLoss(tiny_dino)
    expected = criterion(sr, gt)
    assert torch.equal(criterion.half()(sr, gt), expected)
    assert torch.equal(criterion.to("meta").bfloat16().to_empty(device="cpu")(sr, gt), expected)
    assert criterion(sr.half(), gt.half()).dtype == torch.float32
    assert DinoJSDLoss(tiny_dino.half())(sr, gt).dtype == torch.float32
    torch.testing.assert_close(criterion.double()(sr.double(), gt.double()).float(), expected, rtol=1e-2, atol=1e-6)


def test_copies_compute_the_same(tiny_dino):
    sr, gt = torch.rand(2, 1, 3, 28, 28).unbind(0)
    criterion = DinoJSDLoss(tiny_dino)
    assert not criterion.state_dict()
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(twin(sr, gt), criterion(sr, gt))
