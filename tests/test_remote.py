"""Shards at a URL: a real HTTP server with every fault that a network has, one at a time."""

import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from runs import ROOT

from data.index import load_index
from data.remote import download_shards, is_remote
from data.storage import Limits
from repghost.errors import UserError, user_message

QUICK = Limits(connections=2, timeout=60, attempts=3, backoff=0.01)
IMPATIENT = replace(QUICK, timeout=1, slowest=0)
SHARD = "train-000001.tar"
Fault = str | int


class Server(ThreadingHTTPServer):
    """Serves the files of a folder, and for `faults[file]`, in turn, what goes wrong with a request for it."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[str, Iterator[Fault]] = {}
        self.requests: list[str] = []
        self.changed = threading.Condition()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/shards"

    def await_request(self, name: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: name in self.requests, timeout=600)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        server, name = self.server, self.path.removeprefix("/shards/")
        with server.changed:
            server.requests.append(name)
            fault = next(server.faults.get(name, iter(())), None)
            server.changed.notify_all()
        if isinstance(fault, int):
            self.answer(fault, b"out of order")
            return
        try:
            content = (server.folder / name).read_bytes()
        except OSError:
            self.answer(404, b"not here")
            return
        self.answer(200, content, fault)

    def answer(self, status: int, body: bytes, fault: Fault | None = None) -> None:
        if fault == "endless":
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(bytes(2**16))
        if fault == "drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            with suppress(OSError):
                while not self.server.closing.wait(0.05):
                    self.wfile.write(b"x")
            return
        if fault == "less":
            body = body[: len(body) // 2]
        if fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault not in ("short", "reset", "stall"):
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.server.closing.wait()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.rfile, self.wfile = io.BytesIO(), io.BytesIO()
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(shards) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def files_of(folder: Path) -> dict[str, str]:
    """{name: sha256} of what a loader reads."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def own_manifest(server: Server, folder: Path, **changes: object) -> None:
    """Lets the server serve `folder`, which holds copies of the shards and the manifest with `changes` of train."""
    folder.mkdir()
    for path in server.folder.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"].update(changes)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    server.folder = folder


# --- what works ---------------------------------------------------------------------------------------------------


def test_staged_shards_are_those_of_the_server(server: Server, shards: Path, tmp_path: Path) -> None:
    folder = download_shards(server.url, tmp_path, ["train", "val"], QUICK)
    assert files_of(folder) == files_of(shards)
    assert load_index(folder, "train", tmp_path).fingerprint == load_index(shards, "train", tmp_path).fingerprint
    assert server.requests.count(SHARD) == 1 and not list(folder.rglob(".*.tmp"))


def test_what_is_staged_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    folder = download_shards(f"{server.url}/", tmp_path, ["val"], QUICK)
    assert not any("train" in name for name in server.requests), "only the split that is needed"
    server.requests.clear()
    assert download_shards(server.url, tmp_path, ["val"], QUICK) == folder
    assert server.requests == ["manifest.json"]
    # What was damaged since is.
    os.truncate(folder / "val-000000.tar", 100)
    (folder / "val.index.npy").write_bytes(b"damaged")
    download_shards(server.url, tmp_path, ["val"], QUICK)
    assert set(server.requests) == {"manifest.json", "val-000000.tar", "val.index.npy"}
    assert len(load_index(folder, "val", tmp_path)) == 15


def test_another_data_set_at_the_same_url_gets_another_folder(server: Server, tmp_path: Path) -> None:
    before = download_shards(server.url, tmp_path / "cache", ["val"], QUICK)
    own_manifest(server, tmp_path / "other", images=45, note="other")
    after = download_shards(server.url, tmp_path / "cache", ["val"], QUICK)
    assert before != after and before.parent == after.parent and before.name.startswith("shards-")


def test_other_storages(shards: Path, tmp_path: Path) -> None:
    assert is_remote("s3://bucket/shards") and not is_remote("/data/shards") and not is_remote(shards)
    folder = download_shards(f"file://{shards}", tmp_path, ["train"], QUICK)
    assert files_of(folder).items() < files_of(shards).items()


def test_a_run_reads_a_url_like_a_folder(server: Server, shards: Path, tmp_path: Path) -> None:
    def data(*overrides: str) -> Any:
        with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
            settings = ["recipe=quick", f"data.root={server.url}", f"data.cache={tmp_path}", *overrides]
            return instantiate(compose("train", settings).data)

    loaded = data()
    loaded.setup("validate")
    assert loaded.num_classes == 3 and len(loaded.index("val")) == 15
    assert Path(loaded.index("val").shards[0]).is_relative_to(tmp_path / "staged")
    with pytest.raises(Exception, match=r"data\.train or data\.val cannot be read from a URL"):
        data("data.train='*.tar'")


# --- faults that pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [["stall"], ["reset"], ["short"], ["less"], ["flip"], [500, 500], [503], [429], ["reset", "stall"]],
    ids=lambda faults: " ".join(map(str, faults)),
)
def test_a_fault_that_passes_costs_one_more_attempt(
    server: Server, shards: Path, tmp_path: Path, faults: list[Fault]
) -> None:
    server.faults[SHARD] = iter(faults)
    folder = download_shards(server.url, tmp_path, ["train"], IMPATIENT if "stall" in faults else QUICK)
    assert files_of(folder).items() < files_of(shards).items()
    requests = server.requests.count(SHARD)
    assert requests > len(faults) if "stall" in faults else requests == len(faults) + 1  # a slow machine may stall, too


@pytest.mark.parametrize("name", ["manifest.json", "train.index.npy"])
def test_faults_of_other_files_than_shards(server: Server, shards: Path, tmp_path: Path, name: str) -> None:
    server.faults[name] = iter([500, 502])
    assert files_of(download_shards(server.url, tmp_path, ["train"], QUICK)).items() < files_of(shards).items()
    assert server.requests.count(name) == (4 if name == "manifest.json" else 3)


# --- faults that stay ---------------------------------------------------------------------------------------------

STAYING = {
    "missing": (SHARD, 404, f"{SHARD}: not there, but the manifest lists it"),
    "gone": (SHARD, 410, f"{SHARD}: refused .*410"),
    "forbidden": (SHARD, 403, f"{SHARD}: refused .*403"),
    "broken server": (SHARD, 500, f"{SHARD}: ClientResponseError 500.*given up after 3 attempts"),
    "stalled": (SHARD, "stall", f"{SHARD}: StalledError no byte of it came.*given up after 3 attempts"),
    "dripping": (SHARD, "drip", f"{SHARD}: StalledError no byte of it came.*given up after 3 attempts"),
    "reset": (SHARD, "reset", f"{SHARD}: Client.*given up after 3 attempts"),
    "cut off": (SHARD, "short", f"{SHARD}: ClientPayloadError.*given up after 3 attempts"),
    "too few bytes": (
        SHARD,
        "less",
        f"{SHARD}: ChecksumError not what manifest.json there .*given up after 3 attempts",
    ),
    "endless": (SHARD, "endless", f"{SHARD}: ChecksumError more than the [0-9,]+ bytes .*given up after 3 attempts"),
    "endless manifest": (
        "manifest.json",
        "endless",
        "manifest.json: ChecksumError more than the 20,000,000 bytes .*given up after 3 attempts",
    ),
    "wrong bytes": (SHARD, "flip", f"{SHARD}: ChecksumError not what manifest.json there .*given up after 3 attempts"),
    "no manifest": ("manifest.json", 404, "/shards/manifest.json: not there: .* data.write_shards wrote"),
    "closed manifest": ("manifest.json", 401, "manifest.json: refused .*401"),
    "no index": ("train.index.npy", 404, "train.index.npy: not there"),
}


@pytest.mark.parametrize("case", STAYING)
def test_a_fault_that_stays_is_one_error_that_names_the_file(server: Server, tmp_path: Path, case: str) -> None:
    name, fault, message = STAYING[case]
    server.faults[name] = repeat(fault)
    with pytest.raises(UserError, match=message) as error:
        download_shards(server.url, tmp_path, ["train"], IMPATIENT if fault in ("stall", "drip") else QUICK)
    assert server.url in str(error.value) and "\n" not in str(error.value)
    final = isinstance(fault, int) and fault < 500
    assert server.requests.count(name) == (1 if final else QUICK.attempts)
    assert not list(tmp_path.glob(f"staged/*/{name}"))


def test_a_server_that_is_too_slow_is_given_up(server: Server, tmp_path: Path) -> None:
    """No server is that fast, and a slow one need not be waited for here."""
    slow = replace(QUICK, timeout=60, slowest=1e15)
    with pytest.raises(UserError, match=rf"{server.url}/manifest.json: slower than .* kB/s: start again to resume"):
        download_shards(server.url, tmp_path, ["train"], replace(slow, timeout=0.0))


def test_nobody_answers(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/shards"
        with pytest.raises(UserError, match=r"manifest\.json: ClientConnectorError .*given up after 3 attempts"):
            download_shards(url, tmp_path, ["train"], QUICK)


def test_a_package_or_protocol_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="carrier-pigeon://roof: Protocol not known"):
        download_shards("carrier-pigeon://roof", tmp_path, ["train"], QUICK)


def test_a_package_for_buckets_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gcsfs", "gcsfs.core"):  # one that was imported is found without its package
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"gs://bucket/shards: gcsfs is not installed: pip install '.*\[remote\]'"):
        download_shards("gs://bucket/shards", tmp_path, ["train"], QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": [{"file": "../../evil.tar", "bytes": 1, "sha256": ""}]}, r"'\.\./\.\./evil\.tar' is not the name"),
        ({"shards": [{"file": "/etc/evil.tar", "bytes": 1, "sha256": ""}]}, "'/etc/evil.tar' is not the name"),
        ({"index": {"file": "..", "sha256": ""}}, r"'\.\.' is not the name"),
        ({"shards": [{"file": "x.tar", "bytes": 1}]}, "no checksums"),
        ({"shards": [{"file": "x.tar", "bytes": -1, "sha256": ""}]}, "-1 bytes"),
        ({"shards": [{"file": "x.tar", "bytes": 10**18, "sha256": ""}]}, r"GB are needed for http.*data\.cache"),
        ({"shards": 7}, "its shards is no list"),
    ],
)
def test_manifests_that_are_refused(server: Server, tmp_path: Path, change: dict, message: str) -> None:
    own_manifest(server, tmp_path / "served", **change)
    with pytest.raises(UserError, match=message) as error:
        download_shards(server.url, tmp_path / "cache", ["train"], QUICK)
    assert server.url in str(error.value)
    assert set(server.requests) == {"manifest.json"}
    assert not list(tmp_path.rglob("evil*"))


def test_a_web_page_is_no_manifest(server: Server, tmp_path: Path) -> None:
    server.folder = tmp_path
    (tmp_path / "manifest.json").write_text("<html>Log in</html>")
    with pytest.raises(UserError, match=rf"{server.url}/manifest\.json: not a manifest of format 1"):
        download_shards(server.url, tmp_path / "cache", ["train"], QUICK)
    assert not (tmp_path / "cache").exists()


def test_a_split_that_is_not_there(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split test, only train, val"):
        download_shards(server.url, tmp_path, ["test"], QUICK)


def test_a_disk_that_fills_up(server: Server, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the write fails in the same place."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(OSError) as error:
            download_shards(server.url, tmp_path, ["train"], QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = user_message(error.value) or ""
    assert re.search(r"staged/shards-\w+/train.+: File too large: free some space", said) and "\n" not in said
    download_shards(server.url, tmp_path, ["train"], QUICK)


# --- resuming -------------------------------------------------------------------------------------------------------


def test_an_interrupted_download_resumes_with_the_missing_files(server: Server, shards: Path, tmp_path: Path) -> None:
    server.faults[SHARD] = repeat(500)
    with pytest.raises(UserError, match="start again to resume"):
        download_shards(server.url, tmp_path, ["train"], replace(QUICK, connections=1))
    finished = {path.name for path in tmp_path.glob("staged/*/*") if path.is_file()}
    (folder,) = tmp_path.glob("staged/*")
    (folder / f".{SHARD}.tmp").write_bytes(b"what a killed process leaves" * 10_000)
    server.faults.clear()
    server.requests.clear()
    assert download_shards(server.url, tmp_path, ["train"], QUICK) == folder
    assert SHARD in server.requests and not finished & set(server.requests[1:])
    assert files_of(folder).items() < files_of(shards).items()


def test_processes_that_download_at_once_share_the_work(server: Server, shards: Path, tmp_path: Path) -> None:
    """One process begins, the other joins in, waits for the file that the first is at, and ends it when that dies."""
    server.faults[SHARD] = iter(["stall"])
    first = multiprocessing.get_context("spawn").Process(
        target=download_shards, args=(server.url, tmp_path, ["train"], replace(QUICK, timeout=600))
    )
    first.start()
    server.await_request(SHARD)
    found: list[Path] = []
    second = threading.Thread(target=lambda: found.append(download_shards(server.url, tmp_path, ["train"], QUICK)))
    second.start()
    second.join(1.5)
    assert second.is_alive(), "not before everything is there"
    first.kill()
    first.join()
    second.join(600)
    assert files_of(found[0]).items() < files_of(shards).items()
    for name in ("train-000000.tar", "train-000002.tar", "train.index.npy"):
        assert server.requests.count(name) == 1, "once for both"
    assert server.requests.count(SHARD) == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stall", "drip", 503])
def test_a_signal_ends_a_run_that_downloads(server: Server, shards: Path, tmp_path: Path, fault: Fault) -> None:
    server.faults[SHARD] = repeat(fault)
    command = [sys.executable, str(ROOT / "train.py"), *TINY, f"data.root={server.url}", "data.cache=cache", "name=a"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        server.await_request(SHARD)
        process.terminate()
        said = process.communicate()[1]
    assert process.returncode == 75 and "SIGTERM: stopped before the first batch\n" in said, said
    assert "Traceback" not in said and not list(tmp_path.rglob(SHARD)) and not (tmp_path / "outputs").exists(), said
    server.faults.clear()
    assert files_of(download_shards(server.url, tmp_path / "cache", ["train", "val"], QUICK)) == files_of(shards)
