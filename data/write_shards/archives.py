"""The official ILSVRC2012 archives, read in place.

Archives are walked by their tar headers, the tars inside a tar too, at their offsets. Nothing is extracted, and members
that could lead outside (absolute names, "..", links, devices) are refused.
Check: `pytest tests/test_write_shards.py -k archives`.
"""

import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath

import numpy as np

from data.parallel import available_cpus, run_parallel
from data.tars import TAR_DAMAGE, check_tar_end
from data.write_shards.source import Entry, Listing, Source, check_classes, unique_keys, with_class
from repghost.errors import UserError
from repghost.images import is_image

_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"  # in the devkit


def list_archives(paths: Sequence[str | Path], workers: int | None = None) -> Listing:
    """The official ILSVRC2012 tars and devkit.

    Give ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz as they were downloaded,
    under these names and in any order. Nothing is unpacked: no more disk is needed than for OUT.
    """
    train, val, devkit = (_path_of(role, paths) for role in ("train", "val", "devkit"))
    wnid_of, truth = _read_devkit(devkit)
    classes = sorted(wnid_of.values())
    check_classes(devkit, classes)
    labels = [classes.index(wnid_of[number]) for number in truth]
    return Listing(tuple(classes), (_list_train(train, classes, workers or available_cpus()), _list_val(val, labels)))


def _path_of(role: str, paths: Sequence[str | Path]) -> str:
    found = [str(path) for path in paths if role in Path(path).name]
    if len(found) != 1:
        raise UserError(
            f"{', '.join(map(str, paths))}: {len(found)} of these names contain {role}: "
            "give the three archives by their official names, each once"
        )
    return found[0]


def _base_name(member: tarfile.TarInfo) -> str:
    return PurePosixPath(member.name).name


def _members(path: str, start: int = 0, size: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The regular files of an uncompressed tar, or of the tar that lies at `start` inside a file."""
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size if size is None else start + size
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    _refuse_unsafe(path, member)
                    if member.size < 0 or member.offset_data + member.size > end:
                        raise UserError(f"{path}: truncated in {member.name}: copy it again")
                    if not member.isdir():
                        yield member
                check_tar_end(path, file, tar)
        except UserError:
            raise
        except TAR_DAMAGE as error:
            raise UserError(f"{path}: damaged or not a tar ({error}): copy it again") from None


def _refuse_unsafe(path: str, member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{path}: the name of member {member.name} leads outside the archive: refused")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise UserError(f"{path}: member {member.name} is a link, device or other special file: refused")


def _read_devkit(path: str) -> tuple[dict[int, str], list[int]]:
    """{ILSVRC2012_ID: WordNet id} of the leaf classes; the ILSVRC2012_ID of validation image 1, 2, ..."""
    from scipy.io import loadmat  # slow to import, and only this layout needs it

    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                _refuse_unsafe(path, member)
                file = tar.extractfile(member)
                if file is not None and _base_name(member) in (_META, _TRUTH):
                    found[_base_name(member)] = file.read()
    except UserError:
        raise
    except (*TAR_DAMAGE, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged or not a .tar.gz ({error}): copy it again") from None
    for name in (_META, _TRUTH):
        if name not in found:
            raise UserError(f"{path}: no {name} in it, so it is not ILSVRC2012_devkit_t12.tar.gz")
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(found[_META]), squeeze_me=True)["synsets"])
        wnid_of = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
        truth = [int(line) for line in found[_TRUTH].split()]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: its meta.mat or ground truth is not as in ILSVRC2012 ({error})") from None
    if unknown := set(truth) - set(wnid_of):
        raise UserError(f"{path}: the ground truth names the class number {min(unknown)}, which meta.mat does not")
    return wnid_of, truth


def _list_train(path: str, classes: Sequence[str], workers: int) -> Source:
    found = {_base_name(member): (path, member.offset_data, member.size) for member in _members(path)}
    wanted = [f"{wnid}.tar" for wnid in classes]
    if unknown := sorted(set(found) - set(wanted)):
        raise UserError(f"{path}: member {unknown[0]} is no class of the devkit")
    if missing := sorted(set(wanted) - set(found)):
        raise UserError(f"{path}: {missing[0]} is missing ({len(missing)} of {len(wanted)} classes)")
    with closing(run_parallel(_list_tar, [found[name] for name in wanted], min(workers, len(wanted)))) as results:
        members = dict(results)
    entries: list[Entry] = []
    ignored = 0
    for label, wnid in enumerate(classes):
        images = [member for member in members[label] if is_image(member[0])]
        if not images:
            raise UserError(f"{path}: no image in {wnid}.tar")
        ignored += len(members[label]) - len(images)
        entries += [Entry(with_class(wnid, name), path, label, size, offset) for name, offset, size in images]
    return Source("train", unique_keys(entries), read_members, ignored)


def _list_tar(task: tuple[str, int, int]) -> list[tuple[str, int, int]]:
    return [(_base_name(member), member.offset_data, member.size) for member in _members(*task)]


def _list_val(path: str, labels: Sequence[int]) -> Source:
    found = {_base_name(member): member for member in _members(path)}
    entries: list[Entry] = []
    for number, label in enumerate(labels, 1):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        member = found.pop(name, None)
        if member is None:
            raise UserError(f"{path}: {name} is missing: copy it again")
        entries.append(Entry(name, path, label, member.size, member.offset_data))
    for name in found:
        if _VAL_IMAGE.fullmatch(name):
            raise UserError(f"{path}: {name}, but the devkit knows only {len(labels)} validation images")
    return Source("val", unique_keys(entries), read_members, ignored=len(found))


def read_members(entries: Sequence[Entry]) -> Iterator[bytes]:
    """The bytes of images in one archive, which need not be near each other."""
    with open(entries[0].file, "rb") as file:
        if hasattr(os, "posix_fadvise"):  # lets the disk sort the scattered reads
            for entry in entries:
                os.posix_fadvise(file.fileno(), entry.offset or 0, entry.size, os.POSIX_FADV_WILLNEED)
        for entry in entries:
            yield os.pread(file.fileno(), entry.size, entry.offset or 0)
