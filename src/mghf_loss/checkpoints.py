"""Where trained parameters come from and go to: bundled, a Hub repository, a folder or a file.

A checkpoint is one file, `model.safetensors`: its metadata holds the configuration and the sha256 of configuration and
tensors, so that no reader sees parts of two saves. `config.json` beside it is a copy for people and the Hub. A file
without such metadata is read with its `config.json`, which holds the sha256 of the file. Pickles are never read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import write_atomically

BUNDLED = Path(__file__).parent / "weights"
# The default, and the network of a release by its own name, under which it stays when the default changes.
BUNDLED_NAMES = ("bundled", "bundled-0.1")
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
METADATA_KEY = "mghf_loss"
HUB_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>.+))?")
HTTP_REASONS = {
    401: "no such repository, or a private one: check the name, and set HF_TOKEN or run `hf auth login`",
    403: "access refused, the repository is private or gated: accept its terms on its page, and set HF_TOKEN",
    404: "no such repository, revision or file: check the name",
    429: "too many requests: wait, or log in with `hf auth login`",
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be loaded, is damaged, or belongs to another network."""


@dataclass(frozen=True)
class Checkpoint:
    """Configuration and parameters, with where they came from and the sha256 of the parameter file."""

    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    source: str
    sha256: str


def load(name: str | Path, *, revision: str | None = None, **hub_options: Any) -> Checkpoint:
    """Load one of `BUNDLED_NAMES`, `"org/name"` or `"org/name@revision"` on the Hub, a folder or a .safetensors file.

    The sha256 must be the one that was saved. Hub downloads go through `huggingface_hub`: cache, file lock,
    `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_TOKEN` are honoured. What is damaged in the cache is downloaded again.

    Raises:
        CheckpointError: naming what could not be found, fetched or trusted, and the remedy.
    """
    path = _local_file(name)
    if path is not None:
        return _read(path, name)
    repo, revision = _parse_hub_name(str(name), revision)
    path = _download(repo, revision, hub_options)
    try:
        return _read(path, name)
    except CheckpointError as damage:
        try:
            return _read(_download(repo, revision, {**hub_options, "force_download": True}), name)
        except CheckpointError as error:
            raise CheckpointError(
                f"{damage}\nDownloading it again did not help. If the cache is damaged, run where the Hub answers: "
                f"`{download_command(repo, revision)} --force-download`"
            ) from error


def _read(path: Path, name: str | Path) -> Checkpoint:
    import safetensors
    import safetensors.torch

    source = f"checkpoint {str(name)!r} ({path})"
    try:
        data = path.read_bytes()
        with torch.device("cpu"):
            state_dict = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (OSError, ValueError, KeyError, MemoryError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{source}: cannot read its parameters: {_describe(error)}") from error
    embedded = (header.get("__metadata__") or {}).get(METADATA_KEY)
    try:
        config = json.loads(embedded or path.with_name(CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{source}: cannot read its {CONFIG_FILE}: {_describe(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}: {CONFIG_FILE} must hold an object, got {type(config).__name__}")
    sha256 = hashlib.sha256(data).hexdigest()
    expected = config.pop("sha256", None)
    found = _digest(config, state_dict) if embedded else sha256
    if expected not in (None, found):
        raise CheckpointError(
            f"{source}: sha256 is {found}, but {'its metadata' if embedded else CONFIG_FILE} says {expected}; "
            "the file is truncated or was changed: copy it again"
        )
    return Checkpoint(config, state_dict, source, sha256)


def save(folder: str | Path, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` and the copy of its configuration into `folder`, whole or not at all."""
    import safetensors.torch

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    # One key: the order of several would differ from run to run.
    metadata = {METADATA_KEY: json.dumps({**config, "sha256": _digest(config, state_dict)})}
    data = safetensors.torch.save(state_dict, metadata)
    text = json.dumps({**config, "sha256": hashlib.sha256(data).hexdigest()}, indent=2) + "\n"

    def write_config_then_parameters(path: Path) -> None:
        path.write_text(text, encoding="utf-8")
        write_atomically(folder / MODEL_FILE, lambda path: path.write_bytes(data))

    # Both are on the disk before either is moved: a full disk leaves the old pair.
    write_atomically(folder / CONFIG_FILE, write_config_then_parameters)


def _digest(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> str:
    """Sha256 of configuration and tensors, whatever the layout of the file."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _local_file(name: str | Path) -> Path | None:
    """Return the parameter file of a name that is bundled, or on this machine."""
    if name in BUNDLED_NAMES:
        return BUNDLED / MODEL_FILE
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path / MODEL_FILE
        if not path.is_file():
            return None
    except (OSError, RuntimeError) as error:  # too long a name, a folder without permission, no such user
        raise CheckpointError(f"cannot look for checkpoint {str(name)!r}: {error}") from error
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"checkpoint {str(name)!r} is no .safetensors file; other formats (pickles) are never loaded"
        )
    return path


def _parse_hub_name(name: str, revision: str | None) -> tuple[str, str | None]:
    """Return repository and revision of a name on the Hub."""
    hub_name = None if name.endswith(".safetensors") else HUB_NAME.fullmatch(name)
    if hub_name is None:
        raise CheckpointError(
            f"unknown checkpoint {name!r}: expected 'bundled', 'org/name' or 'org/name@revision' on the Hub, "
            "or an existing folder or .safetensors file"
        )
    if revision and hub_name["revision"] and revision != hub_name["revision"]:
        raise CheckpointError(f"checkpoint {name!r} names a revision, but revision={revision!r} was asked for")
    return hub_name["repo"], check_revision(revision or hub_name["revision"])


def check_revision(revision: str | None) -> str | None:
    """Return a revision that names no folder outside the cache."""
    if revision and not re.fullmatch(r"\w(?!.*\.\.)[\w./+-]*", revision):
        raise CheckpointError(f"revision must be a branch, tag or commit without '..', got {revision!r}")
    return revision


def _download(repo: str, revision: str | None, hub_options: dict[str, Any]) -> Path:
    """Return the parameter file of a repository in the cache, its configuration beside it."""
    from huggingface_hub import hf_hub_download

    path, file = Path(), CONFIG_FILE
    try:
        for file in (CONFIG_FILE, MODEL_FILE):
            path = Path(hf_hub_download(repo, file, revision=revision, **hub_options))
    except TypeError:  # an option that the client does not know
        raise
    except Exception as error:  # the client library's errors have no common base over its versions
        message = download_failure(repo, file, revision, error, hub_options.get("cache_dir"))
        raise CheckpointError(f"there is no local file or folder {repo!r}, and {message}") from error
    return path


def download_failure(
    repo: str, file: str, revision: str | None, error: Exception, cache: str | Path | None = None
) -> str:
    """Say which file of which repository could not be had, why, where it was looked for and what to do."""
    from huggingface_hub import constants

    return (
        f"cannot get {file} of {repo} (revision {revision or 'main'}) from {constants.ENDPOINT}, and it is not in "
        f"the cache {cache or constants.HF_HUB_CACHE}: {_server_answer(error)}{_describe(error)}\n"
        f"Offline: on a machine with access run `{download_command(repo, revision)}`, copy the cache folder here "
        "(HF_HOME says where it is looked for) and set HF_HUB_OFFLINE=1."
    )


def _server_answer(error: BaseException | None) -> str:
    """What the server said, which the client may hide behind advice to check one's connection."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            reason = HTTP_REASONS.get(status, "the server failed: try again later" if status >= 500 else "refused")
            return f"HTTP {status}, {reason}. "
        if "Timeout" in type(error).__name__:
            return "the server does not answer: try again later. "
        error = error.__cause__ or error.__context__
    return ""


def download_command(repo: str, revision: str | None) -> str:
    """Return what downloads a repository on the command line."""
    return f"hf download {repo}" + (f" --revision {revision}" if revision else "")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
