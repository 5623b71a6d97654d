"""`MGHFMetric` against `mghf_loss.metric.distance` by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("torchmetrics")

from torchmetrics import MetricCollection

from mghf_loss import DinoJSDLoss, MGHFLoss, MGHFnLoss
from mghf_loss.integrations.torchmetrics import MGHFMetric
from mghf_loss.metric import distance


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_image_counts_as_much_whatever_the_batches(reduction, inn):
    criterion = MGHFLoss(inn=inn, reduction=reduction)
    metric = MGHFMetric(criterion, return_terms=True)
    batches = [torch.rand(2, size, 3, 16, 24) for size in (3, 1)]
    for sr, gt in batches:
        metric.update(sr, gt)
    per_image = [distance(MGHFLoss(inn=inn, reduction="none"), sr, gt) for sr, gt in batches]
    found = metric.compute()
    assert list(found) == ["content", "style", "correlation", "texture", "grid", "total"]
    torch.testing.assert_close(found["total"], torch.cat([total for total, _ in per_image]).mean())
    torch.testing.assert_close(found["style"], torch.cat([terms["style"] for _, terms in per_image]).mean())
    metric.reset()
    metric.update(*batches[1])
    torch.testing.assert_close(metric.compute()["total"], per_image[1][0].mean())


def test_equal_images_have_0_and_the_criterion_may_be_any_of_the_three(inn, tiny_dino):
    gt = torch.rand(1, 3, 32, 32)
    for criterion in (MGHFLoss(inn=inn), MGHFnLoss(inn), DinoJSDLoss(tiny_dino)):
        metric = MGHFMetric(criterion)
        metric.update(gt, gt)
        assert metric.compute() == 0
        assert metric(gt.flip(3), gt) > 0  # `forward` returns the value of the batch
    assert not MGHFMetric().higher_is_better


def test_tiles_are_those_of_distance(inn):
    sr, gt = torch.rand(2, 1, 3, 32, 40)
    metric = MGHFMetric(MGHFnLoss(inn), tile=16)
    metric.update(sr, gt)
    torch.testing.assert_close(metric.compute(), distance(MGHFnLoss(inn), sr, gt, tile=16)[0])


def test_metrics_are_copied_pickled_collected_and_save_no_network(inn):
    metric = MGHFMetric(MGHFnLoss(inn))
    sr, gt = torch.rand(2, 1, 3, 16, 16)
    metric.update(sr, gt)
    for copied in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(copied.compute(), metric.compute())
    assert not metric.state_dict()
    collection = MetricCollection({"mghf": MGHFMetric(MGHFnLoss(inn)), "mghf_c": MGHFMetric(MGHFLoss(inn=inn))})
    collection.update(sr, gt)
    values = collection.compute()
    torch.testing.assert_close(values["mghf"], metric.compute())
    assert values["mghf_c"] != values["mghf"]


def test_bad_arguments_are_named(inn):
    with pytest.raises(TypeError, match="criterion must be a loss of mghf-loss, got Identity"):
        MGHFMetric(torch.nn.Identity())
    with pytest.raises(TypeError, match="return_terms must be True or False"):
        MGHFMetric(MGHFnLoss(inn), return_terms="yes")
    with pytest.raises(ValueError, match="sr and gt must have the same shape"):
        MGHFMetric(MGHFnLoss(inn)).update(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 24))
