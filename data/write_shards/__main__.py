"""python -m data.write_shards FORMAT SRC... OUT: images of any of six layouts to shards."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.arguments import share, whole_number
from data.write_shards.archives import list_archives
from data.write_shards.coco import list_coco
from data.write_shards.folder import list_folder, list_kaggle
from data.write_shards.parquet import list_parquet
from data.write_shards.regions import transcoder
from data.write_shards.shards import list_shards
from data.write_shards.source import IMAGES_PER_SHARD, SPLITS, Listing
from repghost.errors import UserError, run_command

# Arguments of a format's function: options that no other format has, and some that write_shards takes, too.
_OWN = {"folder": ("split", "val_share"), "coco": ("train", "val"), "shards": ("class_names", "cache")}
_SHARED = {"folder": ("seed",), "archives": ("workers",), "coco": ("skip_bad",), "shards": ("workers",)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 written, 2 a mistake of the user (one line on stderr), 130 interrupted."""
    options = vars(_parser().parse_args(arguments))
    return run_command(lambda: _write(**options))


def _write(format: str, layout: Callable[..., Listing], src: Path, out: Path, **options: Any) -> None:
    from data.write_shards.write import write_shards  # slow to import, by way of webdataset, and not for --help

    own = {name: options.pop(name) for name in _OWN.get(format, ())}
    own |= {name: options[name] for name in _SHARED.get(format, ())}
    if options.get("regions"):
        transcoder()  # raises before anything is listed, which may take long
    elif layout is list_shards:
        raise UserError(f"{src}: shards would only be copied: give --regions, for which they are written again")
    write_shards(layout(src, **own), out, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.write_shards",
        description="Writes images to webdataset shards with an index, decoding each one as a check.",
        epilog="python -m data.write_shards FORMAT --help explains a format.",
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    # The help of a format is the docstring of its function.
    for layout in (list_folder, list_archives, list_kaggle, list_parquet, list_coco, list_shards):
        name, text = layout.__name__.removeprefix("list_"), layout.__doc__ or ""
        command = formats.add_parser(name, help=text.partition(".\n")[0], description=text)
        command.set_defaults(layout=layout)
        if layout is list_folder:
            flat = command.add_mutually_exclusive_group()
            flat.add_argument("--split", choices=SPLITS, help="SRC holds the class folders of this split")
            text = "SRC holds class folders: this share of each class is for validation, such as 0.1"
            flat.add_argument("--val-share", type=share, metavar="P", help=text)
        if layout is list_coco:
            for split in SPLITS:
                command.add_argument(f"--{split}", metavar="FILE", help=f"annotations of {split}, in SRC/annotations")
        source: dict[str, Any] = {"nargs": 3, "metavar": "ARCHIVE"} if layout is list_archives else {"metavar": "SRC"}
        command.add_argument("src", type=Path, **source)
        command.add_argument("out", type=Path, metavar="OUT", help="folder for the shards; run again to resume")
        if layout is list_shards:
            command.add_argument("--class-names", type=Path, metavar="FILE", help="of tars of others: a name a line")
            text = "for the index of tars of others (default %(default)s)"
            command.add_argument("--cache", type=Path, default=Path("~/.cache/repghost"), metavar="FOLDER", help=text)
        _add_options(command, written=layout is list_shards, annotated=layout is list_coco)
    return parser


def _add_options(parser: argparse.ArgumentParser, written: bool, annotated: bool) -> None:
    """The options of a format.

    written: of shards that exist, whose images stay where they are. annotated: of images with boxes and masks, which
    belong to their pixels, and which are always decoded whole.
    """

    def add(name: str, low: int, high: int | None, default: int | None, metavar: str, text: str) -> None:
        shown = "" if default is None else " (default %(default)s)"
        parser.add_argument(name, type=whole_number(low, high), default=default, metavar=metavar, help=text + shown)

    if not written:
        add("--images-per-shard", 1, None, IMAGES_PER_SHARD, "S", "images in each tar")
        add("--seed", 0, 2**63 - 1, 0, "N", "of the order of the images, and of the draw for --val-share")
    if not written and not annotated:
        resize = "reduce images with a shorter side above N pixels to N (bicubic, RGB JPEG); others keep their bytes"
        add("--resize", 1, None, None, "N", resize)
        add("--quality", 1, 100, 90, "Q", "of the JPEGs of --resize")
    regions = (
        "rewrite JPEGs without loss (same pixels, EXIF and profiles; other bytes), with restart markers, so that "
        "training decodes only the part under each crop; needs the program jpegtran of libjpeg-turbo"
    )
    if not annotated:
        parser.add_argument("--regions", action="store_true", help=regions)
    add("--workers", 1, None, None, "N", "processes (default: one a core, one for few images)")
    add("--skip-bad", 0, None, 0, "N", "leave out up to N images that do not decode; one more ends the run")


if __name__ == "__main__":
    sys.exit(main())
