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


def _natural(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if _natural(text) == 0:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def _quality(text: str) -> int:
    if not 1 <= _natural(text) <= 100:
        raise argparse.ArgumentTypeError("must be 1 to 100")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.write_shards",
        description="Writes images to webdataset shards with an index, decoding each one as a check.",
        epilog="python -m data.write_shards FORMAT --help explains a format.",
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")

    def add_format(name: str, summary: str, details: str) -> argparse.ArgumentParser:
        return formats.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}")

    folder = add_format(
        "folder",
        "class folders, in train/ and val/",
        "Or the class folders of one split, named by --split; a second run with the other split and the same "
        "OUT adds that one. Labels follow the sorted names of the class folders.",
    )
    folder.add_argument("src", type=Path, metavar="SRC", help="folder that holds train/ and val/, or class folders")
    folder.add_argument("--split", choices=SPLITS, help="SRC holds the class folders of this split")
    archives = add_format(
        "archives",
        "the official ILSVRC2012 tars and devkit",
        "Give ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz as they were "
        "downloaded, in any order. Nothing is unpacked: no more disk is needed than for OUT.",
    )
    archives.add_argument("src", type=Path, nargs=3, metavar="ARCHIVE", help="the three files")
    kaggle = add_format(
        "kaggle",
        "the tree of Kaggle's ImageNet Object Localization Challenge",
        "SRC holds ILSVRC/Data/CLS-LOC and LOC_val_solution.csv.",
    )
    kaggle.add_argument("src", type=Path, metavar="SRC", help="folder that holds ILSVRC, or one inside it")
    parquet = add_format(
        "parquet",
        "the Hugging Face hub's layout",
        "SRC holds data/train-*.parquet and data/validation-*.parquet (or val-*) with the columns image and "
        "label. Row groups are shuffled, then the images of each shard, instead of all images at once.",
    )
    parquet.add_argument("src", type=Path, metavar="SRC", help="a copy of the data set's repository")
    for subparser in (folder, archives, kaggle, parquet):
        _add_options(subparser)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder for the shards; the same command again goes on there")
    add(
        "--images-per-shard",
        type=_positive,
        default=IMAGES_PER_SHARD,
        metavar="S",
        help="images in each tar (default %(default)s)",
    )
    add(
        "--seed",
        type=_natural,
        default=0,
        metavar="N",
        help="of the order of the images (default %(default)s)",
    )
    add(
        "--resize",
        type=_positive,
        metavar="N",
        help="bring a shorter side above N pixels to N (bicubic) and store RGB JPEG; by default, and for "
        "smaller images, the original bytes are stored",
    )
    add(
        "--quality",
        type=_quality,
        default=90,
        metavar="Q",
        help="of the JPEGs of --resize (default %(default)s)",
    )
    add(
        "--workers",
        type=_positive,
        default=available_cpus(),
        metavar="N",
        help="processes (default %(default)s)",
    )
    add(
        "--skip-bad",
        type=_natural,
        default=0,
        metavar="N",
        help="leave out up to N images that do not decode; by default the first one ends the run",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 written, 2 a mistake of the user (one line on stderr), 130 interrupted."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    listings: dict[str, Callable[[], Listing]] = {
        "folder": lambda: list_folder(options.src, options.split),
        "archives": lambda: list_archives(options.src, options.workers),
        "kaggle": lambda: list_kaggle(options.src),
        "parquet": lambda: list_parquet(options.src),
    }
    write_shards(
        listings[options.format](),
        options.out,
        images_per_shard=options.images_per_shard,
        seed=options.seed,
        resize=options.resize,
        quality=options.quality,
        workers=options.workers,
        skip_bad=options.skip_bad,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
