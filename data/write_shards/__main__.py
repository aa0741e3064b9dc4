"""python -m data.write_shards FORMAT SRC... OUT: images of any of the four layouts to shards."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data.parallel import available_cpus
from data.write_shards.archives import list_archives
from data.write_shards.folder import list_folder
from data.write_shards.kaggle import list_kaggle
from data.write_shards.parquet import list_parquet
from data.write_shards.source import SPLITS, Listing
from data.write_shards.write import IMAGES_PER_SHARD, write_shards
from repghost.errors import run_command

SETTINGS = ("images_per_shard", "seed", "resize", "quality", "workers", "skip_bad")  # of write_shards


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 written, 2 a mistake of the user (one line on stderr), 130 interrupted."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _write(options))


def _write(options: argparse.Namespace) -> None:
    listing: dict[str, Callable[[], Listing]] = {
        "folder": lambda: list_folder(options.src, options.split),
        "archives": lambda: list_archives(options.src, options.workers),
        "kaggle": lambda: list_kaggle(options.src),
        "parquet": lambda: list_parquet(options.src),
    }
    settings = {name: getattr(options, name) for name in SETTINGS}
    write_shards(listing[options.format](), options.out, **settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.write_shards",
        description="Writes images to webdataset shards with an index, decoding each one as a check.",
        epilog="python -m data.write_shards FORMAT --help explains a format.",
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    common = _common_options()
    # The help of a format is the docstring of its function.
    for listing in (list_folder, list_archives, list_kaggle, list_parquet):
        name, text = listing.__name__.removeprefix("list_"), listing.__doc__ or ""
        layout = formats.add_parser(name, parents=[common], help=text.partition(".\n")[0], description=text)
        if listing is list_folder:
            layout.add_argument("--split", choices=SPLITS, help="SRC holds the class folders of this split")
        if listing is list_archives:
            layout.add_argument("src", type=Path, nargs=3, metavar="ARCHIVE")
        else:
            layout.add_argument("src", type=Path, metavar="SRC")
        layout.add_argument("out", type=Path, metavar="OUT", help="folder for the shards; run again to resume")
    return parser


def _common_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)

    def add(name: str, low: int, high: int | None, default: int | None, metavar: str, text: str) -> None:
        shown = "" if default is None else " (default %(default)s)"
        parser.add_argument(name, type=_whole_number(low, high), default=default, metavar=metavar, help=text + shown)

    add("--images-per-shard", 1, None, IMAGES_PER_SHARD, "S", "images in each tar")
    add("--seed", 0, None, 0, "N", "of the order of the images")
    resize = "reduce images with a shorter side above N pixels to N (bicubic, RGB JPEG); others keep their bytes"
    add("--resize", 1, None, None, "N", resize)
    add("--quality", 1, 100, 90, "Q", "of the JPEGs of --resize")
    add("--workers", 1, None, available_cpus(), "N", "processes")
    add("--skip-bad", 0, None, 0, "N", "leave out up to N images that do not decode; one more ends the run")
    return parser


def _whole_number(low: int, high: int | None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 on")
        if not low <= int(text) <= (high or int(text)):
            raise argparse.ArgumentTypeError(f"must be {low} to {high}" if high else f"must be {low} or more")
        return int(text)

    return parse


if __name__ == "__main__":
    sys.exit(main())
