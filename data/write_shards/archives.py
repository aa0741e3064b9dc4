"""The official ILSVRC2012 archives, read in place.

Archives are walked by their tar headers, the tars inside a tar too, at their offsets. Nothing is extracted, and members
that could lead outside (absolute names, "..", links, devices) are refused.
Check: `pytest tests/test_write_shards.py -k archives`.
"""

import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from data.parallel import run_parallel
from data.tars import open_tar
from data.write_shards.source import Entry, Listing, Source, read_parts, unique_keys, with_class
from repghost.errors import UserError
from repghost.files import regular_file
from repghost.images import is_image
from repghost.machine import available_cpus

_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"  # in the devkit
Member = tuple[str, int, int]  # the base name, the first byte in the archive, bytes


def list_archives(paths: Sequence[str | Path], workers: int | None = None) -> Listing:
    """The official ILSVRC2012 tars and devkit.

    Give ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz as they were downloaded,
    under these names and in any order. Nothing is unpacked: no more disk is needed than for OUT.
    """
    train, val, devkit = (_path_of(role, paths) for role in ("train", "val", "devkit"))
    classes, labels = _read_devkit(devkit)
    return Listing(devkit, classes, [_list_train(train, classes, workers or available_cpus()), _list_val(val, labels)])


def _path_of(role: str, paths: Sequence[str | Path]) -> str:
    found = [str(path) for path in paths if role in Path(path).name]
    if len(found) != 1:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: {len(found)} of these names contain {role}: give the archives by their own names")
    regular_file(found[0])
    return found[0]


def _members(path: str, start: int = 0, size: int | None = None, content: bytes | None = None) -> Iterator[Member]:
    """The regular files of an uncompressed tar, or of the tar that lies at `start` inside a file.

    content: the bytes of the file, where they are not what lies at `path`.
    """
    with open(path, "rb") if content is None else io.BytesIO(content) as file:
        end = file.seek(0, os.SEEK_END) if size is None else start + size
        file.seek(start)
        with open_tar(path, file) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{path}: the name of member {name} leads outside the archive: refused")
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise UserError(f"{path}: member {name} is a link, device or other special file: refused")
                if not 0 <= member.size <= end - member.offset_data:
                    raise UserError(f"{path}: truncated in {name}: copy it again")
                if member.isreg():
                    yield name.name, member.offset_data, member.size


def _read_devkit(path: str) -> tuple[list[str], list[int]]:
    """WordNet ids of the classes in label order; the labels of validation image 1, 2, ..."""
    from scipy.io import loadmat  # slow to import, and only this layout needs it

    try:
        content = gzip.decompress(Path(path).read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged or not a .tar.gz ({error}): copy it again") from None
    found = {name: content[start : start + size] for name, start, size in _members(path, content=content)}
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(found[_META]), squeeze_me=True)["synsets"])
        wnid_of = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
        classes = sorted(wnid_of.values())
        return classes, [classes.index(wnid_of[int(number)]) for number in found[_TRUTH].split()]
    except Exception as error:  # scipy raises anything on damaged files
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{path}: not ILSVRC2012_devkit_t12.tar.gz, or damaged ({reason}): copy it again") from None


def _list_train(path: str, classes: Sequence[str], workers: int) -> Source:
    found = {name: (path, start, size) for name, start, size in _members(path)}
    wanted = [f"{wnid}.tar" for wnid in classes]
    if unknown := sorted(set(found) - set(wanted)):
        raise UserError(f"{path}: member {unknown[0]} is no class of the devkit")
    if missing := sorted(set(wanted) - set(found)):
        raise UserError(f"{path}: {missing[0]} is missing ({len(missing)} of {len(wanted)} classes)")
    members = dict(run_parallel(_list_tar, [found[name] for name in wanted], min(workers, len(wanted))))
    entries: list[Entry] = []
    for label, wnid in enumerate(classes):
        images = [member for member in members[label] if is_image(member[0])]
        if not images:
            raise UserError(f"{path}: no image in {wnid}.tar")
        entries += [Entry(with_class(wnid, name), path, label, size, start) for name, start, size in images]
    return Source("train", unique_keys(entries), read_parts, sum(map(len, members.values())) - len(entries))


def _list_tar(task: tuple[str, int, int]) -> list[Member]:
    return list(_members(*task))


def _list_val(path: str, labels: Sequence[int]) -> Source:
    found = {name: (size, start) for name, start, size in _members(path)}
    entries: list[Entry] = []
    for number, label in enumerate(labels, 1):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        if name not in found:
            raise UserError(f"{path}: {name} is missing: copy it again")
        entries.append(Entry(name, path, label, *found.pop(name)))
    if more := [name for name in found if name.startswith("ILSVRC2012_val_")]:
        raise UserError(f"{path}: {more[0]}, but the devkit knows only {len(labels)} validation images")
    return Source("val", unique_keys(entries), read_parts, ignored=len(found))
