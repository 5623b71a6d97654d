"""The losses as trainers build and call them, and what is logged. Real runs: test_basicsr.py, test_lightning.py."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import mghf_loss
from mghf_loss import DinoJSDLoss, MGHFLoss, MGHFnLoss
from mghf_loss.integrations.registered import WeightedLoss, register
from mghf_loss.integrations.tensorboard import log_pair
from mghf_loss.mghf import OFF

TERMS = ["content", "style", "correlation", "patch_nce"]  # of the preset "paper"


def pair() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 24, 24, requires_grad=True), torch.rand(2, 3, 24, 24)


class Registry(dict):
    """A registry as neosr and traiNNer-redux document theirs: `register` by the class's name, `get`, `in`."""

    def __init__(self, lower: bool) -> None:
        super().__init__()
        self.key = str.lower if lower else str

    def register(self, cls: type) -> None:
        assert self.key(cls.__name__) not in self
        self[self.key(cls.__name__)] = cls

    def get(self, name: str) -> type:
        return self[self.key(name)]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(self.key(name))

    def build(self, opt: dict):
        return self.get(opt["type"])(**{name: value for name, value in opt.items() if name != "type"})


@pytest.fixture
def trainer(monkeypatch):
    """Import an integration with a registry in the place of the trainer's, which is not on PyPI."""

    def load(framework: str, integration: str, lower: bool) -> Registry:
        registry = Registry(lower)
        for name in (framework, f"{framework}.utils", f"{framework}.utils.registry"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[f"{framework}.utils.registry"].LOSS_REGISTRY = registry
        monkeypatch.delitem(sys.modules, f"mghf_loss.integrations.{integration}", raising=False)
        module = importlib.import_module(f"mghf_loss.integrations.{integration}")
        importlib.reload(module)  # registers again without error
        monkeypatch.delitem(sys.modules, f"mghf_loss.integrations.{integration}")
        return registry

    return load


@pytest.fixture(scope="module")
def basicsr():
    if importlib.util.find_spec("basicsr") is None:
        pytest.skip("BasicSR is not installed: its sdist does not build on Python 3.13")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of SciPy's and torchvision's changes
        return importlib.import_module("mghf_loss.integrations.basicsr")


@pytest.mark.parametrize("loss_weight", [1, 0.25])
def test_neosr_contract(trainer, tiny_dino, loss_weight):
    """Contract from the documented call convention, not a run: options by keyword, one scalar, factor inside."""
    registry = trainer("neosr", "neosr", lower=False)
    assert set(registry) == {"MGHFLoss", "MGHFnLoss", "DinoJSDLoss"}
    sr, gt = pair()
    options = {"preset": "paper", "coefficients": {"style": 0.0}, "input_range": [0, 1]}  # TOML has no tuples
    loss = registry.build({"type": "MGHFLoss", "loss_weight": loss_weight, **options})
    loss = loss.to("cpu", memory_format=torch.channels_last, non_blocking=True)
    value = loss(sr, gt)
    torch.testing.assert_close(value, loss_weight * MGHFLoss(**options)(sr, gt))
    assert value.shape == ()
    value = registry.build({"type": "MGHFnLoss", "loss_weight": loss_weight})(sr, gt)
    torch.testing.assert_close(value, loss_weight * MGHFnLoss()(sr, gt))
    value = registry.build({"type": "DinoJSDLoss", "loss_weight": loss_weight, "model": tiny_dino})(sr, gt)
    torch.testing.assert_close(value, loss_weight * DinoJSDLoss(tiny_dino)(sr, gt))


@pytest.mark.parametrize("loss_weight", [1.0, 0.25])
def test_trainner_redux_contract(trainer, tiny_dino, loss_weight):
    """Contract from the documented call convention, not a run: the trainer multiplies, sums a dict's positive terms."""
    registry = trainer("traiNNer", "trainner_redux", lower=True)
    sr, gt = pair()

    def step(opt: dict) -> tuple[Tensor, dict[str, Tensor]]:
        loss = registry.build({"loss_weight": loss_weight, **opt})
        loss = loss.to("cpu", memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast("cpu", torch.bfloat16):
            values = loss(sr, gt)
        logged = {name: value * abs(loss.loss_weight) for name, value in values.items() if value > 0}
        return torch.stack(list(logged.values())).sum(), logged

    total, logged = step({"type": "mghfloss", "preset": "paper", "coefficients": {"style": 500.0}})
    assert list(logged) == TERMS
    bare = MGHFLoss("paper", coefficients={"style": 500.0})
    torch.testing.assert_close(total, loss_weight * bare(sr, gt))
    torch.testing.assert_close(*(torch.autograd.grad(v, sr)[0] for v in (total, loss_weight * bare(sr, gt))))
    assert set(step({"type": "MGHFnLoss"})[1]) == {"content"}
    torch.testing.assert_close(step({"type": "MGHFnLoss"})[0], loss_weight * MGHFnLoss()(sr, gt))
    summed = step({"type": "MGHFnLoss", "reduction": "sum"})[0]
    torch.testing.assert_close(summed, loss_weight * MGHFnLoss(reduction="sum")(sr, gt))
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_weight * DinoJSDLoss(tiny_dino)(sr, gt)
    torch.testing.assert_close(step({"type": "DinoJSDLoss", "model": tiny_dino})[0], expected)


@pytest.mark.parametrize("loss_weight", [1, 0.25])
def test_basicsr_builds_the_pixel_slot(basicsr, tiny_dino, loss_weight):
    from basicsr.utils.registry import LOSS_REGISTRY

    sr, gt = pair()
    bare = {"MGHFLoss": MGHFLoss("paper"), "MGHFnLoss": MGHFnLoss(), "DinoJSDLoss": DinoJSDLoss(tiny_dino)}
    for name, criterion in bare.items():
        options = {"MGHFLoss": {"preset": "paper"}, "DinoJSDLoss": {"model": tiny_dino}}.get(name, {})
        loss = LOSS_REGISTRY.get(name)(loss_weight=loss_weight, **options)
        assert loss.terms == {}
        torch.testing.assert_close(loss(sr, gt), loss_weight * criterion(sr, gt))
        expected = {"MGHFLoss": TERMS, "MGHFnLoss": ["content"], "DinoJSDLoss": ["dino_jsd"]}[name]
        assert list(loss.terms) == expected
        assert not any(value.requires_grad for value in loss.terms.values())


def test_basicsr_perceptual_slot_splits_the_loss(basicsr):
    sr, gt = pair()
    expected, values = MGHFLoss("paper")(sr, gt, return_terms=True)
    both = basicsr.MGHFPerceptualLoss(preset="paper")
    percep, style = both(sr, gt)
    torch.testing.assert_close(percep + style, expected)
    torch.testing.assert_close(style, 600 * values["style"])
    assert both.terms == values
    weighted = basicsr.MGHFPerceptualLoss(0.5, 0.25, preset="paper", reduction="sum")
    torch.testing.assert_close(weighted(sr, gt), (2 * 0.5 * percep, 2 * 0.25 * style))
    percep_alone = basicsr.MGHFPerceptualLoss(style_weight=0, preset="paper")(sr, gt)
    torch.testing.assert_close(percep_alone, (percep, None))
    style_alone = basicsr.MGHFPerceptualLoss(perceptual_weight=0, preset="paper")(sr, gt)
    torch.testing.assert_close(style_alone, (None, style))
    without = basicsr.MGHFPerceptualLoss(preset="paper", coefficients={"style": 0.0})
    torch.testing.assert_close(without(sr, gt), (percep, None))


def test_basicsr_perceptual_slot_loads_no_network_that_it_does_not_use(basicsr):
    """The DINO term's would be fetched from the Hub."""
    loss = basicsr.MGHFPerceptualLoss(perceptual_weight=0, preset="paper", coefficients={"dino_jsd": 1.0})
    assert loss.criterion.dino is None


def test_basicsr_options_that_make_no_sense_are_refused(basicsr):
    with pytest.raises(ValueError, match="perceptual_weight and style_weight are 0"):
        basicsr.MGHFPerceptualLoss(0, 0)
    with pytest.raises(ValueError, match="style_weight must be a finite number of at least 0, got -1"):
        basicsr.MGHFPerceptualLoss(style_weight=-1)
    with pytest.raises(
        TypeError, match="unknown option loss_weight of MGHFPerceptualLoss; known are perceptual_weight, "
    ):
        basicsr.MGHFPerceptualLoss(loss_weight=1.0)
    with pytest.raises(ValueError, match=r"style_weight must be .*, got '5e-2'; YAML takes numbers like 5e-2 for text"):
        basicsr.MGHFPerceptualLoss(style_weight="5e-2")
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum' inside a trainer"):
        basicsr.MGHFPerceptualLoss(reduction="none")


def test_basicsr_may_be_registered_as_often_as_one_likes(basicsr):
    from basicsr.utils.registry import LOSS_REGISTRY, MODEL_REGISTRY

    importlib.reload(basicsr)
    assert {"MGHFLoss", "MGHFnLoss", "DinoJSDLoss", "MGHFPerceptualLoss"} <= set(LOSS_REGISTRY.keys())
    assert {"MGHFSRModel", "MGHFSRGANModel"} <= set(MODEL_REGISTRY.keys())


def build_sr_model(model_type: str = "MGHFSRModel", network_d: dict | None = None, **train):
    """A BasicSR model of few parameters with these training options."""
    from basicsr.models import build_model

    train = {
        "optim_g": {"type": "Adam", "lr": 1e-3},
        "optim_d": {"type": "Adam", "lr": 1e-3},
        "scheduler": {"type": "MultiStepLR", "milestones": [100]},
        **train,
    }
    network_g = {"type": "MSRResNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "upscale": 4}
    options = {"model_type": model_type, "num_gpu": 0, "dist": False, "is_train": True, "path": {}, "train": train}
    return build_model({**options, "network_g": network_g, "network_d": network_d})


@pytest.mark.filterwarnings("ignore")  # BasicSR's scheduler
def test_basicsr_gan_logs_terms_only_where_the_generator_was_trained(basicsr):
    model = build_sr_model(
        "MGHFSRGANModel",
        network_d={"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 8},
        pixel_opt={"type": "L1Loss"},
        perceptual_opt={"type": "MGHFPerceptualLoss", "preset": "paper", "perceptual_weight": 0.1},
        gan_opt={"type": "GANLoss", "gan_type": "vanilla", "loss_weight": 0.01},
        net_d_iters=2,
        grad_clip=1e-3,
    )
    model.feed_data({"lq": torch.rand(1, 3, 8, 8), "gt": torch.rand(1, 3, 32, 32)})
    norms, logs = [], []
    model.optimizer_g.register_step_pre_hook(lambda *_: norms.append(norm(model.net_g)))
    for iteration in (1, 2, 3):
        model.optimize_parameters(iteration)
        logs.append(dict(model.get_current_log()))
    terms = {f"l_perceptual_{name}" for name in TERMS}
    assert [terms & log.keys() for log in logs] == [set(), terms, set()]
    values = [
        0.1 * factor * logs[1][f"l_perceptual_{name}"] for name, factor in zip(TERMS, (5, 600, 1, 0.008), strict=True)
    ]
    assert logs[1]["l_g_style"] == pytest.approx(10 * values.pop(1), rel=1e-5)
    assert logs[1]["l_g_percep"] == pytest.approx(sum(values), rel=1e-5)
    assert norms == pytest.approx([1e-3], rel=1e-4)  # grad_clip


def norm(network: torch.nn.Module) -> float:
    return torch.stack([parameter.grad.norm() for parameter in network.parameters()]).norm().item()


@pytest.mark.filterwarnings("ignore")  # BasicSR's scheduler
def test_basicsr_models_refuse_a_loss_in_the_wrong_slot(basicsr, caplog):
    with pytest.raises(ValueError, match="MGHFPerceptualLoss returns two losses and belongs into perceptual_opt"):
        build_sr_model(pixel_opt={"type": "MGHFPerceptualLoss"})
    with pytest.raises(ValueError, match="MGHFnLoss returns one loss and belongs into pixel_opt"):
        build_sr_model(pixel_opt={"type": "L1Loss"}, perceptual_opt={"type": "MGHFnLoss"})
    with pytest.raises(ValueError, match="grad_clip must be a finite number of at least 0, got 'much'"):
        build_sr_model(pixel_opt={"type": "L1Loss"}, grad_clip="much")
    with pytest.raises(ValueError, match="grad_clip must be more than 0, which would stop the training"):
        build_sr_model(pixel_opt={"type": "L1Loss"}, grad_clip=0)
    build_sr_model(pixel_opt={"type": "L1Loss"}, perceptual_opt={"type": "MGHFPerceptualLoss"})
    assert "colours may drift" not in caplog.text
    build_sr_model(perceptual_opt={"type": "MGHFPerceptualLoss"})
    assert "pixel_opt has no pixel loss: MGHF compares details, and colours may drift" in caplog.text


def test_basicsr_terms_are_averaged_over_processes_before_they_are_logged(basicsr):
    class Base:
        def __init__(self) -> None:
            self.cri_pix, self.log_dict, self.image = WeightedLoss.of(MGHFnLoss)(), {}, torch.rand(1, 3, 16, 16)

        def optimize_parameters(self, current_iter: int) -> None:
            self.cri_pix(self.image, self.image.flip(-1))

        def reduce_loss_dict(self, losses: dict[str, Tensor]) -> dict[str, float]:
            """BasicSR's way to the mean over processes."""
            return {name: value.item() / 4 for name, value in losses.items()}

    model = type("Model", (basicsr.LogsTerms, Base), {})()
    model.optimize_parameters(1)
    assert model.log_dict == {"l_pix_content": model.cri_pix.terms["content"].item() / 4}


def test_a_name_that_is_anothers_is_not_passed_over():
    registry = Registry(lower=False)
    registry.register(type("MGHFLoss", (), {"__module__": "elsewhere"}))
    with pytest.raises(ValueError, match=r"the registry's MGHFLoss is elsewhere\.MGHFLoss, not mghf-loss's"):
        register(registry, WeightedLoss.of(MGHFLoss))


@pytest.mark.parametrize("name", ["MGHFLoss", "MGHFnLoss", "DinoJSDLoss"])
def test_bad_options_are_refused_by_name(name, tiny_dino):
    build = WeightedLoss.of(getattr(mghf_loss, name))
    options = {"model": tiny_dino} if name == "DinoJSDLoss" else {}
    for value in (-1, float("nan"), True, "0.1"):
        with pytest.raises(ValueError, match="loss_weight must be a finite number of at least 0, got"):
            build(loss_weight=value, **options)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum' inside a trainer"):
        build(reduction="none", **options)
    with pytest.raises(TypeError, match=f"unknown option criterion_type of {name}; known are loss_weight, .*reduction"):
        build(criterion_type="l1", **options)


@pytest.mark.parametrize(
    ("integration", "framework", "remedy"),
    [
        ("basicsr", "basicsr", "pip install basicsr"),
        ("lightning", "lightning", "pip install lightning"),
        ("torchmetrics", "torchmetrics", "pip install 'torchmetrics>=1.4'"),
        ("neosr", "neosr", "github.com/neosr-project/neosr"),
        ("trainner_redux", "traiNNer", "github.com/the-database/traiNNer-redux"),
    ],
)
def test_a_missing_framework_is_named_with_the_remedy(integration, framework, remedy, monkeypatch):
    for module in list(sys.modules):
        if module.split(".")[0] == framework or module.startswith(f"torch.utils.{framework}"):
            monkeypatch.delitem(sys.modules, module)

    class Missing:
        def find_spec(self, name: str, *_: object) -> None:
            if name == framework:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, f"mghf_loss.integrations.{integration}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=f"needs {framework}, which is not installed: .*{remedy}") as caught:
        importlib.import_module(f"mghf_loss.integrations.{integration}")
    assert caught.value.name == framework


def test_a_framework_that_misses_something_is_not_called_missing():
    from mghf_loss.integrations import needs

    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'"), needs("basicsr", "pip"):
        importlib.import_module("no_such_module")


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def picture(events, tag: str) -> Tensor:
    """The images of a tag, (B, H, W, 3) in 0 to 255; TensorBoard's row of them cut up again."""
    import io

    image = Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)).convert("RGB")
    row = torch.from_numpy(np.array(image))
    return torch.stack(row.split(row.shape[0], dim=1)).float()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own
@pytest.mark.parametrize("inference", [False, True])
def test_log_pair_writes_terms_energies_and_pictures(tmp_path, inference):
    criterion = MGHFLoss("paper", input_range=(0, 255), reduction="none")
    with torch.inference_mode(inference):
        gt = 255 * torch.rand(3, 3, 32, 32)
        sr = torch.nn.functional.avg_pool2d(gt, 5, 1, 2)  # its details are gone
        state = torch.get_rng_state()
        with SummaryWriter(str(tmp_path)) as writer:
            log_pair(writer, criterion, sr, gt, 7, images=2)
        assert torch.equal(torch.get_rng_state(), state)  # the training goes on as without logs
    events = read(tmp_path)
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    energies = {f"mghf/energy/level{level}_{name}" for level in (1, 2, 3) for name in ("sr", "gt")}
    assert set(scalars) == {"mghf/loss", *(f"mghf/term/{name}" for name in TERMS), *energies}
    assert {event.step for events in scalars.values() for event in events} == {7}
    generator = torch.Generator().manual_seed(7)
    loss, terms = criterion(sr, gt, return_terms=True, generator=generator)
    assert scalars["mghf/loss"][0].value == pytest.approx(loss.mean().item(), rel=1e-6)
    assert scalars["mghf/term/style"][0].value == pytest.approx(terms["style"].mean().item(), rel=1e-6)
    features = criterion.inn.network.features(2 * gt / 255 - 1)
    assert scalars["mghf/energy/level1_gt"][0].value == pytest.approx(features[0].square().mean().item(), rel=1e-5)
    assert scalars["mghf/energy/level1_sr"][0].value < 0.5 * scalars["mghf/energy/level1_gt"][0].value
    pictures = {"mghf/sr", "mghf/gt", *(f"mghf/heatmap/{name}" for name in [*TERMS, "total"])}
    assert set(events.Tags()["images"]) == pictures
    for name, image in (("sr", sr), ("gt", gt)):
        assert (picture(events, f"mghf/{name}") - image[:2].permute(0, 2, 3, 1)).abs().max() <= 1
    for name, heat in criterion.heatmap(sr[:2], gt[:2], generator=generator).items():
        shown = picture(events, f"mghf/heatmap/{name}")
        heat = heat / heat.flatten().sort().values[round(0.99 * heat.numel()) - 1]
        expected = 255 * torch.stack([3 * heat, 3 * heat - 1, 3 * heat - 2], dim=-1).clamp(0, 1)
        assert (shown - expected).abs().max() <= 2, name
        assert (shown.sum(-1) == 3 * 255).any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["MGHFnLoss", "DinoJSDLoss"])
def test_log_pair_takes_the_other_losses(tmp_path, tiny_dino, name):
    criterion = MGHFnLoss() if name == "MGHFnLoss" else DinoJSDLoss(tiny_dino)
    with SummaryWriter(str(tmp_path)) as writer:
        log_pair(writer, criterion, *pair(), 1, tag="val", images=1)
    tags, term = read(tmp_path).Tags(), "content" if name == "MGHFnLoss" else "dino_jsd"
    assert {tag for tag in tags["scalars"] if "energy" not in tag} == {"val/loss", f"val/term/{term}"}
    assert len(tags["scalars"]) == 2 + 6 * (name == "MGHFnLoss")
    assert set(tags["images"]) == {"val/sr", "val/gt", f"val/heatmap/{term}", "val/heatmap/total"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_log_pair_without_pictures_and_without_the_network(tmp_path, tiny_dino):
    criterion = MGHFLoss(coefficients=OFF | {"dino_jsd": 1.0}, dino=tiny_dino)
    with SummaryWriter(str(tmp_path)) as writer:
        log_pair(writer, criterion, *pair(), 1, tag="val", images=0)
    events = read(tmp_path)
    assert events.Tags()["images"] == []
    assert set(events.Tags()["scalars"]) == {"val/loss", "val/term/dino_jsd"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_log_pair_takes_a_compiled_loss_and_a_gt_that_requires_a_gradient(tmp_path):
    """As with the penalty on a critic's gradient at GT."""
    sr, gt = pair()
    criterion = torch.compile(MGHFnLoss(), backend="eager")
    with SummaryWriter(str(tmp_path)) as writer:
        log_pair(writer, criterion, sr.detach(), gt.requires_grad_(), 1)
    assert len(read(tmp_path).Images("mghf/heatmap/total")) == 1


def test_log_pair_refuses_what_has_no_terms():
    with pytest.raises(TypeError, match="criterion must be a loss of this package, got L1Loss"):
        log_pair(None, torch.nn.L1Loss(), *pair(), 1)
    with pytest.raises(ValueError, match="images must be at least 0, got -1"):
        log_pair(None, MGHFLoss(), *pair(), 1, images=-1)
