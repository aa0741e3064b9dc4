"""Shards in buckets (S3, Google) and on the Hugging Face hub: local servers, with every fault, one at a time."""

import io
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from signal import SIGKILL, SIGTERM
from subprocess import PIPE, Popen
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import boto3
import pytest
from fsspec.config import conf
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
from huggingface_hub.utils import _http
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from test_remote import QUICK, SHARD, files_of
from werkzeug.serving import make_server

from data.remote import download_shards
from repghost.errors import UserError

logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)


class Store:
    """A server of shards; `faults[file]` is what goes wrong with the requests for a file, one by one.

    protocol: fsspec's. root: URL of the shards. nowhere: a URL whose bucket or repository is not there.
    options: fsspec's.
    """

    protocol: str
    root, nowhere = "bucket/tiny", "none/tiny"
    server: Any

    def __init__(self) -> None:
        self.faults: dict[str, Iterator[str | None]] = {}
        self.requests: list[str] = []
        self.closing = threading.Event()
        self.options: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"{self.protocol}://{self.root}"

    def fault(self, path: str) -> str | None:
        name = unquote(urlsplit(path).path).rpartition("/")[2]
        self.requests.append(name)
        return next(self.faults.get(name, iter(())), None)

    def serve(self) -> None:
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


# -- S3 ----------------------------------------------------------------------------------------------------------------


class S3(Store):
    """moto's server."""

    protocol = "s3"
    xml = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
    statuses: ClassVar = {
        "broken": ("500 Internal Server Error", "InternalError"),
        "busy": ("503 Slow Down", "SlowDown"),
        "forbidden": ("403 Forbidden", "AccessDenied"),
        "expired": ("400 Bad Request", "ExpiredToken"),
    }

    def __init__(self, shards: Path) -> None:
        super().__init__()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=MotoRequestHandler)
        self.serve()
        endpoint = f"http://127.0.0.1:{self.server.port}"
        self.options = {"endpoint_url": endpoint, "key": "me", "secret": "mine"}
        client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="me", aws_secret_access_key="mine")
        client.create_bucket(Bucket="bucket")
        for path in filter(Path.is_file, shards.iterdir()):
            client.put_object(Bucket="bucket", Key=f"tiny/{path.name}", Body=path.read_bytes())

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        fault = self.fault(environ["PATH_INFO"]) if environ["REQUEST_METHOD"] in ("GET", "HEAD") else None
        if fault in self.statuses:
            status, code = self.statuses[fault]
            body = b"" if environ["REQUEST_METHOD"] == "HEAD" else self.xml.format(code, code).encode()
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        answer = self._moto(environ, start_response)
        return self._spoiled(answer, fault) if fault else answer

    def _spoiled(self, answer: Iterable[bytes], fault: str) -> Iterator[bytes]:
        body = b"".join(answer)
        yield body[: len(body) // 2]
        if fault == "stalled":
            self.closing.wait()


# -- servers of http.server --------------------------------------------------------------------------------------------


class Spoiled(BaseHTTPRequestHandler):
    """Answers `statuses[fault]`: a status, a message and headers."""

    store: Store
    statuses: dict[str, tuple[int, str, dict[str, str]]]

    def do_GET(self) -> None:
        fault = self.store.fault(self.path)
        if fault in self.statuses:
            status, message, headers = self.statuses[fault]
            self.answer(status, json.dumps({"error": {"code": status, "message": message}}).encode(), headers)
            return
        connection, self.wfile = self.wfile, io.BytesIO()
        super().do_GET()  # type: ignore[misc]
        answer, self.wfile = self.wfile.getvalue(), connection
        self.wfile.write(answer[: len(answer) // 2] if fault else answer)
        self.wfile.flush()
        if fault == "stalled":
            self.store.closing.wait()

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Google(Store):
    """gcp-storage-emulator."""

    protocol = "gs"

    class Handler(Spoiled, RequestHandler):
        statuses: ClassVar = {
            "broken": (500, "Internal error", {}),
            "busy": (503, "Backend error", {}),
            "forbidden": (403, "me does not have storage.objects.get access", {}),
            "expired": (401, "Invalid Credentials", {}),
            "anonymous": (401, "Anonymous caller does not have storage.objects.get access", {}),
        }

    def __init__(self, shards: Path) -> None:
        super().__init__()
        storage = Storage(use_memory_fs=True)
        buckets.create_bucket("bucket", storage)
        handler = type("Handler", (self.Handler,), {"store": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, storage))
        endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.options = {"endpoint_url": endpoint, "token": "anon"}
        self.serve()
        for path in filter(Path.is_file, shards.iterdir()):
            to = f"{endpoint}/upload/storage/v1/b/bucket/o?uploadType=media&name=tiny%2F{path.name}"
            urlopen(Request(to, path.read_bytes(), {"Content-Type": "application/octet-stream"})).close()


class Files(BaseHTTPRequestHandler):
    """What the hub answers for the data set me/tiny, whose files are those of `folder`."""

    folder: Path

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/api/datasets/me/tiny":
            self.answer(200, json.dumps({"id": "me/tiny", "sha": "0" * 40}).encode(), {})
        elif path == "/api/datasets/me/tiny/tree/main":
            files = [file for file in self.folder.iterdir() if file.is_file()]
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            self.answer(200, json.dumps(entries).encode(), {})
        elif path.startswith("/datasets/me/tiny/resolve/main/"):
            content = (self.folder / path.rpartition("/")[2]).read_bytes()
            begin, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.answer(206, content[begin : end + 1], {"Content-Type": "application/octet-stream"})
        elif path.startswith("/api/datasets/me/tiny/tree/"):
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(401, b"Invalid username or password.", {"X-Error-Code": "RepoNotFound"})


class Hub(Store):
    """A stand-in for the Hugging Face hub."""

    protocol = "hf"
    root, nowhere = "datasets/me/tiny", "datasets/me/none"

    class Handler(Spoiled, Files):
        statuses: ClassVar = {
            "broken": (500, "Internal error", {}),
            "busy": (503, "Too busy", {}),
            "forbidden": (403, "Ask for access", {"X-Error-Code": "GatedRepo"}),
            "expired": (401, "Expired", {"X-Error-Message": "Invalid credentials in Authorization header"}),
        }

    def __init__(self, shards: Path) -> None:
        super().__init__()
        handler = type("Handler", (self.Handler,), {"store": self, "folder": shards})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.options = {"endpoint": f"http://127.0.0.1:{self.server.server_address[1]}", "token": False}
        self.serve()


# -- the same for all --------------------------------------------------------------------------------------------------

STORES = {store.protocol: store for store in (S3, Google, Hub)}


@pytest.fixture(scope="module", params=STORES)
def started(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    none = str(tmp_path_factory.mktemp("stores") / "none")
    own = ("AWS_", "GOOGLE_", "GCLOUD_", "GCSFS_", "STORAGE_EMULATOR_HOST", "HF_")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(own)]:
            patch.delenv(name)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "CLOUDSDK_CONFIG"):
            patch.setenv(name, none)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # or it looks for credentials on the network
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setenv("NO_PROXY", "127.0.0.1")
        # The server would log to what stderr was at its first request, which pytest has closed by the second; and the
        # hub's client to what stdout was in an earlier test, where Hydra has set up logging for all libraries.
        for library in ("werkzeug", "httpx2", "httpx"):
            patch.setattr(logging.getLogger(library), "disabled", True)
        patch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))  # the hub's waits
        store = STORES[request.param](shards)
        yield store
        store.close()


@pytest.fixture
def store(started: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setitem(conf, started.protocol, started.options)
    started.requests.clear()
    yield started
    started.faults.clear()
    started.closing.set()
    started.closing = threading.Event()


def test_a_store_is_read_like_a_folder(store: Store, shards: Path, tmp_path: Path) -> None:
    folder = download_shards(store.url, tmp_path / "cache", ["train", "val"], QUICK)
    assert files_of(folder) == files_of(shards)
    requests = store.requests.count(SHARD)
    assert download_shards(f"{store.url}/", tmp_path / "cache", ["train"], QUICK) == folder
    assert store.requests.count(SHARD) == requests, "what is there is not fetched again"


@pytest.mark.parametrize("faults", [["broken"], ["busy"], ["busy", "busy"], ["cut"], ["broken", "cut"]])
@pytest.mark.parametrize("name", ["manifest.json", SHARD])
def test_a_fault_that_passes(store: Store, shards: Path, tmp_path: Path, name: str, faults: list[str]) -> None:
    store.faults[name] = chain(faults)
    folder = download_shards(store.url, tmp_path / "cache", ["train"], QUICK)
    assert files_of(folder).items() < files_of(shards).items()


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("manifest.json", "forbidden", "refused .*(AccessDenied|Forbidden|gated)"),
        (SHARD, "forbidden", "refused .*(AccessDenied|Forbidden|gated)"),
        ("manifest.json", "expired", "refused .*([Ee]xpired|Invalid [Cc]redentials)"),
        ("manifest.json", "busy", "(SlowDown|Slow Down|Backend error|503).*given up after 3 attempts"),
        (SHARD, "broken", "([Ii]nternal ?[Ee]rror|500).*given up after 3 attempts"),
        (SHARD, "cut", "given up after 3 attempts"),
    ],
)
def test_a_fault_that_stays_is_one_line(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, fault: str, message: str
) -> None:
    store.faults[name] = repeat(fault)
    with pytest.raises(UserError, match=f"{store.url}/{name}: .*{message}") as error:
        download_shards(store.url, tmp_path / "cache", ["train"], QUICK)
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.glob(f"cache/staged/*/{name}"))
    said = capfd.readouterr().err
    assert all("downloading" in line for line in said.splitlines() if line), said


def test_what_is_not_there(store: Store, tmp_path: Path) -> None:
    for url, what in ((f"{store.url}/none", "not there"), (f"{store.protocol}://{store.nowhere}", "bucket|repository")):
        with pytest.raises(UserError, match=rf"{url}/manifest\.json: .*({what})") as error:
            download_shards(url, tmp_path / "cache", ["train"], QUICK)
        assert len(str(error.value).splitlines()) == 1


def test_no_credentials(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"key", "secret", "token"}
    monkeypatch.setitem(conf, store.protocol, {k: v for k, v in store.options.items() if k not in secrets})
    store.faults["manifest.json"] = repeat("anonymous" if store.protocol == "gs" else "forbidden")
    with pytest.raises(UserError, match=rf"{store.url}.*([Cc]redentials|Anonymous caller|gated)"):
        download_shards(store.url, tmp_path / "cache", ["train"], QUICK)


def test_no_such_host(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = "endpoint" if store.protocol == "hf" else "endpoint_url"
    monkeypatch.setitem(conf, store.protocol, store.options | {endpoint: "http://nowhere.invalid:1"})
    with pytest.raises(UserError, match=rf"{store.url}.*refused"):
        download_shards(store.url, tmp_path / "cache", ["train"], QUICK)


# -- processes that end in the middle ----------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from fsspec.config import conf
from data.remote import download_shards
from repghost.errors import run_command

protocol, options, url, cache = json.loads(sys.argv[1])
conf[protocol] = options
sys.exit(run_command(lambda: download_shards(url, cache, ["train"]) and 0))
"""


def end_download(store: Store, cache: Path, fault: str, number: int) -> tuple[int, str]:
    """Sends a signal to a process that waits for SHARD; returns its exit code and what it said."""
    store.faults[SHARD] = repeat(fault)
    argument = json.dumps([store.protocol, store.options, store.url, str(cache)])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with Popen([sys.executable, "-c", PROGRAM, argument], env=environment, stderr=PIPE, text=True) as process:
        while SHARD not in store.requests:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate()[1]
    store.faults.clear()
    return process.returncode, said


def test_a_killed_download_resumes(store: Store, shards: Path, tmp_path: Path) -> None:
    assert end_download(store, tmp_path / "cache", "stalled", SIGKILL)[0] == -SIGKILL
    folder = download_shards(store.url, tmp_path / "cache", ["train"], QUICK)
    assert files_of(folder).items() < files_of(shards).items()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stalled", "busy"])
def test_a_signal_ends_a_download(store: Store, shards: Path, tmp_path: Path, fault: str) -> None:
    code, said = end_download(store, tmp_path / "cache", fault, SIGTERM)
    assert code == 128 + SIGTERM and "ended by SIGTERM\n" in said and "Traceback" not in said, said
    assert not list(tmp_path.rglob(f"*{SHARD}*.tmp")) and not list(tmp_path.rglob(SHARD))
    folder = download_shards(store.url, tmp_path / "cache", ["train"], QUICK)
    assert files_of(folder).items() < files_of(shards).items()
