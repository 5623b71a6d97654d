"""The configuration of a study: a TOML file, checked before anything is trained."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from . import losses, models, tasks
from .photographs import LEAST_SIDE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

L1 = "L1"
LEAST_RATIO, MOST_RATIO = 1 / 4, 64  # beyond, L1 adds little
LEAST = {"steps": 20, "round": 20, "crop": 32, "judge_side": LEAST_SIDE}  # of the protocol; else more than 0


@dataclass(frozen=True)
class Protocol:
    """How every model is trained.

    Args:
        steps: of fine-tuning with a loss.
        batch: crops a step.
        crop: side of a crop in pixels.
        learning_rate: largest one of fine-tuning; one-cycle schedule, Adam.
        base_learning_rate: of the L1 model, constant until its PSNR on the tuning photographs stops rising.
        round: steps of the L1 model between two looks at its PSNR.
        patience: rounds without a rise of `rise` dB, after which the learning rate falls to 0.
        rise: in dB.
        most_rounds: of the L1 model.
        clip: largest norm of a model's gradient.
        allowance: PSNR in dB that a chosen factor may cost against L1.
        judge_side: largest side of a judged photograph, of which the middle is taken.
    """

    steps: int = 500
    batch: int = 8
    crop: int = 96
    learning_rate: float = 5e-4
    base_learning_rate: float = 1e-3
    round: int = 1000
    patience: int = 2
    rise: float = 0.02
    most_rounds: int = 16
    clip: float = 0.2
    allowance: float = 0.3
    judge_side: int = 2048


@dataclass(frozen=True)
class LossSpec:
    """A loss; `ratios` are the first factors that are tried, in multiples of equal gradients; `factor` fixes it."""

    type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ratios: tuple[float, ...] = (4, 16)
    grow: float = 4
    factor: float | None = None


@dataclass(frozen=True)
class Track:
    """One table: a model and a task, trained with every loss and seed.

    Args:
        name: of the table.
        losses: names of the configuration's losses; L1 is always there.
        model: of `models.MODELS`.
        task: of `tasks.TASKS`.
        seeds: the first one chooses the factors.
        critic: weights of an adversarial loss. They are the axis then.
        factors_of: the track that chose the factors, if not this one; it must, beside a critic.
    """

    name: str
    losses: tuple[str, ...]
    model: str = "small-sr"
    task: str = "sr-bicubic"
    seeds: tuple[int, ...] = (0, 1, 2)
    critic: tuple[float, ...] = ()
    factors_of: str | None = None


@dataclass(frozen=True)
class Config:
    """A configuration file."""

    protocol: Protocol
    losses: Mapping[str, LossSpec]
    tracks: tuple[Track, ...]

    def track(self, name: str) -> Track:
        return next(track for track in self.tracks if track.name == name)


def read(path: Path, needs_tracks: bool = True) -> Config:
    """Read and check a configuration; raise ValueError naming what came and what was expected."""
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
        unknown = set(content) - {"protocol", "losses", "track"}
        if unknown or (needs_tracks and not content.get("track")):
            raise ValueError(f"expected the tables losses and track, and protocol, got {sorted(content)}")
        specs = content.get("losses", {}).items()
        config = Config(
            _section(Protocol, content.get("protocol", {}), "protocol"),
            {name: _section(LossSpec, loss, f"losses.{name!r}") for name, loss in specs},
            tuple(_section(Track, track, "track") for track in content.get("track", [])),
        )
        _check_protocol(config.protocol)
        _check_losses(config.losses)
        _check_tracks(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def _section(kind: type, content: Any, where: str) -> Any:
    known = {each.name for each in fields(kind)}
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a table, got {content!r}")
    if set(content) - known:
        raise ValueError(f"{where}: unknown keys {sorted(set(content) - known)}, known are {sorted(known)}")
    missing = {each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING}
    if missing - set(content):
        raise ValueError(f"{where} {content.get('name', '')}: missing keys {sorted(missing - set(content))}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})


def _number(name: str, value: Any, least: float, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number of at least {least:g}, got {value!r}")


def _numbers(name: str, values: Any, least: float, whole: bool = False) -> None:
    if not isinstance(values, tuple):
        raise ValueError(f"{name} must be a list of numbers, got {values!r}")
    for value in values:
        _number(name, value, least, whole)


def check_known(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}, known are {', '.join(known)}")


def _check_protocol(protocol: Protocol) -> None:
    for each in fields(Protocol):
        whole = each.type == "int"
        least = LEAST.get(each.name, 1 if whole else 1e-9)
        _number(f"protocol.{each.name}", getattr(protocol, each.name), least, whole)
    if protocol.crop % 8:
        raise ValueError(f"protocol.crop must be a multiple of 8, got {protocol.crop}")


def _check_tracks(config: Config) -> None:
    names = [track.name for track in config.tracks]
    for track in config.tracks:
        where = f"track {track.name!r}"
        if not isinstance(track.name, str) or not track.name:
            raise ValueError(f"{where}: name must be a word or more")
        if not isinstance(track.losses, tuple) or not track.losses or len(set(track.losses)) < len(track.losses):
            raise ValueError(f"{where}: losses must be a list of different names, got {track.losses!r}")
        if names.count(track.name) > 1:
            raise ValueError(f"{where} is there twice")
        for loss in track.losses:
            check_known(f"loss of {where}", loss, config.losses)
        check_known(f"model of {where}", track.model, models.MODELS)
        check_known(f"task of {where}", track.task, tasks.TASKS)
        if track.model in models.SR_ONLY and not tasks.is_sr(track.task):
            raise ValueError(f"{where}: model {track.model!r} is for SR tasks, got {track.task!r}")
        _numbers(f"{where}: seeds", track.seeds, 0, whole=True)
        if not track.seeds or len(set(track.seeds)) < len(track.seeds):
            raise ValueError(f"{where}: seeds must be different numbers, one at least, got {list(track.seeds)}")
        _numbers(f"{where}: critic", track.critic, 1e-9)
        if track.critic and track.factors_of is None:
            raise ValueError(f"{where}: critic needs factors_of, the track that chooses the factors")
        if track.factors_of is not None:
            check_known(f"factors_of of {where}", track.factors_of, names)
            source = config.track(track.factors_of)
            missing = set(track.losses) - set(source.losses)
            if missing or source.factors_of is not None:
                raise ValueError(f"{where}: {source.name!r} chooses no factors for {sorted(missing) or 'itself'}")


def _check_losses(specs: Mapping[str, LossSpec]) -> None:
    for name, loss in specs.items():
        if not isinstance(loss.type, str):
            raise ValueError(f"losses.{name!r}.type must be a name, got {loss.type!r}")
        if ":" not in loss.type:
            check_known(f"type of loss {name!r}", loss.type, losses.TYPES)
        if name == L1:
            raise ValueError(f"losses.{L1!r} is the pixel loss alone, which is always there")
        if not isinstance(loss.options, dict):
            raise ValueError(f"losses.{name!r}.options must be a table, got {loss.options!r}")
        _numbers(f"losses.{name!r}.ratios", loss.ratios, 1e-9)
        if len(loss.ratios) < 2 or min(loss.ratios) < LEAST_RATIO or max(loss.ratios) > MOST_RATIO:
            wanted = f"two numbers or more from {LEAST_RATIO:g} to {MOST_RATIO:g}"
            raise ValueError(f"losses.{name!r}.ratios must be {wanted}, got {loss.ratios!r}")
        _number(f"losses.{name!r}.grow", loss.grow, 1.1)
        if loss.factor is not None:
            _number(f"losses.{name!r}.factor", loss.factor, 0)
