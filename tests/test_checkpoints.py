"""Where networks come from: the Hub (one on the loopback), folders and files; what is refused and what it says."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from conftest import perturbed_inn
from hub import Client, Hub, closed_url, fingerprint, jsd
from mghf_loss import CheckpointError, DinoJSDLoss, HighFrequencyINN, INNConfig, checkpoints
from mghf_loss._files import write_atomically

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("checkpoints")]  # share a Hub

SMALL = {"levels": 1, "hidden": 4, "couplings": 1}
DINO = "vit_small_patch14_dinov2.lvd142m"
MODEL, CONFIG, PICKLE = "model.safetensors", "config.json", "pytorch_model.bin"


def small_inn(seed: int, **config: Any) -> HighFrequencyINN:
    torch.manual_seed(seed)
    return perturbed_inn(**{**SMALL, **config})


def files_of(network: HighFrequencyINN, folder: Path) -> dict[str, bytes]:
    network.save_pretrained(folder)
    return {file: (folder / file).read_bytes() for file in (CONFIG, MODEL)}


def without_metadata(network: HighFrequencyINN) -> dict[str, bytes]:
    """The files of a checkpoint whose configuration is in config.json alone, as they were written at first."""
    model = save_tensors(network.state_dict())
    return {CONFIG: json.dumps({**asdict(network.config), "sha256": sha256(model)}).encode(), MODEL: model}


def flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class MakesFolder:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def dino(name: str, **config: Any) -> torch.nn.Module:
    """Random weights, of a scale at which images matter: a new layer scale is almost 0."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **config).eval()
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if parameter_name.endswith(".gamma"):
                parameter.fill_(1)
    return network


# What the Hub answers for a repository, and what the message says.
FAILURES = {
    "org/gated": (403, "GatedRepo", r"HTTP 403, access refused.*gated.*HF_TOKEN"),
    "org/forbidden": (403, "", r"HTTP 403, access refused.*private"),
    "org/private": (401, "RepoNotFound", r"HTTP 401, no such repository, or a private one.*hf auth login"),
    "org/busy": (429, "", r"HTTP 429, too many requests: wait"),
    "org/broken": (500, "", r"HTTP 500, the server failed: try again later"),
    "org/stalled": (0, "", "the server does not answer: try again later"),
}

# The Hub. A process costs seconds, so one makes all requests of a kind and the tests look at their outcomes.


class Repositories(NamedTuple):
    """What the Hub holds and the right answers: features' fingerprints, divergences, and the pickles' marker."""

    files: dict[tuple[str, str], Mapping[str, bytes]]
    expected: dict[str, str]
    marker: Path


class Answers(NamedTuple):
    """The outcomes of a process's requests, the Hub they went to, and what a process at the same time loaded."""

    hub: Hub
    outcomes: dict[tuple[str, ...], dict[str, Any]]
    simultaneous: dict[tuple[str, ...], dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, str, Path]]:
    """A client of a Hub that refuses connections; it waits between attempts, so it starts before everything else."""
    home, url = tmp_path_factory.mktemp("refused"), closed_url()
    with Client([["inn", "org/net"]], url=url, home=home) as client:
        yield client, url, home


@pytest.fixture(scope="module", autouse=True)
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a Hub that fails; likewise."""
    home = tmp_path_factory.mktemp("failing")
    with Hub() as hub:
        for repo, (status, code, _) in FAILURES.items():
            hub.fail(repo, status, code)
        with Client([["failures", *FAILURES]], url=hub.url, home=home, etag_timeout=1) as client:
            yield client


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Repositories:
    from timm.models._hub import save_for_hf

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("repositories")
    marker = folder / "unpickled"
    malicious = pickle.dumps(MakesFolder(marker))
    main, tagged = small_inn(1), small_inn(2)
    good, other = files_of(main, folder / "main"), files_of(tagged, folder / "tagged")

    full = dino(DINO).half().float()
    weights = save_tensors({name: tensor.half() for name, tensor in full.state_dict().items()})
    size = {"img_size": 28, "embed_dim": 32, "depth": 1, "num_heads": 2}
    tiny = dino(DINO.partition(".")[0], **size)
    save_for_hf(tiny, str(folder / "tiny"), model_args=size, safe_serialization=True)
    tiny_files = {file: (folder / "tiny" / file).read_bytes() for file in (CONFIG, MODEL)}
    return Repositories(
        {
            ("org/contested", "main"): good,
            ("org/net", "main"): good,
            ("org/net", "v1"): other,
            ("org/bundled", "main"): {file: (checkpoints.BUNDLED / file).read_bytes() for file in (CONFIG, MODEL)},
            ("org/refreshed", "main"): good,
            ("org/old", "main"): without_metadata(main),
            ("org/changed", "main"): {**good, MODEL: flip_last_bit(good[MODEL])},
            ("org/truncated", "main"): {**good, MODEL: good[MODEL][: len(good[MODEL]) // 2]},
            ("org/pickled", "main"): {CONFIG: good[CONFIG], PICKLE: malicious},
            (f"timm/{DINO}", "main"): {MODEL: weights, PICKLE: malicious},
            ("org/tiny-dino", "v1"): tiny_files,
            ("org/truncated-dino", "main"): {**tiny_files, MODEL: tiny_files[MODEL][: len(tiny_files[MODEL]) // 2]},
            ("org/pickled-dino", "main"): {CONFIG: tiny_files[CONFIG], PICKLE: malicious},
        },
        {
            "main": fingerprint(main),
            "tagged": fingerprint(tagged),
            "bundled": fingerprint(HighFrequencyINN.from_pretrained()),
            "dino": jsd(DinoJSDLoss(full)),
            "tiny": jsd(DinoJSDLoss(tiny)),
        },
        marker,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(repositories: Repositories, home: Path) -> Answers:
    requests = [
        ["inn", "org/contested"],
        ["imports_timm", "org/net"],
        ["inn", "org/net"],
        ["inn", "org/net@v1"],
        ["inn", "org/bundled"],
        ["inn", "org/net@v9"],
        ["inn", "org/changed"],
        ["inn", "org/truncated"],
        ["inn", "org/pickled"],
        ["inn", "org/nothing"],
        ["inn", "org/old"],
        ["damaged_cache", "org/refreshed"],
        ["push", "org/net", "org/pushed"],
        ["dino", DINO],
        ["dino", "hf-hub:org/tiny-dino@v1"],
        ["dino", "hf-hub:org/truncated-dino"],
        ["dino", "hf-hub:org/pickled-dino"],
        ["dino", "vit_smal_patch14_dinov2.lvd142m"],
        ["dino", "vit_small_patch14_dinov2.lvd142"],
    ]
    with Hub() as hub:
        for (repo, revision), files in repositories.files.items():
            hub.add(repo, files, revision)
        hub.hold("org/contested", MODEL, heads=2)
        with (
            Client(requests, url=hub.url, home=home) as client,
            Client(requests[:1], url=hub.url, home=home) as other,
        ):
            return Answers(hub, client.outcomes(), other.outcomes())


@pytest.fixture(scope="module")
def offline(online: Answers, home: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Outcomes of a later process on the same cache, with HF_HUB_OFFLINE set and the Hub gone."""
    requests = [
        ["inn", "org/net"],
        ["inn", "org/net@v1"],
        ["inn", "org/absent@v2"],
        ["dino", DINO],
        ["dino", "hf-hub:org/tiny-dino@v1"],
        ["dino", "hf-hub:org/absent@v2"],
        ["dino", "vit_small_patch14_reg4_dinov2"],
        ["damaged_cache", "org/net@v1"],
    ]
    with Client(requests, url=online.hub.url, home=home, offline=True) as client:
        return client.outcomes()


def failure(outcome: dict[str, Any], error: str = "CheckpointError") -> str:
    """The message of an outcome that is this error."""
    assert outcome.get("error") == error, outcome
    return outcome["message"]


def asked_of(hub: Hub, repo: str) -> list[str]:
    """The paths that were asked for in this repository."""
    return [path for _, path in hub.requests if path.startswith(f"/{repo}/")]


def test_hub_network_is_the_saved_one_bit_for_bit(online: Answers, repositories: Repositories):
    assert online.outcomes["inn", "org/net"].get("value") == repositories.expected["main"], online.outcomes


def test_the_bundled_network_on_the_hub_is_the_bundled_one_bit_for_bit(online: Answers, repositories: Repositories):
    assert online.outcomes["inn", "org/bundled"].get("value") == repositories.expected["bundled"], online.outcomes


def test_second_load_downloads_nothing(online: Answers):
    assert online.hub.count("HEAD", "org/net", MODEL) >= 2
    assert online.hub.count("GET", "org/net", MODEL) == 1
    assert online.hub.count("GET", "org/net", CONFIG) == 1


def test_revision_is_asked_for_and_gives_its_own_network(online: Answers, repositories: Repositories):
    assert online.hub.count("GET", "org/net", MODEL, revision="v1") == 1
    assert repositories.expected["tagged"] != repositories.expected["main"]
    assert online.outcomes["inn", "org/net@v1"].get("value") == repositories.expected["tagged"]


def test_cached_networks_load_offline(offline: dict, online: Answers, repositories: Repositories):
    assert offline["inn", "org/net"].get("value") == repositories.expected["main"], offline
    assert offline["inn", "org/net@v1"].get("value") == repositories.expected["tagged"], offline


def test_unknown_revision_is_named(online: Answers):
    message = failure(online.outcomes["inn", "org/net@v9"])
    assert re.search(r"org/net \(revision v9\).*RevisionNotFound", message, re.DOTALL), message


def test_unknown_repository_is_named(online: Answers):
    message = failure(online.outcomes["inn", "org/nothing"])
    assert "org/nothing" in message
    assert online.hub.url in message


def test_a_network_without_metadata_is_read_with_its_config(online: Answers, repositories: Repositories):
    assert online.outcomes["inn", "org/old"].get("value") == repositories.expected["main"], online.outcomes


@pytest.mark.parametrize("repo", FAILURES)
def test_what_the_server_answers_is_said(failing: Client, repo: str):
    (outcome,) = failing.outcomes().values()
    message = outcome["value"][repo]
    assert re.search(FAILURES[repo][2], message), message
    assert f"{CONFIG} of {repo}" in message


@pytest.mark.parametrize("repo", ["org/changed", "org/truncated"])
def test_file_that_is_damaged_on_the_hub_is_named_with_a_remedy(online: Answers, repo: str):
    message = failure(online.outcomes["inn", repo])
    assert f"`hf download {repo} --force-download`" in message
    assert online.hub.count("GET", repo, MODEL) == 2


def test_hub_file_of_another_hash_names_both(online: Answers, repositories: Repositories):
    good, changed = (load_tensors(repositories.files[f"org/{name}", "main"][MODEL]) for name in ("net", "changed"))
    message = failure(online.outcomes["inn", "org/changed"])
    for tensors in (good, changed):
        assert checkpoints._digest(asdict(small_inn(1).config), tensors) in message


def test_file_that_is_damaged_in_the_cache_is_downloaded_again(online: Answers, repositories: Repositories):
    assert online.outcomes["damaged_cache", "org/refreshed"].get("value") == repositories.expected["main"], online
    assert online.hub.count("GET", "org/refreshed", MODEL) == 2


def test_file_that_is_damaged_in_the_cache_names_the_remedy_offline(offline: dict):
    message = failure(offline["damaged_cache", "org/net@v1"])
    assert "truncated or was changed" in message
    assert "`hf download org/net --revision v1 --force-download`" in message


@pytest.mark.parametrize("revision", ["../../net", "v1/../../../net", "/net", "a..b"])
def test_revision_that_leaves_the_cache_is_refused(revision: str, tmp_path: Path):
    message = f"revision must be .* without '..', got '{re.escape(revision)}'"
    with pytest.raises(CheckpointError, match=message):
        HighFrequencyINN.from_pretrained("org/net", revision=revision, cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match=message):
        HighFrequencyINN.from_pretrained(f"org/net@{revision}", cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match=message):
        DinoJSDLoss(f"hf-hub:org/net@{revision}")
    assert not list(tmp_path.iterdir())


def test_missing_model_file_is_named_and_no_pickle_asked_for(online: Answers, repositories: Repositories):
    message = failure(online.outcomes["inn", "org/pickled"])
    assert MODEL in message
    assert "org/pickled" in message
    assert "EntryNotFound" in message
    assert "/org/pickled/resolve/main/" + MODEL in asked_of(online.hub, "org/pickled")
    assert not any(PICKLE in path for path in asked_of(online.hub, "org/pickled"))
    assert not repositories.marker.exists()


def test_pushed_network_is_loaded_again_bit_for_bit(online: Answers, repositories: Repositories):
    assert online.outcomes["push", "org/net", "org/pushed"].get("value") == repositories.expected["main"], online
    pushed = online.hub.files("org/pushed")
    assert set(pushed) == {CONFIG, MODEL, "README.md"}
    assert json.loads(pushed[CONFIG])["sha256"] == sha256(pushed[MODEL])
    assert b"arxiv.org/abs/2411.13548" in pushed["README.md"]


def test_two_processes_load_one_network_at_once(online: Answers, repositories: Repositories):
    """Into an empty cache: each has asked for the file before either gets it."""
    assert online.hub.count("HEAD", "org/contested", MODEL) == 2
    for outcomes in (online.outcomes, online.simultaneous):
        assert outcomes["inn", "org/contested"].get("value") == repositories.expected["main"], outcomes


def remedy_in(message: str, repo: str, home: Path) -> bool:
    """Whether the message says where it looked and how to go on offline."""
    return all(part in message for part in (str(home / "hub"), f"hf download {repo}", "HF_HUB_OFFLINE=1"))


def test_hub_out_of_reach_is_an_error_with_a_remedy(refused: tuple[Client, str, Path]):
    client, url, home = refused
    outcome = client.outcomes()["inn", "org/net"]
    message = failure(outcome)
    assert url in message
    assert f"{CONFIG} of org/net" in message
    assert remedy_in(message, "org/net", home)
    assert outcome["seconds"] < 60


ABSENT = [("inn", "org/absent@v2"), ("dino", "hf-hub:org/absent@v2")]


@pytest.mark.parametrize(("request_", "file"), list(zip(ABSENT, (CONFIG, MODEL), strict=True)), ids=["inn", "dino"])
def test_offline_without_a_cached_file_is_an_error_with_a_remedy(offline: dict, home: Path, request_, file: str):
    message = failure(offline[request_])
    assert f"{file} of org/absent (revision v2)" in message
    assert remedy_in(message, "org/absent", home)
    assert offline[request_]["seconds"] < 20


@pytest.mark.parametrize("request_", ABSENT, ids=["inn", "dino"])
def test_remedy_downloads_the_revision_asked_for(offline: dict, request_):
    assert "hf download org/absent --revision v2" in failure(offline[request_])


def test_error_names_the_cache_folder_that_was_asked_for(tmp_path: Path):
    with pytest.raises(CheckpointError, match=re.escape(f"cache {tmp_path}:")):
        HighFrequencyINN.from_pretrained("org/absent", cache_dir=tmp_path, local_files_only=True)


# DINOv2, through timm's own loading.


def test_dino_weights_come_from_the_hub(online: Answers, repositories: Repositories):
    assert float.fromhex(repositories.expected["dino"]) > 0
    assert online.outcomes["dino", DINO].get("value") == repositories.expected["dino"], online.outcomes
    assert online.hub.count("GET", f"timm/{DINO}", MODEL) == 1


def test_dino_revision_is_asked_for(online: Answers, repositories: Repositories):
    outcome = online.outcomes["dino", "hf-hub:org/tiny-dino@v1"]
    assert outcome.get("value") == repositories.expected["tiny"] != repositories.expected["dino"], outcome
    assert online.hub.count("GET", "org/tiny-dino", MODEL, revision="v1") == 1


def test_cached_dino_loads_offline(offline: dict, repositories: Repositories):
    assert offline["dino", DINO].get("value") == repositories.expected["dino"], offline
    assert offline["dino", "hf-hub:org/tiny-dino@v1"].get("value") == repositories.expected["tiny"], offline


def test_pickled_dino_is_refused_and_never_asked_for(online: Answers, repositories: Repositories):
    message = failure(online.outcomes["dino", "hf-hub:org/pickled-dino"])
    assert f"{MODEL} of org/pickled-dino" in message
    assert "EntryNotFound" in message
    assert "/org/pickled-dino/resolve/main/" + MODEL in asked_of(online.hub, "org/pickled-dino")
    assert not any(PICKLE in path for path in asked_of(online.hub, "org/pickled-dino"))
    assert not repositories.marker.exists()


def test_truncated_dino_is_called_damaged_and_not_missing(online: Answers):
    message = failure(online.outcomes["dino", "hf-hub:org/truncated-dino"])
    assert "org/truncated-dino" in message
    assert "damaged or of another network" in message
    assert "`hf download org/truncated-dino --force-download`" in message
    assert "not in the cache" not in message


@pytest.mark.parametrize("name", ["vit_smal_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142"])
def test_unknown_dino_is_a_value_error_that_suggests_the_right_name_without_network(online: Answers, name: str):
    message = failure(online.outcomes["dino", name], "ValueError")
    assert name in message
    assert DINO in message
    assert not asked_of(online.hub, f"timm/{name}")


def test_dino_without_a_tag_names_the_repository_it_was_looked_for_in(offline: dict, home: Path):
    message = failure(offline["dino", "vit_small_patch14_reg4_dinov2"])
    assert remedy_in(message, "timm/vit_small_patch14_reg4_dinov2.lvd142m", home), message


def test_loss_without_dino_term_imports_no_timm(online: Answers):
    assert online.outcomes["imports_timm", "org/net"].get("value") is False, online.outcomes


# Folders and files.


@pytest.mark.parametrize("config", [{}, {"variant": "packet", "levels": 2}, {"mixing": "fixed", "noise_floor": 0.0}])
def test_saved_network_is_loaded_bit_for_bit(tmp_path: Path, config: dict):
    network = small_inn(1, **config)
    network.save_pretrained(tmp_path / "new" / "folder")
    for name in (tmp_path / "new" / "folder", str(tmp_path / "new" / "folder"), tmp_path / "new" / "folder" / MODEL):
        loaded = HighFrequencyINN.from_pretrained(name)
        assert not loaded.training
        assert loaded.config == network.config
        assert fingerprint(loaded) == fingerprint(network)


def test_saved_config_holds_the_hash(tmp_path: Path):
    files = files_of(small_inn(1), tmp_path)
    assert json.loads(files[CONFIG])["sha256"] == sha256(files[MODEL])


def test_equal_networks_are_saved_as_equal_files(tmp_path: Path):
    assert files_of(small_inn(1), tmp_path / "one") == files_of(small_inn(1), tmp_path / "other")


def test_the_parameter_file_alone_is_a_checkpoint(tmp_path: Path):
    network = small_inn(1, clamp=3)
    network.save_pretrained(tmp_path)
    moved = (tmp_path / MODEL).rename(tmp_path.parent / "alone.safetensors")
    loaded = HighFrequencyINN.from_pretrained(moved)
    assert loaded.config == network.config
    assert fingerprint(loaded) == fingerprint(network)


def test_a_reader_sees_one_of_two_saves_at_any_moment(tmp_path: Path, monkeypatch):
    """After every move of a file, which is where a kill would leave the folder, too."""
    old, new = small_inn(1), small_inn(2, hidden=5)
    old.save_pretrained(tmp_path)
    replace, seen = Path.replace, []

    def replace_and_read(path: Path, target: Path) -> Path:
        moved = replace(path, target)
        loaded = HighFrequencyINN.from_pretrained(tmp_path)
        seen.append((loaded.config, fingerprint(loaded)))
        return moved

    monkeypatch.setattr(Path, "replace", replace_and_read)
    new.save_pretrained(tmp_path)
    assert len(seen) == 2
    assert set(seen) <= {(network.config, fingerprint(network)) for network in (old, new)}


def test_files_get_the_permissions_of_the_umask_which_is_never_set(tmp_path: Path, monkeypatch):
    old = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", None)  # other threads would make files with it
            small_inn(1).save_pretrained(tmp_path)
    finally:
        os.umask(old)
    assert {(tmp_path / file).stat().st_mode & 0o777 for file in (CONFIG, MODEL)} == {0o640}


def test_next_save_removes_what_a_killed_one_left_and_nothing_of_a_running_one(tmp_path: Path):
    pytest.importorskip("fcntl")
    killed = """
import os, pathlib, sys
from mghf_loss._files import write_atomically
write_atomically(pathlib.Path(sys.argv[1]), lambda path: os.kill(os.getpid(), 9))
"""
    process = subprocess.run([sys.executable, "-c", killed, str(tmp_path / MODEL)], capture_output=True)
    assert process.returncode == -9, process.stderr
    (abandoned,) = tmp_path.iterdir()

    def save_meanwhile(running: Path) -> None:
        running.write_text("whole")
        small_inn(1).save_pretrained(tmp_path)
        assert running.exists()
        assert not abandoned.exists()

    write_atomically(tmp_path / "other", save_meanwhile)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, MODEL, "README.md", "other"}


def test_bundled_is_the_default_and_a_checkpoint_like_any_other(tmp_path: Path):
    import mghf_loss

    shutil.copytree(Path(mghf_loss.__file__).parent / "weights", tmp_path, dirs_exist_ok=True)
    default = HighFrequencyINN.from_pretrained()
    assert fingerprint(default) == fingerprint(HighFrequencyINN.from_pretrained(tmp_path))
    assert fingerprint(default) == fingerprint(HighFrequencyINN.from_pretrained("bundled"))


def write_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    return folder


def write_model(folder: Path, data: bytes) -> Path:
    """Replace the parameters, the hash in the configuration being right."""
    (folder / MODEL).write_bytes(data)
    return write_config(folder, sha256=sha256(data))


def truncated(folder: Path) -> Path:
    data = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(data[: len(data) // 2])
    return folder


def flipped_bit(folder: Path) -> Path:
    (folder / MODEL).write_bytes(flip_last_bit((folder / MODEL).read_bytes()))
    return folder


def changed_metadata(folder: Path) -> Path:
    data = (folder / MODEL).read_bytes()
    assert data.count(b'clamp\\": 2.0') == 1
    (folder / MODEL).write_bytes(data.replace(b'clamp\\": 2.0', b'clamp\\": 3.0'))
    return folder


def nested_metadata(folder: Path) -> Path:
    return write_model(folder, save_tensors({}, {checkpoints.METADATA_KEY: "[" * 100_000}))


def no_model(folder: Path) -> Path:
    (folder / MODEL).unlink()
    return folder


def no_config(folder: Path) -> Path:
    (folder / CONFIG).unlink()
    return folder


def text_as_config(folder: Path) -> Path:
    (folder / CONFIG).write_text("levels: 1\n")
    return folder


def binary_as_config(folder: Path) -> Path:
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00")
    return folder


def list_as_config(folder: Path) -> Path:
    (folder / CONFIG).write_text("[1, 2]")
    return folder


def nested_config(folder: Path) -> Path:
    (folder / CONFIG).write_text("[" * 100_000)
    return folder


def foreign_field(folder: Path) -> Path:
    return write_config(folder, architecture="vit_small_patch14_dinov2")


def missing_field(folder: Path) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    del config["hidden"]
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def impossible_value(folder: Path) -> Path:
    return write_config(folder, variant="cube")


def value_of_another_type(folder: Path) -> Path:
    return write_config(folder, clamp="two")


def other_shape(folder: Path) -> Path:
    return write_config(folder, hidden=16)


def missing_tensor(folder: Path) -> Path:
    tensors = load_tensors((folder / MODEL).read_bytes())
    tensors.pop(next(name for name in tensors if name.endswith("matrix")))
    return write_model(folder, save_tensors(tensors))


def not_finite(folder: Path, value: float) -> Path:
    tensors = load_tensors((folder / MODEL).read_bytes())
    next(value for name, value in tensors.items() if name.endswith("matrix"))[0, 0] = value
    return write_model(folder, save_tensors(tensors))


def nan(folder: Path) -> Path:
    return not_finite(folder, math.nan)


def infinite(folder: Path) -> Path:
    return not_finite(folder, math.inf)


def pickle_in_place(folder: Path) -> Path:
    return write_model(folder, pickle.dumps(MakesFolder(folder / "unpickled")))


def cut_off_before_hashing(folder: Path) -> Path:
    return write_model(folder, (folder / MODEL).read_bytes()[:-8])


def pth_file(folder: Path) -> Path:
    (folder / "model.pth").write_bytes(pickle.dumps(MakesFolder(folder / "unpickled")))
    return folder / "model.pth"


DAMAGES = [
    (truncated, "cannot read its parameters: SafetensorError"),
    (flipped_bit, "sha256 is .* but its metadata says .* truncated or was changed"),
    (changed_metadata, "sha256 is .* but its metadata says .* truncated or was changed"),
    (nested_metadata, "cannot read its config.json: RecursionError"),
    (no_model, "cannot read its parameters: .*model.safetensors"),
    (pth_file, r"no \.safetensors file.*pickles.* never loaded"),
]
DAMAGES_WITHOUT_METADATA = [
    (truncated, "cannot read its parameters: SafetensorError"),
    (flipped_bit, "sha256 is .* but config.json says .* truncated or was changed"),
    (no_config, "cannot read its config.json: .*No such file"),
    (text_as_config, "cannot read its config.json"),
    (binary_as_config, "cannot read its config.json"),
    (nested_config, "cannot read its config.json: RecursionError"),
    (list_as_config, "config.json must hold an object, got list"),
    (foreign_field, "fields .*'architecture'.* not .*'clamp'"),
    (missing_field, "fields .*, not .*'hidden'"),
    (impossible_value, "variant must be .*'cube'"),
    (value_of_another_type, "clamp must be .*'two'"),
    (other_shape, r"tensors are missing, unknown or of another shape: .* is \[4\], not \[16\]"),
    (missing_tensor, "1 tensors are missing.*matrix is None, not"),
    (nan, "matrix is not finite"),
    (infinite, "matrix is not finite"),
    (pickle_in_place, "cannot read its parameters: SafetensorError"),
    (cut_off_before_hashing, "cannot read its parameters: SafetensorError"),
]


@pytest.mark.parametrize(
    ("metadata", "damage", "says"),
    [(True, *row) for row in DAMAGES] + [(False, *row) for row in DAMAGES_WITHOUT_METADATA],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_checkpoint_is_refused_by_name(
    tmp_path: Path, metadata: bool, damage: Callable[[Path], Path], says: str
):
    small_inn(1).save_pretrained(tmp_path)
    if not metadata:
        for file, data in without_metadata(small_inn(1)).items():
            (tmp_path / file).write_bytes(data)
    name = damage(tmp_path)
    with pytest.raises(CheckpointError, match=f"(?s){re.escape(str(name))}.*{says}"):
        HighFrequencyINN.from_pretrained(name)
    assert not (tmp_path / "unpickled").exists()


ABSURD = [
    ({"couplings": 10**5}, "couplings must be .* at most 16, got 100000"),
    ({"levels": 10**30}, "levels must be .* at most 12, got 10"),
    ({"levels": 1e30}, "levels must be an integer"),
    ({"variant": "packet", "levels": 6}, "levels must be .* at most 5, got 6"),
    ({"hidden": 10**9}, "hidden must be .* at most 16384"),
    ({"clamp": math.inf}, "clamp must be .* below 80, got inf"),
    ({"clamp": 1e300}, "clamp must be .* below 80"),
    ({"noise_floor": math.nan}, "noise_floor must be"),
]


@pytest.mark.parametrize(("change", "says"), ABSURD)
def test_absurd_configuration_is_refused_before_anything_is_built(tmp_path: Path, monkeypatch, change: dict, says: str):
    for file, data in without_metadata(small_inn(1)).items():
        (tmp_path / file).write_bytes(data)
    write_config(tmp_path, **change)
    monkeypatch.setattr("mghf_loss.inn.Level", None)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path))}.*{says}"):
        HighFrequencyINN.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says):
        INNConfig(**change)


def test_numpy_numbers_are_numbers():
    config = INNConfig(levels=np.int64(2), hidden=np.int32(4), clamp=np.float32(2.5))
    assert config == INNConfig(levels=2, hidden=4, clamp=2.5)
    assert json.loads(json.dumps(asdict(config)))["levels"] == 2


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-of-this-name/net"])
def test_name_that_the_system_refuses_is_a_checkpoint_error(name: str):
    with pytest.raises(CheckpointError, match="cannot look for checkpoint"):
        HighFrequencyINN.from_pretrained(name)


@pytest.mark.parametrize(
    "name",
    ["./nowhere/model.safetensors", "/nowhere", "../nowhere", "not a name!", "a/b/c", "org/name@", Path("nowhere")],
)
def test_name_of_nothing_is_told_what_names_there_are(name: str | Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"unknown checkpoint '{re.escape(str(name))}': expected 'bundled', .*"):
        HighFrequencyINN.from_pretrained(name)


@pytest.mark.parametrize("step", ["write_bytes", "write_text", "replace"])
def test_interrupted_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path, monkeypatch, step: str):
    """The disk is full in the middle of the parameters or the configuration, or the last move fails."""
    small_inn(1).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = getattr(Path, step)

    def fail(path: Path, content: Any, *args: Any, **options: Any) -> None:
        if step != "replace":
            write(path, content[: len(content) // 2], *args, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, fail)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            small_inn(2).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert fingerprint(HighFrequencyINN.from_pretrained(tmp_path)) == fingerprint(small_inn(1))
