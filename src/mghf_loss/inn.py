"""The invertible network: image <-> multi-granular high-frequency features; a level's modules are in coupling.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import HaarDownsampling
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import _checks, _files, checkpoints
from .coupling import AffineCoupling, ChannelMixing, frozen_coupling
from .ops.convolution import convolution
from .ops.linear import linear_level

Variant = Literal["pyramid", "packet"]
Mixing = Literal["learned", "fixed"]


@dataclass(frozen=True)
class INNConfig:
    """Architecture of a `HighFrequencyINN` and the noise it was trained with.

    Args:
        variant: what the next level decomposes: `"pyramid"` the low-pass band alone (9 detail channels a
            level), `"packet"` the low-pass band and every detail (9, 45, 189, ... channels).
        levels: number of Haar levels L; features have strides 2, 4, ..., 2^L.
        couplings: affine coupling modules per level (the paper's K is levels * couplings).
        hidden: width of the bottleneck blocks phi, rho, eta.
        clamp: bound of the log-scale of a coupling, |log s| < clamp.
        mixing: the channel rotation before each coupling is `"learned"` (any invertible matrix) or `"fixed"`.
        noise_floor: standard deviation, in 1/255, of the Gaussian noise on the training images: about the
            smallest difference that counts.
    """

    variant: Variant = "pyramid"
    levels: int = 3
    couplings: int = 2
    hidden: int = 32
    clamp: float = 2.0
    mixing: Mixing = "learned"
    noise_floor: float = 12.0

    def __post_init__(self) -> None:
        _checks.one_of("variant", self.variant, Variant)
        _checks.one_of("mixing", self.mixing, Mixing)
        # Bounds far from any use, so that a damaged or hostile configuration is refused before anything is built:
        # packets have 3 * 4^levels channels, and exp(80) is about the largest float32.
        for name, most in (("levels", 12 if self.variant == "pyramid" else 5), ("couplings", 16), ("hidden", 2**14)):
            object.__setattr__(self, name, _checks.integer(name, getattr(self, name), least=1, most=most))
        object.__setattr__(self, "clamp", _checks.number("clamp", self.clamp, least=1e-3, below=80.0))
        object.__setattr__(self, "noise_floor", _checks.number("noise_floor", self.noise_floor))


class Latent(NamedTuple):
    """What an image becomes; `HighFrequencyINN.inverse` turns it back.

    Attributes:
        features: detail features of every level, fine to coarse, (B, C_l, ceil(H/2^l), ceil(W/2^l)).
        low_pass: the low-pass band below the last level, (B, 3, ceil(H/2^L), ceil(W/2^L)).
        size: (H, W) of the image, to undo the padding.
        log_det_jac: log|det| of each level's map, in nats, (B, L), or None where it was not asked for.
    """

    features: list[Tensor]
    low_pass: Tensor
    size: tuple[int, int]
    log_det_jac: Tensor | None


class Conditioning(NamedTuple):
    """What a ground truth contributes to GT-conditioned features; see `HighFrequencyINN.conditioning`.

    Attributes:
        features: detail features of GT by level, (B, C_l, h_l, w_l).
        scales: by level and coupling, the scale s of the first n1 channels, (B, n1, h_l, w_l); constants, without
            gradient, where the network is frozen.
    """

    features: list[Tensor]
    scales: list[list[Tensor]]


class Level(nn.Module):
    """One Haar step, then mixing and coupling modules on the details: (B, C, h, w) -> details and low-pass.

    The first three channels of the input are the image's low-pass band; so are the three of the low-pass
    output. All other 4C - 3 channels are details.
    """

    def __init__(self, in_channels: int, depth: int, config: INNConfig) -> None:
        super().__init__()
        details = 4 * in_channels - 3
        self.haar = HaarDownsampling([(in_channels, 2, 2)])
        # NumPy's numbers, which torch.compile would guard and then fail on in inference mode.
        self.haar.jac_fwd, self.haar.jac_rev = float(self.haar.jac_fwd), float(self.haar.jac_rev)
        self.flow = SequenceINN(details, 1, 1)
        for k in range(config.couplings):
            # The raw details of photographs in [-1, 1] have a standard deviation of about 1/8; later packet
            # levels get details that are white already.
            gain = 8.0 if k == 0 and in_channels == 3 else 1.0
            self.flow.append(ChannelMixing, learned=config.mixing == "learned", gain=gain)
            self.flow.append(AffineCoupling, cond=0, cond_shape=(3, 1, 1), hidden=config.hidden, clamp=config.clamp)
        # The orthonormal Haar low-pass doubles with each level; the condition stays in the image's range.
        self.condition_scale = 0.5**depth

    def forward(self, x: Tensor, log_det_jac: bool, recompute: bool = False) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return details (B, 4C - 3, h/2, w/2), low-pass (B, 3, h/2, w/2) and log|det| (Haar's is 0).

        With `recompute`, which leaves no log|det|, autograd keeps what enters each coupling and nothing inside it.
        """
        if not recompute:
            details, low = self._split(x)
            if log_det_jac:
                details, log_det = self.flow(details, c=[low * self.condition_scale])
                return details, low, log_det
            for k in range(len(self.flow) // 2):
                details = self._step(k, details, low)
            return details, low, 0.0
        # Step by step: recomputing a level or the whole network at once would keep somewhat less between the passes,
        # but the backward pass, where memory is scarcest, would then hold as much as without.
        details, low = self._checkpoint(self._first_step, x)
        for k in range(1, len(self.flow) // 2):
            details = self._checkpoint(self._step, k, details, low)
        return details, low, 0.0

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._takes_linear_level(x):
            return linear_level(x)
        # FrEIA's module, which on CUDA may run in tf32, as one convolution.
        bands = convolution(x, self.haar.haar_weights, stride=2, groups=x.shape[1]) * self.haar.fac_fwd
        bands = bands.unflatten(1, (-1, 4))
        return torch.cat((bands[:, 3:, 0], bands[:, :, 1:].flatten(1, 2)), dim=1), bands[:, :3, 0]

    def _takes_linear_level(self, x: Tensor, constants: Iterable[Tensor] = ()) -> bool:
        """Whether `linear_level` maps `x`: three channels, and mixings and scales that are constant."""
        matrices = [mixing.matrix for mixing, _ in self._pairs()]
        return x.shape[1] == 3 and not any(constant.requires_grad for constant in (*matrices, *constants))

    def _first_step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        details, low = self._split(x)
        # Kept for the next level: a copy, for the view would keep all bands.
        return self._step(0, details, low), low.contiguous()

    def _step(self, k: int, details: Tensor, low: Tensor) -> Tensor:
        """Mixing and coupling number k."""
        (mixing, coupling), condition = self._pairs()[k], low * self.condition_scale
        found = frozen_coupling(mixing, coupling, details, condition)
        if found is None:
            found = coupling.transform(mixing.transform(details), condition)
        return found[0]

    # Nothing random is in there whose state would have to be kept.
    _checkpoint = staticmethod(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))

    def conditioning(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return details and low-pass as `forward` does, and the scale of every coupling."""
        details, low = self._split(x)
        condition, scales = low * self.condition_scale, []
        for mixing, coupling in self._pairs():
            found = frozen_coupling(mixing, coupling, details, condition)
            if found is None:
                details, log_scale = coupling.transform(mixing.transform(details), condition)
                found = details, log_scale.exp()
            details, scale = found
            scales.append(scale)
        return details, low, scales

    def linear(self, x: Tensor, scales: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Map a difference of two inputs to that of their details and low-pass, with given scales and no shifts."""
        if self._takes_linear_level(x, scales):
            return linear_level(x, [mixing.matrix for mixing, _ in self._pairs()], scales)
        details, low = self._split(x)
        for (mixing, coupling), scale in zip(self._pairs(), scales, strict=True):
            first, second = mixing.transform(details).split(coupling.split, dim=1)
            details = torch.cat((first * scale, second), dim=1)
        return details, low

    def _pairs(self) -> list[tuple[ChannelMixing, AffineCoupling]]:
        modules: Any = list(self.flow)
        return list(zip(modules[::2], modules[1::2], strict=True))

    def inverse(self, details: Tensor, low: Tensor) -> Tensor:
        """Undo `forward`."""
        details, _ = self.flow(details, c=[low * self.condition_scale], rev=True, jac=False)
        channels = (details.shape[1] + 3) // 4
        smooth, rest = details.split((channels - 3, 3 * channels), dim=1)
        smooth = torch.cat((low, smooth), dim=1)
        bands = torch.cat((smooth[:, :, None], rest.unflatten(1, (channels, 3))), dim=2)
        bands = bands.flatten(1, 2) * self.haar.fac_rev
        return convolution(bands, self.haar.haar_weights, stride=2, groups=channels, transposed=True)


class HighFrequencyINN(
    nn.Module,
    ModelHubMixin,
    library_name="mghf-loss",
    paper_url="https://arxiv.org/abs/2411.13548",
    license="apache-2.0",
    tags=["super-resolution", "perceptual-loss", "invertible-neural-network"],
):
    """Turn an image into whitened high-frequency features and back: (B, 3, H, W) in [-1, 1] <-> `Latent`.

    >>> inn = HighFrequencyINN.from_pretrained("bundled")
    >>> image = torch.rand(1, 3, 64, 64) * 2 - 1
    >>> [list(level.shape) for level in inn.features(image)]
    [[1, 9, 32, 32], [1, 9, 16, 16], [1, 9, 8, 8]]
    >>> (inn.inverse(inn(image)) - image).abs().max() < 1e-4
    tensor(True)

    Every level is a Haar step and `couplings` affine coupling modules. Details are trained to be standard
    normal given the low-pass band (our choice), so that a feature difference of 1 is one standard deviation
    of what the coarse image leaves open. Any H, W of at least 2^levels: images are padded by reflection at
    the bottom and right to a multiple of 2^levels.

    Reference: arXiv 2411.13548 (MGHF), detail feature extraction by invertible modules; the end-to-end
    Haar pyramid and maximum-likelihood training are ours.
    """

    def __init__(self, config: INNConfig | None = None) -> None:
        super().__init__()
        self.config = config = INNConfig() if config is None else config
        self.levels = nn.ModuleList(
            Level(3 if config.variant == "pyramid" else 3 * 4**depth, depth + 1, config)
            for depth in range(config.levels)
        )

    @property
    def stride(self) -> int:
        """2^levels: the least height and width, and what images are padded to a multiple of."""
        return 2**self.config.levels

    def forward(self, image: Tensor, *, log_det_jac: bool = True, recompute: bool = False) -> Latent:
        """Map (B, 3, H, W) in [-1, 1] to a `Latent`; without log-determinants where they are not needed.

        `recompute` trades time for memory, see `features`; there are no log-determinants then.
        """
        if log_det_jac and recompute:
            raise ValueError("recompute=True needs log_det_jac=False: log-determinants are not recomputed")
        _checks.image("image", image, least_size=self.stride)
        per_level = self._descend(image, lambda level, x, _: level(x, log_det_jac, recompute))
        features = [details for details, _, _ in per_level]
        log_dets = torch.stack([log_det for _, _, log_det in per_level], dim=1) if log_det_jac else None
        height, width = image.shape[-2:]
        return Latent(features, per_level[-1][1], (height, width), log_dets)

    def inverse(self, latent: Latent) -> Tensor:
        """Map a `Latent` back to the image (B, 3, H, W); for a packet only the last level's features count."""
        low = latent.low_pass
        details = latent.features[-1]
        with torch.autocast(low.device.type, enabled=False):
            for depth in reversed(range(len(self.levels))):
                level = self.levels[depth]
                assert isinstance(level, Level)
                x = level.inverse(details, low)
                low = x[:, :3]
                details = latent.features[depth - 1] if self.config.variant == "pyramid" else x[:, 3:]
        height, width = latent.size
        return low[..., :height, :width]

    def features(self, image: Tensor, *, recompute: bool = False) -> list[Tensor]:
        """Detail features of (B, 3, H, W) in [-1, 1], fine to coarse, without log-determinants.

        With `recompute`, the backward pass computes each coupling again instead of keeping what is inside it.
        """
        return self.forward(image, log_det_jac=False, recompute=recompute).features

    def conditioning(self, gt: Tensor) -> Conditioning:
        """Features of GT, (B, 3, H, W) in [-1, 1], and the scales with which `difference` compares an image with it."""
        _checks.image("gt", gt, least_size=self.stride)
        per_level = self._descend(gt, lambda level, x, _: level.conditioning(x))
        return Conditioning([details for details, _, _ in per_level], [scales for _, _, scales in per_level])

    def difference(self, difference: Tensor, scales: list[list[Tensor]]) -> list[Tensor]:
        """Map sr - gt, (B, 3, H, W) in units of [-1, 1], to GT-conditioned feature differences, fine to coarse.

        >>> inn = HighFrequencyINN.from_pretrained("bundled")
        >>> sr, gt = torch.rand(2, 1, 3, 64, 64) * 2 - 1
        >>> features, scales = inn.conditioning(gt)
        >>> sr_features = [f + d for f, d in zip(features, inn.difference(sr - gt, scales))]

        A coupling maps (z1, z2) to (s z1 + eta, z2 + phi), where s, eta and phi depend on z1, z2 and the low-pass
        band. With those of GT for both images, shifts cancel in the difference of the two, and what is left is linear.
        For each mixing W and coupling, from d = details of sr - gt:

            d <- W d;   d1 <- s_gt d1;   d2 <- d2

        Every step is invertible (det W and s are not 0), so the differences and the low-pass band of sr - gt are all 0
        only at sr = gt, and a sum of squares of the differences is a convex quadratic form in sr.

        Reference: ours. Masking by the target alone is that of Watson, "DCT quantization matrices visually optimized
        for individual images", 1993.
        """
        _checks.image("difference", difference, least_size=self.stride)
        per_level = self._descend(difference, lambda level, x, depth: level.linear(x, scales[depth]))
        return [details for details, _ in per_level]

    def _descend(self, image: Tensor, step: Callable[[Level, Tensor, int], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Apply `step` -> (details, low-pass, ...) to every level, each of which gets what the one before leaves."""
        x, per_level = pad_to_multiple(image, self.stride), []
        with torch.autocast(image.device.type, enabled=False):  # half precision would not invert
            for depth, level in enumerate(self.levels):
                found = step(cast(Level, level), x, depth)
                per_level.append(found)
                details, low = found[:2]
                x = low if self.config.variant == "pyramid" else torch.cat((low, details), dim=1)
        return per_level

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: str | Path = "bundled", **hub_options: Any
    ) -> HighFrequencyINN:
        """Load `"bundled"`, `"org/name"` or `"org/name@revision"` from the Hub, a folder or a file, in eval mode.

        `"bundled-0.1"` is the network of that release, which no later one changes.
        `hub_options` (`revision`, `cache_dir`, `token`, `local_files_only`, `force_download`) go to
        `huggingface_hub.hf_hub_download`. Raises `CheckpointError` where the checkpoint cannot be loaded, is
        damaged or is not of this network.
        """
        checkpoint = checkpoints.load(pretrained_model_name_or_path, **hub_options)
        known = {field.name for field in fields(INNConfig)}
        try:
            if set(checkpoint.config) != known:
                raise ValueError(f"its configuration has the fields {sorted(checkpoint.config)}, not {sorted(known)}")
            # Without values nothing is drawn, and sizes cost nothing until they are known to be right.
            with torch.inference_mode(False), torch.device("meta"):
                network = cls(INNConfig(**checkpoint.config))
            network._take(checkpoint.state_dict)
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            raise checkpoints.CheckpointError(
                f"{checkpoint.source} is no HighFrequencyINN of its configuration {checkpoint.config}: {error}"
            ) from error
        return network.eval()

    @torch.inference_mode(False)
    def _take(self, state_dict: dict[str, Tensor]) -> None:
        """Make `state_dict` the parameters, in float32 on the CPU, of a network that may have none yet."""
        shapes = {name: list(value.shape) for name, value in state_dict.items()}
        expected = {name: list(parameter.shape) for name, parameter in self.named_parameters()}
        if shapes != expected:
            wrong = sorted(name for name in shapes.keys() | expected if shapes.get(name) != expected.get(name))
            what = ", ".join(f"{name} is {shapes.get(name)}, not {expected.get(name)}" for name in wrong[:3])
            raise ValueError(f"{len(wrong)} tensors are missing, unknown or of another shape: {what}")
        for prefix, module in self.named_modules():
            for name, parameter in module._parameters.items():
                assert parameter is not None
                value = state_dict[f"{prefix}.{name}"].to(torch.float32, copy=True)
                if not value.isfinite().all():
                    raise ValueError(f"{prefix}.{name} is not finite")
                # Not registered: accelerate.init_empty_weights() empties what is.
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | Path,
        *,
        config: INNConfig | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_options: Any,
    ) -> str | None:
        """Write `model.safetensors`, `config.json` and, where there is none, a model card; see `ModelHubMixin`.

        Every file is written whole or not at all, unlike by the mixin, which deletes the old configuration
        first. `config` is always the network's own; `push_to_hub` passes it.
        """
        folder = Path(save_directory)
        checkpoints.save(folder, asdict(config or self.config), self.state_dict())
        card = folder / "README.md"
        if not card.exists():
            _files.write_atomically(card, self.generate_model_card(**(model_card_kwargs or {})).save)
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_options)
        return None


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) by reflection at the bottom and right to H, W multiples of `multiple`."""
    # Written without a negative dividend, which torch.compile cannot follow where sizes are symbolic. By slices: the
    # gradient of F.pad's reflection adds in any order on CUDA.
    for dim in (-2, -1):
        size = image.shape[dim]
        missing = (multiple - size % multiple) % multiple
        if missing:
            image = torch.cat((image, image.narrow(dim, size - 1 - missing, missing).flip(dim)), dim)
    return image
