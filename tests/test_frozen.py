"""Frozen networks: built, moved, converted, copied and replaced, they compute the same loss."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import accelerate
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from conftest import perturbed_inn
from mghf_loss import DinoJSDLoss, HighFrequencyINN, MGHFLoss, MGHFnLoss
from mghf_loss.frozen import Frozen

LOSSES = [MGHFnLoss, MGHFLoss]


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    images = torch.rand(2, 1, 3, 28, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    return images[0], images[1]


class Step(nn.Module):
    """A training module that holds a loss, as for FSDP or Lightning."""

    def __init__(self, criterion: Callable[[], nn.Module] = MGHFLoss) -> None:
        super().__init__()
        self.model = nn.Conv2d(3, 3, 1)
        self.criterion = criterion()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS: dict[str, Callable[[], AbstractContextManager]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "init_empty_weights": accelerate.init_empty_weights,
    "with_buffers": lambda: accelerate.init_empty_weights(include_buffers=True),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_network_is_loaded_the_same_within_any_context(context: str):
    expected, state = HighFrequencyINN.from_pretrained(), torch.get_rng_state()
    with CONTEXTS[context]():
        network = HighFrequencyINN.from_pretrained()
    assert torch.equal(torch.get_rng_state(), state)
    for (name, got), (_, parameter) in zip(network.named_parameters(), expected.named_parameters(), strict=True):
        assert (got.device, got.dtype) == (parameter.device, torch.float32), name
        assert torch.equal(got, parameter), name
        assert got.requires_grad == parameter.requires_grad, name
    sum(level.sum() for level in network.features(pair()[0])).backward()  # it can be trained
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_built_the_same_within_any_context(loss, context: str):
    sr, gt = pair()
    expected = loss()(sr, gt)
    with CONTEXTS[context]():
        criterion = loss()
    value = criterion(sr.requires_grad_(), gt)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    value.backward()


@pytest.fixture
def dino_by_name(monkeypatch, tiny_dino) -> Callable[[], DinoJSDLoss]:
    """`DinoJSDLoss()` whose weights are on no Hub: timm builds the small network, and its weights are put into it."""
    import timm

    create, state = timm.create_model, tiny_dino.state_dict()

    def create_small(name: str, *, pretrained: bool, pretrained_cfg_overlay: dict, **options) -> nn.Module:
        size = {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2}
        network = create(name, pretrained=False, **size, **options)
        network.load_state_dict(state)
        return network

    monkeypatch.setattr(timm, "create_model", create_small)
    return DinoJSDLoss


@pytest.mark.parametrize("context", [name for name in CONTEXTS if name != "init_empty_weights"])
def test_dino_is_built_the_same_within_any_context(context: str, dino_by_name):
    sr, gt = pair()
    expected, state = dino_by_name()(sr, gt), torch.get_rng_state()
    with CONTEXTS[context]():
        criterion = dino_by_name()
    assert torch.equal(torch.get_rng_state(), state)
    value = criterion(sr.requires_grad_(), gt)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    value.backward()


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")
def test_dino_says_that_it_cannot_be_built_without_weights(dino_by_name):
    with (
        accelerate.init_empty_weights(),
        pytest.raises(ValueError, match="was built under the meta device: build it outside of that"),
    ):
        dino_by_name()


@pytest.mark.parametrize(
    ("context", "where"), [("meta", "the meta device"), ("inference_mode", r"torch.inference_mode\(\)")]
)
def test_ready_network_without_values_or_gradients_is_refused(context: str, where: str):
    with CONTEXTS[context]():
        network = HighFrequencyINN()
    with pytest.raises(ValueError, match=f"frozen HighFrequencyINN was built under {where}: build it outside"):
        MGHFnLoss(network)


@pytest.mark.parametrize("context", ["bfloat16", "float16", "float64"])
def test_new_network_has_the_default_dtype(context: str):
    with CONTEXTS[context]():
        network = HighFrequencyINN()
        assert {parameter.dtype for parameter in network.parameters()} == {torch.get_default_dtype()}


def to_empty(step: Step) -> Step:
    return step.to("meta").to_empty(device="cpu")


def built_on_meta(step: Step) -> Step:
    with torch.device("meta"):
        step = Step(type(step.criterion))
    return step.to_empty(device="cpu")


def built_empty(step: Step) -> Step:
    with accelerate.init_empty_weights():
        step = Step(type(step.criterion))
    return step.to_empty(device="cpu")


def converted_in_inference_mode(step: Step) -> Step:
    with torch.inference_mode():
        step.criterion.double()
        step.criterion.float()
    return step


def overwritten(step: Step) -> Step:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return step.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


JOURNEYS = {
    "half and back": lambda step: step.half().float(),
    "half": lambda step: step.half(),
    "bfloat16": lambda step: step.to(torch.bfloat16),
    "double and back": lambda step: step.double().float(),
    "double and half": lambda step: step.double().half(),
    "meta": lambda step: step.to("meta"),
    "meta and half": lambda step: step.half().to("meta").to_empty(device="cpu"),
    "to_empty": to_empty,
    "built on meta": built_on_meta,
    "built empty": built_empty,
    "converted in inference mode": converted_in_inference_mode,
    "overwritten": overwritten,
    "channels_last": lambda step: step.to(memory_format=torch.channels_last),
    "zeroed": lambda step: step._apply(torch.zeros_like),
    "deepcopy": copy.deepcopy,
    "pickle": lambda step: pickle.loads(pickle.dumps(step)),
    "share_memory": lambda step: step.share_memory(),
}


@pytest.mark.parametrize("journey", JOURNEYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_journey_of_the_parent_changes_the_loss(loss, journey: str):
    step = Step(loss)
    checkpoint = step.state_dict()
    sr, gt = pair()
    expected = step.criterion(sr, gt)
    moved = JOURNEYS[journey](step)
    moved.train()
    assert torch.equal(moved.criterion(sr.requires_grad_(), gt), expected)
    moved.criterion(sr, gt).backward()
    assert list(moved.state_dict()) == list(checkpoint) == ["model.weight", "model.bias"]
    assert not moved.criterion.inn.network.training
    assert not any(parameter.requires_grad for parameter in moved.criterion.inn.network.parameters())


@pytest.mark.parametrize("loss", [MGHFnLoss, partial(MGHFLoss, "paper", patches=None, weighting="uniform")])
def test_double_is_followed(loss):
    criterion = loss()
    expected = criterion(*pair())
    value = criterion.double()(*pair(torch.float64))
    assert value.dtype == torch.float64
    torch.testing.assert_close(value.float(), expected, rtol=1e-3, atol=0)
    assert criterion.half()(*pair()).dtype == torch.float32


def test_half_precision_network_computes_in_float32():
    criterion = MGHFnLoss(perturbed_inn().half())
    assert criterion.inn.identity()[1] == torch.float32
    assert criterion(*pair(torch.float16)).dtype == torch.float32


@pytest.mark.parametrize("loss", LOSSES)
def test_building_a_loss_draws_no_random_number(loss):
    state = torch.get_rng_state()
    criterion = loss()
    criterion(*pair())
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_training_is_the_same_with_a_loss_for_logging():
    def train(log: bool) -> Tensor:
        torch.manual_seed(0)
        criterion = MGHFnLoss()
        unused = MGHFLoss() if log else None
        model = nn.Conv2d(3, 3, 1)
        optimiser = torch.optim.Adam(model.parameters())
        for _ in range(3):
            gt = torch.rand(1, 3, 16, 16)
            sr = model(gt)
            loss = criterion(sr, gt)
            if unused is not None:
                unused(sr.detach(), gt)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return model.weight.detach()

    assert torch.equal(train(False), train(True))


@pytest.mark.parametrize("compiled", [False, True])
def test_assigned_network_is_used_and_never_registered(compiled: bool):
    torch.manual_seed(0)
    other = perturbed_inn()
    sr, gt = pair()
    criterion = MGHFLoss(cache_gt=True)
    before = criterion(sr, gt)
    assert criterion.inn is not None
    criterion.inn.network = torch.compile(other, backend="eager") if compiled else other
    after = criterion.train()(sr, gt)
    assert not torch.equal(after, before)
    assert torch.equal(after, MGHFLoss(inn=other)(sr, gt))
    assert not list(criterion.parameters())
    assert not criterion.state_dict()
    assert not criterion.inn.network.training
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_something_else_than_a_network_is_refused():
    with pytest.raises(TypeError, match=r"network must be a torch.nn.Module, got int"):
        MGHFnLoss().inn.network = 1


def test_images_on_another_device_are_told_how_to_move_the_loss():
    with pytest.raises(ValueError, match=r"on meta, the loss is on cpu: move it once, criterion.to\('meta'\)"):
        MGHFnLoss()(*(image.to("meta") for image in pair()))


def test_data_parallel_is_refused_by_name():
    for loss in (MGHFnLoss(), MGHFLoss()):
        assert isinstance(loss.inn, Frozen)
        with pytest.raises(RuntimeError, match=r"nn.DataParallel .* use DistributedDataParallel"):
            loss.inn._replicate_for_data_parallel()


def _evaluate(criterion: nn.Module, queue) -> None:
    torch.set_num_threads(1)
    queue.put(criterion(*pair()).item())


def test_another_process_computes_the_same():
    criterion = MGHFnLoss().share_memory()
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_evaluate, args=(criterion, queue))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert queue.get() == criterion(*pair()).item()
