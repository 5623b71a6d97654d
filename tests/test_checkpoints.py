"""Where networks come from: the Hub (one on the loopback), folders and files; what is refused and what it says."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from conftest import perturbed_inn
from hub import Client, Hub, closed_url, fingerprint, jsd
from mghf_loss import CheckpointError, DinoJSDLoss, HighFrequencyINN, checkpoints

SMALL = {"levels": 1, "hidden": 4, "couplings": 1}
DINO = "vit_small_patch14_dinov2.lvd142m"
MODEL, CONFIG, PICKLE = "model.safetensors", "config.json", "pytorch_model.bin"


def small_inn(seed: int, **config: Any) -> HighFrequencyINN:
    torch.manual_seed(seed)
    return perturbed_inn(**{**SMALL, **config})


def files_of(network: HighFrequencyINN, folder: Path) -> dict[str, bytes]:
    network.save_pretrained(folder)
    return {file: (folder / file).read_bytes() for file in (CONFIG, MODEL)}


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
            ("org/changed", "main"): {**good, MODEL: other[MODEL]},
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


@pytest.mark.parametrize("repo", ["org/changed", "org/truncated"])
def test_hub_file_of_another_hash_names_both_and_the_remedy(online: Answers, repositories: Repositories, repo: str):
    files = repositories.files[repo, "main"]
    message = failure(online.outcomes["inn", repo])
    for part in (repo, sha256(files[MODEL]), json.loads(files[CONFIG])["sha256"], "download"):
        assert part in message


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


def test_saved_config_holds_the_hash_and_files_are_readable_by_others(tmp_path: Path):
    files = files_of(small_inn(1), tmp_path)
    assert json.loads(files[CONFIG])["sha256"] == sha256(files[MODEL])
    (tmp_path / "plain").touch()
    modes = {(tmp_path / file).stat().st_mode for file in (CONFIG, MODEL, "plain")}
    assert len(modes) == 1


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
    data = bytearray((folder / MODEL).read_bytes())
    data[-1] ^= 1
    (folder / MODEL).write_bytes(data)
    return folder


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


def pickle_in_place(folder: Path) -> Path:
    return write_model(folder, pickle.dumps(MakesFolder(folder / "unpickled")))


def cut_off_before_hashing(folder: Path) -> Path:
    return write_model(folder, (folder / MODEL).read_bytes()[:-8])


def pth_file(folder: Path) -> Path:
    (folder / "model.pth").write_bytes(pickle.dumps(MakesFolder(folder / "unpickled")))
    return folder / "model.pth"


DAMAGES = [
    (truncated, "sha256 is .* says .* truncated or was changed"),
    (flipped_bit, "sha256 is .* says .* truncated or was changed"),
    (no_model, "cannot read its parameters: .*model.safetensors"),
    (no_config, "cannot read its config.json: .*No such file"),
    (text_as_config, "cannot read its config.json"),
    (binary_as_config, "cannot read its config.json"),
    (list_as_config, "config.json must hold an object, got list"),
    (foreign_field, "fields .*'architecture'.* expected .*'clamp'"),
    (missing_field, "fields .*, expected .*'hidden'"),
    (impossible_value, "variant must be .*'cube'"),
    (value_of_another_type, "'clamp': 'two'"),
    (other_shape, r"'hidden': 16.*size mismatch"),
    (missing_tensor, "Missing key.*matrix"),
    (pickle_in_place, "no readable safetensors file"),
    (cut_off_before_hashing, "no readable safetensors file"),
    (pth_file, r"no \.safetensors file.*pickles.* never loaded"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], Path], says: str):
    small_inn(1).save_pretrained(tmp_path)
    name = damage(tmp_path)
    with pytest.raises(CheckpointError, match=f"(?s){re.escape(str(name))}.*{says}"):
        HighFrequencyINN.from_pretrained(name)
    assert not (tmp_path / "unpickled").exists()


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
