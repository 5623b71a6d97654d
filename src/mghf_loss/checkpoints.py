"""Where trained parameters come from and go to: bundled, a Hub repository, a folder or a file.

A checkpoint is a folder with `model.safetensors` and `config.json`; the latter holds the configuration and the
sha256 of the former. Nothing else is read, pickles least of all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ._files import write_atomically

BUNDLED = Path(__file__).parent / "weights"
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
HUB_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be had, is damaged, or belongs to another network."""


@dataclass(frozen=True)
class Checkpoint:
    """Configuration and parameters, with where they came from and the sha256 of the parameter file."""

    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    source: str
    sha256: str


def load(name: str | Path, *, revision: str | None = None, **hub_options: Any) -> Checkpoint:
    """Load `"bundled"`, `"org/name"` or `"org/name@revision"` on the Hub, a local folder or a .safetensors file.

    The parameter file's sha256 must be the one in `config.json` (where it stands there). Hub downloads go
    through `huggingface_hub`: cache, file lock, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_TOKEN` are honoured.

    Raises:
        CheckpointError: naming what could not be found, fetched or trusted, and the remedy.
    """
    config_path, model_path = _locate(name, revision, hub_options)
    source = f"checkpoint {str(name)!r} ({model_path})"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: cannot read its {CONFIG_FILE}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}: {CONFIG_FILE} must hold an object, got {type(config).__name__}")
    try:
        data = model_path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{source}: cannot read its parameters: {error}") from error
    sha256 = hashlib.sha256(data).hexdigest()
    expected = config.pop("sha256", sha256)
    if sha256 != expected:
        raise CheckpointError(
            f"{source}: sha256 is {sha256}, but {config_path} says {expected}; "
            "the file is truncated or was changed: copy it again, or download it again (force_download=True)"
        )
    import safetensors
    import safetensors.torch

    try:
        state_dict = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{source}: no readable safetensors file: {error}") from error
    return Checkpoint(config, state_dict, source, sha256)


def save(folder: str | Path, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` and `config.json` into `folder`, each whole or not at all."""
    import safetensors.torch

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()})
    text = json.dumps({**config, "sha256": hashlib.sha256(data).hexdigest()}, indent=2) + "\n"

    def write_config_then_parameters(path: Path) -> None:
        path.write_text(text, encoding="utf-8")
        write_atomically(folder / MODEL_FILE, lambda path: path.write_bytes(data))

    # Both are on the disk before either is moved: a full disk leaves the old pair, not half of each.
    write_atomically(folder / CONFIG_FILE, write_config_then_parameters)


def _locate(name: str | Path, revision: str | None, hub_options: dict[str, Any]) -> tuple[Path, Path]:
    """Return the paths of config and parameters, downloading them where they are on the Hub."""
    if name == "bundled":
        return BUNDLED / CONFIG_FILE, BUNDLED / MODEL_FILE
    path = Path(name).expanduser()
    if path.is_dir():
        return path / CONFIG_FILE, path / MODEL_FILE
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"checkpoint {str(name)!r} is no .safetensors file; other formats (pickles) are never loaded"
            )
        return path.parent / CONFIG_FILE, path
    hub_name = HUB_NAME.fullmatch(name) if isinstance(name, str) and path.suffix != ".safetensors" else None
    if hub_name is None:
        raise CheckpointError(
            f"unknown checkpoint {str(name)!r}: expected 'bundled', 'org/name' or 'org/name@revision' on the Hub, "
            "or an existing folder or .safetensors file"
        )
    if revision and hub_name["revision"] and revision != hub_name["revision"]:
        raise CheckpointError(f"checkpoint {name!r} names a revision, but revision={revision!r} was asked for")
    revision = revision or hub_name["revision"]
    return _download(hub_name["repo"], CONFIG_FILE, revision, hub_options), _download(
        hub_name["repo"], MODEL_FILE, revision, hub_options
    )


def _download(repo: str, file: str, revision: str | None, hub_options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision, **hub_options))
    except TypeError:  # an option that the client does not know
        raise
    except Exception as error:  # the client library's errors have no common base over its versions
        message = download_failure(repo, file, revision, error, hub_options.get("cache_dir"))
        raise CheckpointError(f"there is no local file or folder {repo!r}, and {message}") from error


def download_failure(
    repo: str, file: str, revision: str | None, error: Exception, cache: str | Path | None = None
) -> str:
    """Say which file of which repository could not be had, where it was looked for and what to do."""
    from huggingface_hub import constants

    pin = f" --revision {revision}" if revision else ""
    return (
        f"cannot get {file} of {repo} (revision {revision or 'main'}) from {constants.ENDPOINT}, and it is not in "
        f"the cache {cache or constants.HF_HUB_CACHE}: {type(error).__name__}: {error}\n"
        f"Offline: on a machine with access run `hf download {repo}{pin}`, copy the cache folder here (HF_HOME says "
        "where it is looked for) and set HF_HUB_OFFLINE=1."
    )
