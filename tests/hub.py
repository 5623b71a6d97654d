"""A Hugging Face Hub on the loopback, and processes that load from it with the client library as it is.

Run as a script it is such a process: `python hub.py '[["inn", "org/name"], ["dino", "hf-hub:org/name@v1"]]'` prints
one outcome per request.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
UPLOAD = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<step>preupload|commit)/(?P<revision>[^/]+)")


class Hub:
    """Serves and accepts model repositories at `url` and keeps every request; a context manager.

    Attributes:
        url: what HF_ENDPOINT should be.
        requests: (method, path) of every request, in order.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self._repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self._held: dict[str, int] = {}
        self._failing: dict[str, tuple[int, str]] = {}
        self._over = threading.Event()
        self._arrival = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo: str, files: Mapping[str, bytes], revision: str = "main") -> None:
        """Make `files` the content of `repo` at `revision`, a branch or tag."""
        self._repositories[repo, revision] = dict(files)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return what `repo` holds."""
        return self._repositories[repo, revision]

    def hold(self, repo: str, file: str, heads: int) -> None:
        """Answer no GET of the file before so many HEADs of it: as many clients have to be loading it at once."""
        self._held[f"/{repo}/resolve/main/{file}"] = heads

    def fail(self, repo: str, status: int, code: str = "") -> None:
        """Answer every request about the repository with this status and error code; with status 0 do not answer."""
        self._failing[repo] = status, code

    def count(self, method: str, repo: str, file: str, revision: str = "main") -> int:
        """Return how often the file was asked for."""
        return self.requests.count((method, f"/{repo}/resolve/{revision}/{file}"))

    def answer(self, method: str, target: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content for a request."""
        path = urlsplit(target).path
        with self._arrival:
            self.requests.append((method, unquote(path)))
            self._arrival.notify_all()
            if method == "GET" and path in self._held:
                self._arrival.wait_for(lambda: self.requests.count(("HEAD", path)) >= self._held[path], timeout=30)
        if method == "POST":
            return self._accept(path, json.loads(body) if not path.count("/commit/") else None, body)
        match = FILE.fullmatch(path)
        return self._serve(**{key: unquote(value) for key, value in match.groupdict().items()}) if match else _error("")

    def _serve(self, repo: str, revision: str, file: str) -> tuple[int, dict[str, str], bytes]:
        if repo in self._failing:
            status, code = self._failing[repo]
            if not status:
                self._over.wait()
            return _error(code, status=status)
        if repo not in {name for name, _ in self._repositories}:
            return _error("RepoNotFound")
        if (repo, revision) not in self._repositories:
            return _error("RevisionNotFound")
        files = self._repositories[repo, revision]
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        if file not in files:
            return _error("EntryNotFound", {"X-Repo-Commit": commit})
        etag = hashlib.sha256(files[file]).hexdigest()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, files[file]

    def _accept(self, path: str, message: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Take an upload: create the repository, check the model card, choose plain uploads, commit."""
        if path == "/api/repos/create":
            return _json({"url": f"{self.url}/{message['organization']}/{message['name']}"})
        if path == "/api/validate-yaml":
            return _json({"warnings": [], "errors": []})
        match = UPLOAD.fullmatch(path)
        if match is None:
            return _error("")
        if match["step"] == "preupload":
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in message["files"]]
            return _json({"files": modes})
        operations = [json.loads(line) for line in body.splitlines()]
        added = {o["value"]["path"]: base64.b64decode(o["value"]["content"]) for o in operations if o["key"] == "file"}
        key = match["repo"], unquote(match["revision"])
        self._repositories[key] = {**self._repositories.get(key, {}), **added}
        oid = hashlib.sha1(body).hexdigest()
        return _json({"commitOid": oid, "commitUrl": f"{self.url}/{match['repo']}/commit/{oid}", "success": True})


def _error(code: str, headers: Mapping[str, str] | None = None, status: int = 404) -> tuple[int, dict[str, str], bytes]:
    return status, {**(headers or {}), **({"X-Error-Code": code} if code else {})}, b""


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = hub.answer(self.command, self.path, body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_GET = do_POST = reply  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def closed_url() -> str:
    """Return a URL where nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


class Client:
    """A fresh process with its own HF_ENDPOINT and HF_HOME that makes `requests`; leaving the context ends it.

    A request is a key of `OUTCOMES` and its function's arguments.
    """

    def __init__(
        self, requests: list[list[str]], *, url: str, home: Path, offline: bool = False, etag_timeout: int = 10
    ) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.lower().endswith("_proxy") and not name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))
        }
        environment = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": str(etag_timeout),
            "OMP_NUM_THREADS": "1",
        }
        self._requests = requests
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(requests)],
            env={**kept, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @functools.cache  # noqa: B019
    def outcomes(self, timeout: float = 120) -> dict[tuple[str, ...], dict[str, Any]]:
        """Wait for the process and return, by request, `value` or `error` and `message`, and `seconds`."""
        output, errors = self._process.communicate(timeout=timeout)
        if self._process.returncode:
            raise RuntimeError(f"the loading process failed:\n{errors}")
        outcomes = json.loads(output.splitlines()[-1])
        return {tuple(request): outcome for request, outcome in zip(self._requests, outcomes, strict=True)}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


def fingerprint(network: Any) -> str:
    """Return the sha256 of the bits of an invertible network's features of a fixed image."""
    import torch

    image = torch.rand(1, 3, 12, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        return hashlib.sha256(b"".join(level.numpy().tobytes() for level in network.features(image))).hexdigest()


def jsd(loss: Any) -> str:
    """Return the bits of a `DinoJSDLoss` of two fixed images."""
    import torch

    sr, gt = torch.rand(2, 1, 3, 28, 28, generator=torch.Generator().manual_seed(0)).unbind(0)
    with torch.no_grad():
        return loss(sr, gt).item().hex()


def _inn(name: str) -> str:
    from mghf_loss import HighFrequencyINN

    return fingerprint(HighFrequencyINN.from_pretrained(name))


def _failures(*names: str) -> dict[str, str]:
    """Return the messages of all names at once, since the client waits long between its attempts.

    For an answer it would wait six times a minute: the one place where something of it is replaced.
    """
    from huggingface_hub import file_download

    from mghf_loss import CheckpointError

    file_download._ETAG_RETRY_TIMEOUT = 1

    def fail(name: str) -> str:
        try:
            return _inn(name)
        except CheckpointError as error:
            return str(error)

    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(fail, names), strict=True))


def _damaged_cache(name: str) -> str:
    """Load a network that was flipped by a bit after it had been downloaded."""
    from huggingface_hub import hf_hub_download

    _inn(name)
    repo, _, revision = name.partition("@")
    cached = Path(hf_hub_download(repo, "model.safetensors", revision=revision or None)).resolve()
    data = bytearray(cached.read_bytes())
    data[-1] ^= 1
    cached.write_bytes(data)
    return _inn(name)


def _push(source: str, target: str) -> str:
    from mghf_loss import HighFrequencyINN

    HighFrequencyINN.from_pretrained(source).push_to_hub(target)
    return _inn(target)


def _dino(name: str) -> str:
    from mghf_loss import DinoJSDLoss

    return jsd(DinoJSDLoss(name))


def _python(folder: str, *programs: str) -> None:
    """Run programs one after another in the same names, in `folder`, warnings being errors."""
    names: dict[str, Any] = {"__name__": "__main__"}
    here = Path.cwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Lightning's advice about settings that are small on purpose; BasicSR's age.
            warnings.filterwarnings("ignore", module="lightning|basicsr")
            for number, program in enumerate(programs, 1):
                exec(compile(program, f"<program {number}>", "exec"), names)
    except Exception as error:
        raise RuntimeError(traceback.format_exc()) from error
    finally:
        os.chdir(here)


def _imports_timm(inn: str) -> bool:
    from mghf_loss import MGHFLoss

    MGHFLoss(coefficients={"dino_jsd": 0.0}, inn=inn)
    return "timm" in sys.modules


OUTCOMES = {
    "inn": _inn,
    "failures": _failures,
    "damaged_cache": _damaged_cache,
    "push": _push,
    "dino": _dino,
    "imports_timm": _imports_timm,
    "python": _python,
}


def main() -> None:
    """Make the requests of the command line and print their outcomes as one line of JSON."""
    import torch

    torch.set_num_threads(1)
    outcomes: list[dict[str, Any]] = []
    for kind, *names in json.loads(sys.argv[1]):
        start = time.monotonic()
        try:
            outcome: dict[str, Any] = {"value": OUTCOMES[kind](*names)}
        except Exception as error:
            outcome = {"error": type(error).__name__, "message": str(error)}
        outcomes.append({**outcome, "seconds": time.monotonic() - start})
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
