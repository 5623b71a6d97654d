"""Results on disk: one JSON file a run, named by its identity, written whole or not at all, claimed by a lock."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mghf_loss._files import write_atomically


def slug(name: str) -> str:
    """`name` as part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name)


def open_folder(folder: Path, protocol: dict[str, Any]) -> None:
    """Begin, or go on; raise where the folder holds results of another protocol."""
    path = folder / "protocol.json"
    if not path.exists():
        write_json(path, protocol)
    check_protocol(folder, protocol)


def check_protocol(folder: Path, protocol: dict[str, Any], is_part: bool = False) -> None:
    """Raise where a folder holds results of another protocol; `is_part` of one may be given."""
    stored, now = read_json(folder / "protocol.json"), json.loads(json.dumps(protocol))
    keys = now if is_part else {*now, *stored}
    changed = sorted(key for key in keys if stored.get(key) != now.get(key))
    if changed:
        raise ValueError(f"{folder} holds results of another protocol (other {', '.join(changed)})")


def result_path(folder: Path, name: str, identity: dict[str, Any]) -> Path:
    """Where a result of this identity is, or will be."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"{slug(name)}-{digest}.json"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (expected an object, got {type(found).__name__}): remove it")
    return found


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process may make the result at `path`; another one that does is not waited for.

    A killed process leaves the claim: the system drops its lock.
    """
    lock = path.with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield not path.exists()
        finally:
            lock.unlink(missing_ok=True)
