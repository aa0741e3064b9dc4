"""Shards in a bucket: moto's S3 server, with every fault that S3 has, one at a time."""

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import boto3
import pytest
from fsspec.config import conf
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from test_remote import QUICK, SHARD, files_of
from werkzeug.serving import make_server

from data.remote import download_shards
from repghost.errors import UserError

ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
FAULTS = {
    "broken": ("500 Internal Server Error", "InternalError"),
    "busy": ("503 Slow Down", "SlowDown"),
    "forbidden": ("403 Forbidden", "AccessDenied"),
    "expired": ("400 Bad Request", "ExpiredToken"),
}


class Store:
    """An S3 server with the shards in the bucket `bucket`; `faults[file]` is what goes wrong, request by request."""

    def __init__(self, shards: Path) -> None:
        self.faults: dict[str, Iterator[str | None]] = {}
        self.requests: list[str] = []
        self.closing = threading.Event()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=MotoRequestHandler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.options = {"endpoint_url": f"http://127.0.0.1:{self.server.port}", "key": "me", "secret": "mine"}
        client = boto3.client(
            "s3", endpoint_url=self.options["endpoint_url"], aws_access_key_id="me", aws_secret_access_key="mine"
        )
        client.create_bucket(Bucket="bucket")
        for path in filter(Path.is_file, shards.iterdir()):
            client.put_object(Bucket="bucket", Key=f"tiny/{path.name}", Body=path.read_bytes())

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        name = environ["PATH_INFO"].rpartition("/")[2]
        fault = next(self.faults.get(name, iter(())), None) if environ["REQUEST_METHOD"] in ("GET", "HEAD") else None
        self.requests.append(name)
        if fault in FAULTS:
            status, code = FAULTS[fault]
            body = b"" if environ["REQUEST_METHOD"] == "HEAD" else ERROR.format(code, code).encode()
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        answer = self._moto(environ, start_response)
        return self._spoiled(answer, fault) if fault else answer

    def _spoiled(self, answer: Iterable[bytes], fault: str) -> Iterator[bytes]:
        body = b"".join(answer)
        yield body[: len(body) // 2]
        if fault == "stalled":
            self.closing.wait()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.thread.join()


@pytest.fixture
def store(shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # or it looks for credentials on the network
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    store = Store(shards)
    monkeypatch.setitem(conf, "s3", store.options)
    yield store
    store.close()


def test_a_bucket_is_read_like_a_folder(store: Store, shards: Path, tmp_path: Path) -> None:
    folder = download_shards("s3://bucket/tiny", tmp_path / "cache", ["train", "val"], QUICK)
    assert files_of(folder) == files_of(shards)
    assert download_shards("s3://bucket/tiny/", tmp_path / "cache", ["train"], QUICK) == folder
    assert store.requests.count(SHARD) <= 2, "what is there is not fetched again"


@pytest.mark.parametrize("faults", [["broken"], ["busy"], ["busy", "busy"], ["cut"], ["broken", "cut"]])
@pytest.mark.parametrize("name", ["manifest.json", SHARD])
def test_a_fault_that_passes(store: Store, shards: Path, tmp_path: Path, name: str, faults: list[str]) -> None:
    store.faults[name] = chain(faults)
    folder = download_shards("s3://bucket/tiny", tmp_path / "cache", ["train"], QUICK)
    assert files_of(folder).items() < files_of(shards).items()


@pytest.mark.parametrize(
    ("url", "fault", "message"),
    [
        ("s3://bucket/none", {}, r"s3://bucket/none/manifest\.json: not there"),
        ("s3://none/tiny", {}, r"s3://none/tiny/manifest\.json: .*bucket"),
        ("s3://bucket/tiny", {"manifest.json": "forbidden"}, r"manifest\.json: refused \(.*(AccessDenied|Forbidden)"),
        ("s3://bucket/tiny", {SHARD: "forbidden"}, rf"{SHARD}: refused"),
        ("s3://bucket/tiny", {"manifest.json": "expired"}, r"manifest\.json: refused .*([Ee]xpired)"),
        ("s3://bucket/tiny", {"manifest.json": "busy"}, r"manifest\.json: .*given up after 3 attempts"),
        ("s3://bucket/tiny", {SHARD: "broken"}, rf"{SHARD}: .*given up after 3 attempts"),
        ("s3://bucket/tiny", {SHARD: "cut"}, rf"{SHARD}: .*given up after 3 attempts"),
    ],
)
def test_a_fault_that_stays_is_one_line(
    store: Store, tmp_path: Path, url: str, fault: dict[str, str], message: str
) -> None:
    store.faults |= {name: repeat(kind) for name, kind in fault.items()}
    with pytest.raises(UserError, match=message) as error:
        download_shards(url, tmp_path / "cache", ["train"], QUICK)
    assert len(str(error.value).splitlines()) == 1


def test_no_credentials(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conf, "s3", {"endpoint_url": store.options["endpoint_url"]})
    with pytest.raises(UserError, match=r"s3://bucket/tiny.*credentials"):
        download_shards("s3://bucket/tiny", tmp_path / "cache", ["train"], QUICK)


def test_no_such_host(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conf, "s3", store.options | {"endpoint_url": "http://nowhere.invalid:1"})
    with pytest.raises(UserError, match=r"s3://bucket/tiny.*nowhere\.invalid"):
        download_shards("s3://bucket/tiny", tmp_path / "cache", ["train"], QUICK)


def test_a_killed_download_resumes(store: Store, shards: Path, tmp_path: Path) -> None:
    store.faults[SHARD] = chain([None], repeat("stalled"))  # after the request for its size
    process = multiprocessing.get_context("spawn").Process(
        target=download_from, args=(store.options, tmp_path / "cache")
    )
    process.start()
    while SHARD not in store.requests:
        assert process.is_alive()
        process.join(0.05)
    process.kill()
    process.join()
    store.faults.clear()
    folder = download_shards("s3://bucket/tiny", tmp_path / "cache", ["train"], QUICK)
    assert files_of(folder).items() < files_of(shards).items()


def download_from(options: dict[str, str], cache: Path) -> None:
    """For a process of its own."""
    conf["s3"] = options
    download_shards("s3://bucket/tiny", cache, ["train"], QUICK)
