"""What every loss promises: gradients, inputs, determinism, state dict, compilation, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from conftest import perturbed_inn
from mghf_loss import DinoJSDLoss, MGHFLoss, MGHFnLoss
from mghf_loss.mghf import OFF, PRESETS

TERMS = list(OFF)
COEFFICIENTS = dict(zip(TERMS, (2.0, 30.0, 0.5, 0.25, 1.0, 0.125, 4.0), strict=True))
OPTIONS = {  # beside the defaults
    "MGHFLoss": {"coefficients": COEFFICIENTS},
    "GT-conditioned": {"coefficients": COEFFICIENTS | {"dino_jsd": 0.0}, "conditioning": "gt"},
    "mixed": {"coefficients": COEFFICIENTS | {"dino_jsd": 0.0}, "conditioning": "mixed"},
    "average": {"coefficients": COEFFICIENTS | {"dino_jsd": 0.0}, "shift": "average"},
    **{f"only {term}": {"coefficients": {name: float(name == term) for name in TERMS}} for term in TERMS},
    **{f"preset {name}": {"preset": name} for name in PRESETS},
}
LOSSES = ["MGHFnLoss", "DinoJSDLoss", *OPTIONS]


@pytest.fixture
def build(inn, tiny_dino) -> Callable[..., nn.Module]:
    def build(name: str, **options) -> nn.Module:
        if name == "MGHFnLoss":
            return MGHFnLoss(inn=inn, **options)
        if name == "DinoJSDLoss":
            return DinoJSDLoss(tiny_dino, **options)
        return MGHFLoss(**{"inn": inn, "dino": tiny_dino, "patches": 64, **OPTIONS[name], **options})

    return build


def random_pair(*shape: int) -> tuple[Tensor, Tensor]:
    gt = torch.rand(shape or (2, 3, 32, 32))
    return (gt + 0.2 * torch.randn_like(gt)).clamp(0, 1), gt


def quantised(image: Tensor) -> Tensor:
    return (image * 255).round() / 255


def strided(image: Tensor) -> Tensor:
    return image.repeat_interleave(2, dim=3)[..., ::2]


INPUTS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "random": random_pair,
    "equal": lambda: (random_pair()[1],) * 2,
    "both black": lambda: (torch.zeros(2, 3, 32, 32),) * 2,
    "sr black": lambda: (torch.zeros(2, 3, 32, 32), random_pair()[1]),
    "gt black": lambda: (random_pair()[0], torch.zeros(2, 3, 32, 32)),
    "constant": lambda: (torch.full((2, 3, 32, 32), 0.3), torch.full((2, 3, 32, 32), 0.6)),
    "quantised": lambda: tuple(map(quantised, random_pair())),
    "out of range": lambda: tuple(3 * image - 1 for image in random_pair()),
    "tiny": lambda: random_pair(2, 3, 8, 8),
    "odd": lambda: random_pair(2, 3, 37, 51),
    "batch of one": lambda: random_pair(1, 3, 32, 32),
    "channels_last": lambda: tuple(i.contiguous(memory_format=torch.channels_last) for i in random_pair()),
    "non-contiguous": lambda: tuple(map(strided, random_pair())),
    "fp16": lambda: tuple(image.half() for image in random_pair()),
    "bf16": lambda: tuple(image.bfloat16() for image in random_pair()),
    "fp64": lambda: tuple(image.double() for image in random_pair()),
    "fp16 sr, fp32 gt": lambda: (random_pair()[0].half(), random_pair()[1]),
}
AT_MINIMUM = {  # where a term has its minimum, or, for patch_nce, cannot tell locations apart
    "equal": {"MGHFnLoss", "DinoJSDLoss", *(f"only {term}" for term in TERMS if term != "patch_nce")}
    | {f"preset {name}" for name, settings in PRESETS.items() if not settings.coefficients["patch_nce"]},
    "both black": set(LOSSES),
    "gt black": {"only patch_nce"},
    # GT conditioning leaves nothing of a constant difference but the low-pass band.
    "constant": {"MGHFnLoss", "GT-conditioned", *(f"only {term}" for term in TERMS if term != "dino_jsd")}
    | {f"preset {name}" for name, settings in PRESETS.items() if settings.conditioning == "gt"},
}


@pytest.mark.filterwarnings("ignore:the first GT has values")  # black, out of range
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_finite_and_reaches_sr_alone(name, inputs, build):
    sr, gt = INPUTS[inputs]()
    sr, gt = sr.detach().requires_grad_(), gt.detach().requires_grad_()
    loss = build(name)(sr, gt)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss >= 0
    loss.backward()
    assert gt.grad is None
    assert sr.grad.shape == sr.shape
    assert sr.grad.dtype == sr.dtype
    assert sr.grad.isfinite().all()
    if name in AT_MINIMUM.get(inputs, set()):
        assert sr.grad.abs().max() < 1e-5
    else:
        assert sr.grad.abs().max() > 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_little_and_the_inn_not_at_all(name, dtype, build):
    criterion = build(name)
    sr, gt = random_pair()
    sr.requires_grad_()

    def value_and_gradient(autocast: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            loss = criterion(sr, gt)
        return loss.detach(), torch.autograd.grad(loss, sr)[0]

    expected, got = value_and_gradient(False), value_and_gradient(True)
    assert got[0].dtype == torch.float32
    assert got[1].isfinite().all()
    if "dino" in name.lower() or name == "MGHFLoss":  # the ViT follows autocast
        torch.testing.assert_close(got[0], expected[0], rtol=0.1, atol=1e-4)
    else:
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("name", LOSSES)
def test_memory_format_and_strides_do_not_matter(name, build):
    criterion = build(name)
    sr, gt = random_pair()

    def value(change: Callable[[Tensor], Tensor]) -> Tensor:
        return criterion(change(sr), change(gt))

    expected = value(lambda image: image)
    torch.testing.assert_close(value(strided), expected)
    torch.testing.assert_close(value(lambda image: image.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_two_seeded_runs_agree_bit_for_bit(name, build):
    criterion = build(name)
    sr, gt = random_pair()
    sr.requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss = criterion(sr, gt)
        return loss.detach(), torch.autograd.grad(loss, sr)[0]

    (loss, gradient), (again, gradient_again) = run(), run()
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradient_again)


@pytest.mark.compile
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_without_graph_breaks_it_gives_the_eager_value(name, build):
    criterion = build(name)
    sr, gt = random_pair()
    sr.requires_grad_()

    def run(function: nn.Module) -> tuple[Tensor, Tensor]:
        loss = function(sr, gt)
        return loss.detach(), torch.autograd.grad(loss, sr)[0]

    torch._dynamo.reset()
    expected = run(criterion)
    got = run(torch.compile(criterion, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-7)


def test_compiled_on_a_small_network_it_gives_the_eager_value():
    """The smoke test of the fast tier."""
    criterion = MGHFLoss(inn=perturbed_inn(levels=1, couplings=1, hidden=4))
    sr, gt = random_pair(1, 3, 16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(sr, gt), criterion(sr, gt))


@pytest.mark.compile
def test_compiled_once_it_takes_images_of_any_size(build):
    criterion = build("MGHFLoss")
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 32, 32), (2, 3, 40, 48), (1, 3, 37, 51), (3, 3, 24, 64)):
        sr, gt = random_pair(*shape)
        expected = criterion(sr, gt)
        torch.testing.assert_close(compiled(sr, gt), expected)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")  # Inductor warns of this and that on machines without a GPU
def test_compiled_with_inductor_it_gives_the_eager_value(build):
    criterion = build("MGHFLoss")
    sr, gt = random_pair()
    torch._dynamo.reset()
    expected = criterion(sr, gt)
    torch.testing.assert_close(torch.compile(criterion, fullgraph=True)(sr, gt), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_reductions_agree(name, build):
    sr, gt = random_pair(3, 3, 24, 24)

    def value(reduction: str) -> Tensor:
        return build(name, reduction=reduction)(sr, gt)

    per_image = value("none")
    assert per_image.shape == (3,)
    torch.testing.assert_close(value("mean"), per_image.mean())
    torch.testing.assert_close(value("sum"), per_image.sum())


@pytest.mark.parametrize("name", LOSSES)
def test_input_range_is_only_a_unit(name, build):
    sr, gt = random_pair()

    def value(criterion: nn.Module, scale: float, shift: float) -> Tensor:
        return criterion(sr * scale + shift, gt * scale + shift)

    expected = value(build(name), 1, 0)
    torch.testing.assert_close(value(build(name, input_range=(-1, 1)), 2, -1), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value(build(name, input_range=(0, 255)), 255, 0), expected, rtol=1e-4, atol=1e-6)


def test_the_total_is_the_sum_of_coefficient_times_term(inn, tiny_dino):
    criterion = MGHFLoss(coefficients=COEFFICIENTS, inn=inn, dino=tiny_dino)
    loss, terms = criterion(*random_pair(), return_terms=True)
    assert list(terms) == TERMS
    torch.testing.assert_close(loss, sum(COEFFICIENTS[name] * value for name, value in terms.items()))
    assert not any(value.requires_grad for value in terms.values())


def test_return_terms_per_image(inn):
    loss, terms = MGHFLoss(inn=inn, reduction="none")(*random_pair(3, 3, 16, 16), return_terms=True)
    assert loss.shape == (3,)
    assert {value.shape for value in terms.values()} == {(3,)}


def test_precision_is_checked_and_on_a_cpu_always_float32(inn):
    sr, gt = random_pair()
    values = []
    for precision in ("fast", "high"):
        values.append(MGHFLoss("paper", inn=inn, precision=precision)(sr, gt))
    assert torch.equal(*values)
    with pytest.raises(ValueError, match="precision must be one of 'fast', 'high', got 'tf32'"):
        MGHFLoss(inn=inn, precision="tf32")


def test_a_term_with_coefficient_zero_is_not_computed(inn, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("computed")

    computed = "terms.content_of", "terms.style_of", "terms.patch_nce", "mghf.stacked_local_errors"
    for name in (*computed, "mghf._stacked_squared_error"):
        monkeypatch.setattr(f"mghf_loss.{name}", refuse)
    criterion = MGHFLoss(**OPTIONS["only correlation"], inn=inn)
    assert list(criterion(*random_pair(), return_terms=True)[1]) == ["correlation"]


def test_mghfn_is_the_unweighted_content_over_levels(inn):
    sr, gt = random_pair()
    expected = torch.stack(
        [(s - g).square().mean() for s, g in zip(inn.features(2 * sr - 1), inn.features(2 * gt - 1), strict=True)]
    ).mean()
    torch.testing.assert_close(MGHFnLoss(inn=inn, conditioning="own", shift="none")(sr, gt), expected)


def test_dense_is_what_sampling_every_location_gives(inn):
    sr, gt = random_pair()
    torch.testing.assert_close(
        MGHFLoss(**OPTIONS["only patch_nce"], inn=inn, patches=None)(sr, gt),
        MGHFLoss(**OPTIONS["only patch_nce"], inn=inn, patches=16 * 16)(sr, gt),
    )


class Training(nn.Module):
    """A model with its loss, as Lightning users write it."""

    def __init__(self, criterion: nn.Module | None) -> None:
        super().__init__()
        self.model = nn.Conv2d(3, 3, 3, padding=1)
        if criterion is not None:
            self.criterion = criterion


@pytest.mark.parametrize("name", ["MGHFnLoss", "MGHFLoss", "DinoJSDLoss"])
def test_state_dict_parameters_and_optimiser_do_not_see_the_frozen_networks(name, build):
    with_loss, without = Training(build(name)), Training(None)
    assert with_loss.state_dict().keys() == without.state_dict().keys()
    assert len(list(with_loss.parameters())) == len(list(without.parameters()))
    with_loss.load_state_dict(without.state_dict())  # strict, without its keys


@pytest.mark.parametrize("name", ["MGHFnLoss", "MGHFLoss", "DinoJSDLoss"])
def test_a_state_dict_with_foreign_copies_of_the_frozen_keys_loads_strictly(name, build):
    module = Training(build(name))
    attribute = "network" if name == "DinoJSDLoss" else "inn"
    network = getattr(module.criterion, attribute).network
    before = copy.deepcopy(network.state_dict())
    state = module.state_dict() | {
        f"criterion.{attribute}.{key}": torch.zeros_like(value) for key, value in before.items()
    }
    module.load_state_dict(state)
    after = network.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_train_requires_grad_and_to_do_what_they_should(build):
    module = Training(build("MGHFLoss"))
    networks = [module.criterion.inn.network, module.criterion.dino.network.network]
    module.train().requires_grad_(True)
    for network in networks:
        assert not any(submodule.training for submodule in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
    module.to(torch.float64)
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float64}
    sr, gt = random_pair()
    assert module.criterion(sr.double(), gt.double()).dtype == torch.float64


def test_deep_copies_are_independent_and_equal(build):
    criterion = build("MGHFnLoss")
    twin = copy.deepcopy(criterion)
    pair = random_pair()
    assert torch.equal(criterion(*pair), twin(*pair))
    twin.double()
    assert next(criterion.inn.network.parameters()).dtype == torch.float32


def test_repr_shows_coefficients_and_network(build):
    text = repr(build("MGHFLoss"))
    assert "content=" in text
    assert "HighFrequencyINN" in text
    assert "frozen parameters" in text


def test_heatmap_has_every_term_and_is_zero_where_nothing_changed(build):
    gt = random_pair(1, 3, 64, 64)[1]
    sr = gt.clone()
    sr[..., :16, :16] = 0.5
    criterion = build("only content")
    maps = criterion.heatmap(sr, gt)
    assert set(maps) == {"content", "total"}
    assert maps["total"].shape == (1, 64, 64)
    assert maps["total"][0, :16, :16].mean() > 100 * maps["total"][0, 48:, 48:].mean()
    assert set(build("MGHFLoss").heatmap(sr, gt)) == {*TERMS, "total"}


@pytest.mark.parametrize("name", ["MGHFnLoss", "MGHFLoss", "DinoJSDLoss"])
@pytest.mark.parametrize("grad", ["with gradients", "without", "in inference mode"])
def test_heatmaps_are_smoothed_norms_of_each_images_own_gradient(name, grad, build):
    criterion = build(name, reduction="sum")
    sr, gt = random_pair(2, 3, 24, 32)
    sr.requires_grad_()
    values = criterion.term_values(sr, gt, torch.Generator().manual_seed(0))
    gradients = {
        term: criterion.coefficients[term] * torch.autograd.grad(value.sum(), sr, retain_graph=True)[0]
        for term, value in values.items()
    }
    gradients["total"] = torch.stack(list(gradients.values())).sum(0)
    modes = {"with gradients": torch.enable_grad, "without": torch.no_grad}
    with modes.get(grad, torch.inference_mode)():
        images = (sr, gt) if grad == "with gradients" else (sr.clone(), gt.clone())
        maps = criterion.heatmap(*images, generator=torch.Generator().manual_seed(0))
    assert list(maps) == list(gradients)
    for term, gradient in gradients.items():
        norm = gradient.square().sum(1).sqrt()
        expected = torch.stack(
            [
                norm[:, max(0, i - 2) : i + 3, max(0, j - 2) : j + 3].mean((1, 2))
                for i in range(norm.shape[1])
                for j in range(norm.shape[2])
            ],
            dim=1,
        )
        torch.testing.assert_close(maps[term].flatten(1), expected, rtol=1e-4, atol=1e-5 * expected.max().item())


def test_heatmaps_of_half_precision_lose_nothing(build):
    sr, gt = (image.half() for image in random_pair(1, 3, 64, 64))
    criterion = build("MGHFnLoss")
    torch.testing.assert_close(criterion.heatmap(sr, gt), criterion.heatmap(sr.float(), gt.float()))


IMAGE = torch.rand(1, 3, 16, 16)
BAD_INPUTS: dict[str, tuple[object, object, type[Exception], str]] = {
    "other shape": (IMAGE, torch.rand(1, 3, 16, 24), ValueError, r"sr \(1, 3, 16, 16\) and gt \(1, 3, 16, 24\)"),
    "broadcastable": (IMAGE.repeat(2, 1, 1, 1), IMAGE, ValueError, r"sr \(2, 3, 16, 16\) and gt \(1, 3, 16, 16\)"),
    "three dimensions": (IMAGE[0], IMAGE, ValueError, r"sr must have shape \(B, 3, H, W\), got \(3, 16, 16\)"),
    "grey": (IMAGE, IMAGE[:, :1], ValueError, r"gt must have 3 channels .* got 1 .*gt\.expand\(-1, 3, -1, -1\)"),
    "rgba": (torch.rand(1, 4, 16, 16), IMAGE, ValueError, r"sr must have 3 channels .* got 4"),
    "uint8": ((IMAGE * 255).byte(), IMAGE, TypeError, r"sr must be a floating-point tensor, got torch.uint8"),
    "complex": (IMAGE, IMAGE + 0j, TypeError, r"gt must be a floating-point tensor, got torch.complex64"),
    "numpy": (IMAGE.numpy(), IMAGE, TypeError, r"sr must be a torch.Tensor, got ndarray"),
    "empty batch": (IMAGE[:0], IMAGE[:0], ValueError, r"at least one image, got shape \(0, 3, 16, 16\)"),
    "other device": (IMAGE, IMAGE.to("meta"), ValueError, "got sr on cpu and gt on meta"),
    "swapped": (
        IMAGE,
        IMAGE.clone().requires_grad_(),
        ValueError,
        r"are the two swapped\? Expected criterion\(sr, gt\)",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("name", ["MGHFnLoss", "MGHFLoss", "DinoJSDLoss"])
def test_bad_images_are_refused_by_name(name, case, build):
    sr, gt, error, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message):
        build(name)(sr, gt)


@pytest.mark.parametrize("name", ["MGHFnLoss", "MGHFLoss"])
def test_images_smaller_than_the_networks_stride_are_refused(name, build):
    with pytest.raises(ValueError, match=r"sr must be at least 8 x 8, got shape \(1, 3, 4, 16\)"):
        build(name)(IMAGE[..., :4, :], IMAGE[..., :4, :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": "runs/inn"}, "coefficients must be a mapping .* got 'runs/inn'"),
        ({"inn": None}, "inn must be a checkpoint's name .* got None"),
    ],
)
def test_options_of_another_type_are_refused_by_name(options, message, inn):
    with pytest.raises(TypeError, match=message):
        MGHFLoss(**{"inn": inn, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": {"contents": 1.0}}, "unknown term contents; known are content, style"),
        ({"coefficients": {"style": -1.0}}, r"coefficients\['style'\] must be .* got -1.0"),
        ({"coefficients": {"style": float("nan")}}, r"coefficients\['style'\] must be .* got nan"),
        ({"coefficients": {"style": True}}, r"coefficients\['style'\] must be .* got True"),
        ({"coefficients": {"style": "1"}}, r"coefficients\['style'\] must be .* got '1'"),
        ({"coefficients": dict.fromkeys(TERMS, 0.0)}, "all coefficients are 0"),
        ({"patches": 1}, "patches must be .* got 1"),
        ({"patches": True}, "patches must be .* got True"),
        ({"modulation": "soft"}, "modulation must be one of .* got 'soft'"),
        ({"prune": 1.0}, "prune must be a number of at least 0 and below 1, got 1.0"),
        ({"prune": -0.1}, "prune must be .* got -0.1"),
        ({"style_delta": 0}, "style_delta must be a number of at least 1e-06, got 0"),
        ({"prune": 0.25}, "prune needs weighting='entropy', got prune=0.25 and weighting='uniform'"),
        ({"weighting": "variance"}, "weighting must be one of 'uniform', 'entropy', got 'variance'"),
        ({"conditioning": "sr"}, "conditioning must be one of 'gt', 'own', 'mixed', got 'sr'"),
        ({"shift": 3}, "shift must be one of 'random', 'average', 'none', got 3"),
        ({"reduction": "max"}, "reduction must be one of .* got 'max'"),
        ({"input_range": (1, 0)}, r"black < white, got \(1, 0\)"),
        ({"input_range": 255}, "two numbers .* got 255"),
    ],
)
def test_bad_options_are_refused_by_name(options, message, inn):
    with pytest.raises(ValueError, match=message):
        MGHFLoss(**{"inn": inn, **options})
