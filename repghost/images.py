"""Image files outside of shards: finding them, reading them, and what evaluation does to their pixels.

The preprocessing is that of evaluation, by torchvision's own transforms. Like there, the EXIF orientation is not
applied, transparency is dropped and grey becomes RGB with three equal channels; 16 bits become 8, and of several
pictures in a file the first counts. Whatever reads an image, in `data` too, opens it by `open_image` or with `FORMATS`.
Nothing here waits without an end or reads without a limit.
Check: `pytest tests/test_images.py tests/test_predict.py`.
"""

import errno
import io
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from string import punctuation
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit
from urllib.request import Request, url2pathname, urlopen

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from repghost.errors import UserError, printable
from repghost.files import read_file
from repghost.reference import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from torchvision.transforms.v2 import Compose

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# What is opened as an image, by PIL's names: the formats of EXTENSIONS. PIL knows many more, and goes by the content:
# an EPS named a.jpg would be run by Ghostscript. MPO, which cameras write, is opened as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SCHEMES = ("http://", "https://", "file://")  # what is read as a URL
TIMEOUT = 30  # seconds without a byte from a server
URL_SECONDS = 60  # for a whole image
URL_BYTES = 100_000_000  # of an image; several times a camera's raw file
FILE_BYTES = 500_000_000  # of an image file; about what PIL's limit of pixels is with 16 bits a channel, uncompressed
LEFT_OUT = ("@eadir", "__macosx")  # folders that a NAS or macOS fills with previews, beside the hidden ones
_KERNEL = ("/proc", "/sys", "/dev")  # what the kernel makes up: without an end, or waiting when it is read
_opening = threading.Lock()  # warnings.catch_warnings is for one thread at a time


class DecodeError(ValueError):
    """Bytes that are no image, or one that cannot be used; the message is the reason, on one line."""


@dataclass(frozen=True)
class Preprocessing:
    """What evaluation does to an image: shorter side resized (bicubic, antialiased), centre cut out, normalized.

    image_size: side of the crop, in pixels. crop_fraction: its share of the shorter side. mean, std: of each channel
    (RGB), for pixels in [0, 1]. The defaults are those of the published weights.
    """

    image_size: int = 224
    crop_fraction: float = 0.875
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def shorter_side(self) -> int:
        """Of the resized image, in pixels."""
        return int(self.image_size / self.crop_fraction)

    def transform(self) -> "Compose":
        """PIL image or uint8 [..., 3, H, W] to normalized float32 [..., 3, image_size, image_size]."""
        import torch  # slow to import, and not needed to read an image
        from torchvision.transforms import v2

        resized = (v2.ToImage(), v2.Resize(self.shorter_side, v2.InterpolationMode.BICUBIC, antialias=True))
        normalized = (v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std))
        return v2.Compose([*resized, v2.CenterCrop(self.image_size), *normalized, v2.ToPureTensor()])


# --- finding files --------------------------------------------------------------------------------


def image_files(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """The image files that `paths` (files, folders, URLs) stand for, in their order; nothing is opened.

    A folder gives all files below it that have an image's extension, sorted by name within each folder, without hidden
    ones. Files and URLs are taken whatever their names.
    """
    for path in (os.fspath(path) for path in paths):
        yield from filter(is_image, walk_files(path)) if os.path.isdir(path) else [path]


def is_url(path: str) -> bool:
    return path.startswith(SCHEMES)


def is_image(path: str) -> bool:
    """Whether a file has an image's extension and is not hidden; macOS writes a "._a.jpg" beside a.jpg."""
    name = os.path.basename(path)
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def walk_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Every file below `folder`, sorted by name within every folder, without those in hidden folders and LEFT_OUT.

    Links are followed, except to a folder that was visited before or that contains `folder`, and into the kernel's.
    Raises UserError for a folder that cannot be read.
    """
    if _of_kernel(os.path.realpath(folder)):
        raise UserError(f"{printable(os.fspath(folder))}: a folder of the system, not of images")
    visited = {str(parent) for parent in Path(folder).resolve().parents}

    def stop(error: OSError) -> None:
        raise UserError(f"{printable(os.fsdecode(error.filename))}: {error.strerror}")

    for path, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if (real := os.path.realpath(path)) in visited or _of_kernel(real):
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name.casefold() not in LEFT_OUT)
        for name in sorted(names):
            yield os.path.join(path, name)


def _of_kernel(path: str) -> bool:
    """Whether a real path lies where files are made up as they are read; /dev/shm is an ordinary folder in memory."""
    return any(path == top or path.startswith(f"{top}/") for top in _KERNEL) and not path.startswith("/dev/shm")


# --- reading them ---------------------------------------------------------------------------------


def read_image(path: str) -> Image.Image:
    """The image in a file or at a URL, in RGB.

    Raises OSError, also for what is no regular file, for more than FILE_BYTES (URL_BYTES) and for a server that takes
    longer than URL_SECONDS; ValueError for a URL that is none; and DecodeError.
    """
    if path.startswith("file://"):
        path = url2pathname(urlsplit(path).path)
    return decode(_download(path) if is_url(path) else read_file(path, FILE_BYTES))


def _download(url: str) -> bytes:
    """What a server answers, in a thread that nobody waits for any longer than URL_SECONDS."""
    answered = in_a_thread(lambda: _read_url(url))
    if not wait([answered], URL_SECONDS).done:
        raise _too_late(url)
    return answered.result()


def in_a_thread(action: Callable[[], Any]) -> Future[Any]:
    """The outcome of `action` in a thread that the process's end does not wait for."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _too_late(url: str) -> TimeoutError:
    return TimeoutError(errno.ETIMEDOUT, f"not read within {URL_SECONDS} s", url)


def _read_url(url: str) -> bytes:
    content, end = bytearray(), time.monotonic() + URL_SECONDS
    # Umlauts and spaces are sent as browsers do. Some servers refuse clients without a name.
    request = Request(quote(url, safe=punctuation), headers={"User-Agent": "repghost"})
    with urlopen(request, timeout=TIMEOUT) as answer:
        while piece := answer.read1(2**16):
            content += piece
            if len(content) > URL_BYTES:
                raise OSError(errno.EINVAL, f"larger than {URL_BYTES / 1e6:,.0f} MB", url)
            if time.monotonic() > end:  # what was read is not all of it
                raise _too_late(url)
    return bytes(content)


# --- from bytes to pixels -------------------------------------------------------------------------


def open_image(data: bytes, decode: bool) -> Image.Image:
    """The image in `data`, header only or fully decoded.

    Raises DecodeError for other formats than FORMATS, damage, decompression bombs and pixels without a fixed range.
    """
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about odd EXIF data
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if decode:
                image.load()
        _check_range(image)
        return image
    except UnidentifiedImageError:
        raise DecodeError("not an image in a known format") from None
    except (MemoryError, DecodeError):
        raise
    except Exception as error:  # PIL's decoders raise anything on damaged data
        raise DecodeError(" ".join(printable(f"{type(error).__name__}: {error}").split())) from None


def decode(content: bytes) -> Image.Image:
    """The image in the content of a file, in RGB. Raises DecodeError."""
    image = open_image(content, decode=False)
    try:
        return to_rgb(image)
    except (MemoryError, DecodeError):
        raise
    except Exception as error:
        raise DecodeError(" ".join(printable(f"{type(error).__name__}: {error}").split())) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL's conversion to RGB, but 16 bits are scaled to 8, where PIL clips: most of such an image would be white.

    Raises DecodeError for pixels without a fixed range and for a mode without such a conversion, and what PIL raises
    for damage.
    """
    _check_range(image)
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise DecodeError(str(error)) from None


def _check_range(image: Image.Image) -> None:
    """Raises DecodeError where nobody knows which value is white."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    # PIL opens a PGM of 16 bits as I, scaled to 65535.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG")):
        raise DecodeError("float and 32-bit images have no fixed range: save it with 8 or 16 bits a channel")
    # Of 12 bits, or with 0 as white (TIFF 6.0, pages 29 and 37), which PIL gives as if they were not.
    if image.mode.startswith("I;16") and tags and (tags.get(258) != (16,) or tags.get(262) != 1):
        raise DecodeError("a TIFF of 12 bits or with 0 as white: save it with 8 or 16 bits a channel and 0 as black")
