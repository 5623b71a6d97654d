"""Jensen-Shannon divergence between SR and GT in the embedding space of a frozen DINOv2."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks, terms
from ._gt_cache import GTCache
from .checkpoints import CheckpointError, check_revision, download_command, download_failure
from .criterion import Criterion, Memory, rescale
from .frozen import Frozen

Tokens = Literal["class", "patch"]
DEFAULT_MODEL = "vit_small_patch14_dinov2.lvd142m"


class DinoJSDLoss(Criterion):
    """Compare what SR and GT show by the Jensen-Shannon divergence of their DINOv2 embeddings.

    sr, gt (B, 3, H, W) -> 0-d tensor in nats, [0, ln 2], symmetric in value; gradient flows to `sr` only. Images of any
    size are resized (bicubic, antialiased, differentiable) to the nearest multiple of the patch size.

    >>> import timm
    >>> # DinoJSDLoss() fetches DINOv2
    >>> vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True)
    >>> criterion = DinoJSDLoss(vit)
    >>> criterion(*torch.rand(2, 1, 3, 64, 64)) >= 0
    tensor(True)

    Args:
        model: name of a timm DINOv2 ViT, whose weights are fetched from the Hub when the loss is built;
            `"hf-hub:org/name@revision"` pins a revision; or a ready timm ViT, for weights of your own, which is
            taken over: frozen and set to eval mode.
        tokens: `"class"` compares the class token's embedding, `"patch"` every patch token's.
        temperature: T, in units of the embedding.
        input_range: values of black and white.
        reduction: `"mean"`, `"sum"` or `"none"` (per image).
        memory: `"low"` computes every transformer block again in the backward pass (timm's gradient checkpointing)
            instead of keeping what is inside it.
        cache_gt: keep the embedding of the last GT between calls; see `mghf_loss._gt_cache.GTCache`.

    Raises:
        ValueError: an argument is not as above, or timm has no such model.
        CheckpointError: the weights cannot be loaded; the message names the places that were searched.

    The loss is JSD(p_sr || p_gt) with p = softmax(e / T) over the dimensions of the embedding e, averaged over patches
    with `tokens="patch"`; 0 iff the distributions are equal.

    Reference: HF-Diff, arXiv 2411.13548v1, distribution matching in DINOv2's embedding space; softmax over
    the embedding dimension, temperature 1 and the choice of tokens are ours.
    """

    def __init__(
        self,
        model: str | nn.Module = DEFAULT_MODEL,
        *,
        tokens: Tokens = "class",
        temperature: float = 1.0,
        input_range: tuple[float, float] = (0.0, 1.0),
        reduction: terms.Reduction = "mean",
        memory: Memory = "normal",
        cache_gt: bool = False,
    ) -> None:
        super().__init__({"dino_jsd": 1.0}, input_range, reduction)
        self.tokens: Tokens = _checks.one_of("tokens", tokens, Tokens)
        self.temperature = _checks.number("temperature", temperature, above=True)
        _checks.one_of("memory", memory, Memory)
        self.gt_embedding: GTCache[Tensor] = GTCache(cache_gt)
        with _ordinary_construction():
            network = _load_dino(model) if isinstance(model, str) else model
            if memory == "low":  # otherwise a ready model's own setting stays
                network.set_grad_checkpointing()  # type: ignore[operator]
            self.network = Frozen(TokenEmbedding(network, tokens))

    def _terms(self, sr: Tensor, gt: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        gt_embedding = self.gt_embedding.get(gt, self.embed, *self.network.identity(), self.input_range)
        divergence = jensen_shannon(self.embed(sr) / self.temperature, gt_embedding / self.temperature)
        return {"dino_jsd": divergence.mean(1)}

    def embed(self, image: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) in `input_range` as (B, tokens, D), in float32 at least."""
        embedding = self.network.network(rescale(self.network.like(image), self.input_range, (0.0, 1.0)))
        return embedding.to(torch.promote_types(embedding.dtype, torch.float32))


class TokenEmbedding(nn.Module):
    """A timm ViT from (B, 3, H, W) in [0, 1], of any size, to the embeddings of its class or patch tokens (B, n, D)."""

    def __init__(self, vit: nn.Module, tokens: Tokens) -> None:
        super().__init__()
        try:
            self.patch_size: tuple[int, int] = tuple(vit.patch_embed.patch_size)  # type: ignore[assignment]
            normalisation = [vit.pretrained_cfg[name] for name in ("mean", "std")]  # type: ignore[index]
            prefix: int = vit.num_prefix_tokens  # type: ignore[assignment]
            has_class_token = vit.cls_token is not None
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"model must be a timm vision transformer, got {vit!r:.200}") from error
        if tokens == "class" and not has_class_token:
            raise ValueError('the model has no class token: use tokens="patch", or another model')
        if not (getattr(vit, "dynamic_img_size", False) or getattr(vit.patch_embed, "dynamic_img_pad", False)):
            raise ValueError(
                "the model takes images of one size alone: build it with timm.create_model(..., dynamic_img_size=True)"
            )
        self.vit = vit
        self.tokens = slice(1) if tokens == "class" else slice(prefix, None)
        mean, std = next(vit.parameters()).new_tensor(normalisation).reshape(2, 1, 3, 1, 1)
        self.mean, self.std = nn.Buffer(mean, persistent=False), nn.Buffer(std, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Resize to the nearest multiple of the patch size, normalise, and embed."""
        sides = image.shape[-2:]
        size = [max(1, round(side / patch)) * patch for side, patch in zip(sides, self.patch_size, strict=True)]
        if size != list(sides):
            image = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
        return self.vit.forward_features((image - self.mean) / self.std)[:, self.tokens]  # type: ignore[operator]


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """JSD(softmax(a) || softmax(b)) over the last dimension, (..., D) -> nats (...) in [0, ln 2].

    With m = (p + q) / 2 and t = (p - q) / (p + q), JSD = 1/2 sum m phi(t), phi(t) = (1 + t) ln(1 + t) +
    (1 - t) ln(1 - t): every summand is >= 0, so nothing cancels when p is close to q, and t and the
    logarithms come from log p - log q, so nothing is lost when either is close to 0.
    """
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_ratio = log_p - log_q
    t = torch.tanh(0.5 * log_ratio)
    square = t.square()
    series = square * (1 + square * (1 / 6 + square * (1 / 15 + square * (1 / 28 + square / 45))))
    ln2 = math.log(2)
    exact = (1 + t) * (ln2 - F.softplus(-log_ratio)) + (1 - t) * (ln2 - F.softplus(log_ratio))
    phi = torch.where(square < 0.04, series, exact)
    return 0.25 * ((p + q) * phi).sum(-1)


@contextmanager
def _ordinary_construction() -> Iterator[None]:
    """Build in float32 on the CPU, for gradients and without random draws, whatever the program has set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _load_dino(name: str) -> nn.Module:
    import safetensors
    import timm

    if name.startswith("hf-hub:"):
        repo, _, revision = name.removeprefix("hf-hub:").partition("@")
        check_revision(revision)
    elif timm.is_model_pretrained(name):
        repo, revision = str(getattr(timm.get_pretrained_cfg(name), "hf_hub_id", f"timm/{name}")), None
    else:
        close = difflib.get_close_matches(name, timm.list_models("*dinov2*", pretrained=True), n=3)
        raise ValueError(f"timm has no model {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
    # The file is named because without a name timm falls back to pickled weights where there are no others.
    overlay = {"hf_hub_filename": "model.safetensors"}
    try:
        return timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, dynamic_img_size=True
        )
    except TypeError as error:  # an architecture that knows no dynamic_img_size
        raise ValueError(f"model must be a timm vision transformer, got {name!r}: {error}") from error
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"the weights of {name!r} are damaged or of another network: {error}\n"
            f"If the file in the cache is damaged: `{download_command(repo, revision)} --force-download`"
        ) from error
    except Exception as error:  # the Hub client's errors have no common base over its versions
        raise CheckpointError(download_failure(repo, "model.safetensors", revision, error)) from error
