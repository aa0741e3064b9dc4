"""What is read as an image, from which files and servers, in which formats, and that everybody sees the same one."""

import errno
import io
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from images import encoded, make_class_folders, patch
from PIL import Image

from data.index import load_index, main
from data.reader import ShardReader
from data.write_shards.__main__ import main as write_shards_command
from data.write_shards.folder import list_folder
from data.write_shards.write import write_shards
from repghost import files, images
from repghost.errors import UserError, printable
from repghost.export.photographs import read_photographs
from repghost.files import locked, read_class_names, read_file
from repghost.images import DecodeError, decode, image_files, read_image, walk_files

# --- the same picture everywhere ----------------------------------------------------------------------------------

RAMP = np.arange(72 * 80, dtype=np.uint16).reshape(72, 80) * 11  # grey values of 16 bits, up to 63,349
PHOTO = patch(3, 72, 90)


def deep_rgb_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which PIL reads and does not write. values: uint16 [H, W, 3]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def several(extension: str) -> bytes:
    buffer = io.BytesIO()
    PHOTO.save(buffer, extension.upper(), save_all=True, append_images=[PHOTO.transpose(Image.Transpose.ROTATE_180)])
    return buffer.getvalue()


def clear_first_colour(extension: str) -> bytes:
    buffer = io.BytesIO()
    PHOTO.convert("P").save(buffer, extension.upper(), transparency=0)
    return buffer.getvalue()


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


RGB16 = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)
PICTURES: dict[str, tuple[bytes, np.ndarray]] = {  # {file: (content, pixels)}
    "sixteen.pgm": (b"P5 80 72 65535\n" + RAMP.astype(">u2").tobytes(), grey(RAMP // 257)),
    "thousand.pgm": (
        b"P5 80 72 1000\n" + (RAMP % 1001).astype(">u2").tobytes(),
        grey(np.rint((RAMP % 1001) / 1000 * 65535) // 257),
    ),
    "sixteen.png": (encoded(Image.fromarray(RAMP), "png"), grey(RAMP // 257)),
    "sixteen.tiff": (encoded(Image.fromarray(RAMP), "tiff"), grey(RAMP // 257)),
    "colours16.png": (deep_rgb_png(RGB16), (RGB16 >> 8).astype(np.uint8)),
    "colours16.ppm": (b"P6 80 72 65535\n" + RGB16.astype(">u2").tobytes(), (RGB16 // 257).astype(np.uint8)),
    "grey_clear.png": (encoded(PHOTO.convert("LA"), "png"), rgb(PHOTO.convert("L"))),
    "clear.png": (encoded(PHOTO.convert("RGBA"), "png"), rgb(PHOTO)),
    "clear.gif": (clear_first_colour("gif"), rgb(PHOTO.convert("P"))),
    "clear_palette.png": (clear_first_colour("png"), rgb(PHOTO.convert("P"))),
    "bits.tif": (encoded(PHOTO.convert("1"), "tif"), rgb(PHOTO.convert("1"))),
    "ink.tif": (encoded(PHOTO.convert("CMYK"), "tif"), rgb(PHOTO.convert("CMYK"))),
    "photo.bmp": (encoded(PHOTO, "bmp"), rgb(PHOTO)),
    "pages.tif": (several("tiff"), rgb(PHOTO)),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class folders; in the first are the PICTURES."""
    root = make_class_folders(tmp_path_factory.mktemp("pictures") / "in", ("a", "b"), per_class=1)
    for name, (content, _) in PICTURES.items():
        (root / "a" / name).write_bytes(content)
    return root


def in_shards(root: Path, out: Path, resize: int | None = None) -> dict[str, np.ndarray]:
    """{key: pixels uint8 [H, W, 3]} as a loader decodes what write_shards stored."""
    write_shards(list_folder(root, "train"), out, workers=1, quiet=True, resize=resize, quality=98)
    index = load_index(out, "train", out)
    reader = ShardReader(index)
    pixels = [reader.decode(row, reader.read(row)).permute(1, 2, 0).numpy() for row in range(len(index))]
    assert main([str(out), "--split", "train", "--verify", "--workers", "1"]) == 0
    return dict(zip(index.keys(), pixels, strict=True))


def key(name: str) -> str:
    stem, _, extension = name.partition(".")
    alone = sum(other.startswith(f"{stem}.") for other in PICTURES) == 1
    return f"a_{stem}" if alone else f"a_{stem}_{extension}"


def test_everybody_sees_the_same_picture(pictures: Path, tmp_path: Path) -> None:
    """Stored as it is or converted, read from a file or from a shard."""
    stored = in_shards(pictures, tmp_path / "out")
    for name, (_, pixels) in PICTURES.items():
        seen = np.asarray(read_image(str(pictures / "a" / name)))
        assert np.abs(seen.astype(int) - pixels).max() <= (1 if "16" in name or "thousand" in name else 0), name
        assert np.array_equal(stored[key(name)], seen), name


def test_reduced_pictures_are_the_same_too(pictures: Path, tmp_path: Path) -> None:
    reduced = in_shards(pictures, tmp_path / "out", resize=48)
    for name in PICTURES:
        image = read_image(str(pictures / "a" / name))
        size = tuple(48 * side // min(image.size) for side in image.size)
        expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC), int)
        assert np.abs(reduced[key(name)].astype(int) - expected).mean() < 12, name


def twelve_bits() -> bytes:
    """A TIFF that says that its 16 bits are 12, which PIL would show 16 times as dark."""
    data = bytearray(encoded(Image.fromarray(RAMP), "tif"))
    entry = data.index(struct.pack("<HHI", 258, 3, 1))
    data[entry + 8 : entry + 10] = struct.pack("<H", 12)
    return bytes(data)


NO_RANGE = "no fixed range"
REFUSED = {
    "float": (encoded(Image.fromarray(RAMP.astype(np.float32)), "tif"), NO_RANGE),
    "32 bits": (encoded(Image.fromarray(RAMP.astype(np.int32)), "tif"), NO_RANGE),
    "portable float": (b"Pf\n80 72\n-1.0\n" + RAMP.astype("<f4").tobytes(), NO_RANGE),
    "12 bits": (twelve_bits(), "12 bits"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "known format"),
    "Targa": (encoded(PHOTO, "tga"), "known format"),
    "icon": (encoded(PHOTO, "ico"), "known format"),
    "nothing": (b"", "known format"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_image_for_one_is_none_for_anybody(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    with pytest.raises(DecodeError, match=message):
        decode(content)
    root = make_class_folders(tmp_path / "in", ("a", "b"), per_class=1)
    (root / "a" / "x.jpg").write_bytes(content)
    for resize in (None, 16):
        with pytest.raises(UserError, match=rf"a/x\.jpg: .*{message}"):
            write_shards(list_folder(root, "train"), tmp_path / "out", workers=1, quiet=True, resize=resize)
        (tmp_path / "out").rename(tmp_path / f"out{resize}")
    with pytest.raises(UserError, match=rf"x\.jpg: cannot be read as an image \(.*{message}"):
        read_photographs(root / "a", 2)


def test_a_bomb_is_refused_by_its_header() -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, "PNG")
    with pytest.raises(DecodeError, match="DecompressionBomb"):
        decode(buffer.getvalue())


# --- what is no file ----------------------------------------------------------------------------------------------


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


NO_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "socket": listening,
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("case", NO_FILES)
def test_what_is_no_file_is_never_waited_for(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "in" / "a" / "x.jpg"
    path.parent.mkdir(parents=True)
    NO_FILES[case](path)
    for name in (str(path), path.as_uri()):
        with pytest.raises((OSError, DecodeError)):
            read_image(name)
    with pytest.raises((UserError, OSError)):
        read_photographs(path, 1)
    with pytest.raises(UserError):
        read_class_names(path)
    assert list(image_files([tmp_path])) == ([] if case == "folder" else [str(path)])


@pytest.mark.parametrize("layout", ["archives", "parquet"])
def test_sources_that_are_no_files_are_not_waited_for(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "archives": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"),
        "parquet": ("train-0.parquet", "validation-0.parquet"),
    }[layout]
    for name in names:
        os.mkfifo(tmp_path / name)
    sources = [str(tmp_path / name) for name in names] if layout == "archives" else [str(tmp_path)]
    assert write_shards_command([layout, *sources, str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith(f"{names[0]}: not a regular file\n")


def test_a_file_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(1000))
    assert len(read_file(tmp_path / "x", 1000)) == 1000
    with pytest.raises(OSError, match="larger than 0 MB"):
        read_file(tmp_path / "x", 999)
    os.truncate(tmp_path / "x", 10**12)  # takes no space
    with pytest.raises(OSError, match="larger than 500 MB"):
        read_image(str(tmp_path / "x"))


def test_folders_of_the_kernel_are_not_searched(tmp_path: Path) -> None:
    for folder in ("/proc", "/sys/kernel", "/dev"):
        with pytest.raises(UserError, match=f"{folder}: a folder of the system"):
            list(walk_files(folder))
    (tmp_path / "system").symlink_to("/proc")
    (tmp_path / "@eaDir").mkdir()
    (tmp_path / "@eaDir" / "a.jpg").touch()
    (tmp_path / "a.jpg").touch()
    assert list(walk_files(tmp_path)) == [str(tmp_path / "a.jpg")]


# --- servers ------------------------------------------------------------------------------------------------------


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The URL of a server that answers every request like this."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def write_on(request: BaseHTTPRequestHandler, piece: bytes, pause: float = 0) -> None:
    """Never ends by itself."""
    try:
        while True:
            request.wfile.write(piece)
            time.sleep(pause)
    except OSError:
        pass


def endless(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    write_on(request, bytes(2**16))


def dripping(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    write_on(request, b"\xff", 0.01)


def dripping_headers(request: BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
    write_on(request, b"x", 0.01)


def to_a_file(request: BaseHTTPRequestHandler) -> None:
    request.send_response(302)
    request.send_header("Location", "file:///etc/hostname")
    request.end_headers()


@pytest.mark.parametrize(
    ("answer", "message"),
    [(endless, "larger than 1 MB"), (dripping, "within 1 s"), (dripping_headers, "within 1 s"), (to_a_file, "file:")],
)
def test_a_server_cannot_keep_anybody(
    answer: Callable[[BaseHTTPRequestHandler], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "URL_BYTES", 1_000_000)
    monkeypatch.setattr(images, "URL_SECONDS", 1 if "within" in message else 600)
    with server(answer) as url, pytest.raises(OSError, match=message):
        read_image(f"{url}/a.jpg")


def test_a_url_is_written_as_the_user_sees_it() -> None:
    def by_name(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200 if request.path == "/gr%C3%BCn%20a%20b.jpg?x=1&y=%20" else 404)
        request.end_headers()
        request.wfile.write(encoded(PHOTO))

    with server(by_name) as url:
        assert read_image(f"{url}/grün a%20b.jpg?x=1&y=%20").size == PHOTO.size


# --- class names, locks, names on a terminal ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("cat\ndog\n".encode("utf-8-sig"), ["cat", "dog"]),
        (b"cat\r\n\r\n dog \r\n\n", ["cat", "dog"]),
        (b"cat\rdog", ["cat", "dog"]),
        ("Käfer\n日本　語\n".encode("utf-16"), ["Käfer", "日本　語"]),
        ("a\x85b\n".encode(), r"line 1 is 'a\\x85b', not a name"),
        (b"cat\n\x1b[2Jdog\n", r"line 2 is '\\x1b\[2Jdog', not a name"),
        (b"c\0a\0t\0\n\0", r"line 1 is 'c\\x00a"),
        (b"\xff\xfec", "not UTF-8 text"),
        (b"crane\ndog\ncrane\n", ["crane", "dog", "crane"]),
    ],
)
def test_class_names(content: bytes, found: list[str] | str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    if isinstance(found, list):
        assert read_class_names(tmp_path / "names.txt") == found
    else:
        with pytest.raises(UserError, match=rf"names\.txt: {found}"):
            read_class_names(tmp_path / "names.txt")


def test_a_lock_that_is_held_is_named_and_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "LOCK_NOTICE", 0.1)
    path = tmp_path / "x.lock"
    path.write_text("what a process left that was killed")
    with locked(path, "counting", 0):
        pass
    message = r"x\.lock: held for 0 s by another process, which is counting"
    with FileLock(path), pytest.raises(UserError, match=message), locked(path, "counting", 0.2):
        pass
    assert f"waiting for another process, which is counting (it holds {path})" in caplog.text


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", without)
    message = r"x\.lock: cannot be locked \(No locks available\): use a folder of another"
    with pytest.raises(UserError, match=message), locked(tmp_path / "x.lock", "counting", 1):
        pass


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a b.jpg", "a b.jpg"),
        ("grün 日本　語", "grün 日本　語"),
        ("a\nb", r"a\nb"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\udcffb", r"a\udcffb"),
        ("\u202ea", r"\u202ea"),
    ],
)
def test_names_are_printed_on_one_line(name: str, shown: str) -> None:
    assert printable(name) == shown
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert printable(name, latin).encode("latin-1").decode("latin-1").isprintable() or "　" in name
