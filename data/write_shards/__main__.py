"""python -m data.write_shards FORMAT SRC... OUT: images of any of the five layouts to shards."""

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
from data.write_shards.source import IMAGES_PER_SHARD, SPLITS, Listing
from repghost.errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 written, 2 a mistake of the user (one line on stderr), 130 interrupted."""
    options = vars(_parser().parse_args(arguments))
    return run_command(lambda: _write(**options))


def _write(format: str, layout: Callable[..., Listing], src: Path, out: Path, **options: Any) -> None:
    from data.write_shards.write import write_shards  # slow to import, by way of webdataset, and not for --help

    own = {
        "folder": {
            "split": options.pop("split", None),
            "val_share": options.pop("val_share", None),
            "seed": options["seed"],
        },
        "archives": {"workers": options["workers"]},
        "coco": {
            "train": options.pop("train", None),
            "val": options.pop("val", None),
            "skip_bad": options["skip_bad"],
        },
    }  # arguments of the format's function
    write_shards(layout(src, **own.get(format, {})), out, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.write_shards",
        description="Writes images to webdataset shards with an index, decoding each one as a check.",
        epilog="python -m data.write_shards FORMAT --help explains a format.",
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    # The help of a format is the docstring of its function.
    for layout in (list_folder, list_archives, list_kaggle, list_parquet, list_coco):
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
        _add_options(command, resize=layout is not list_coco)
    return parser


def _add_options(parser: argparse.ArgumentParser, resize: bool) -> None:
    def add(name: str, low: int, high: int | None, default: int | None, metavar: str, text: str) -> None:
        shown = "" if default is None else " (default %(default)s)"
        parser.add_argument(name, type=whole_number(low, high), default=default, metavar=metavar, help=text + shown)

    add("--images-per-shard", 1, None, IMAGES_PER_SHARD, "S", "images in each tar")
    add("--seed", 0, 2**63 - 1, 0, "N", "of the order of the images, and of the draw for --val-share")
    if resize:  # boxes and masks belong to the pixels of the image
        text = "reduce images with a shorter side above N pixels to N (bicubic, RGB JPEG); others keep their bytes"
        add("--resize", 1, None, None, "N", text)
        add("--quality", 1, 100, 90, "Q", "of the JPEGs of --resize")
    add("--workers", 1, None, None, "N", "processes (default: one a core, one for few images)")
    add("--skip-bad", 0, None, 0, "N", "leave out up to N images that do not decode; one more ends the run")


if __name__ == "__main__":
    sys.exit(main())
