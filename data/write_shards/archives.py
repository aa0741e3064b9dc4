"""The official ILSVRC2012 archives, read in place."""

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
from data.write_shards.source import Listing, Source, _check_classes, _is_image, _name, _source
from repghost.errors import UserError

_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def list_archives(paths: Sequence[str | Path], workers: int | None = None) -> Listing:
    """The official ILSVRC2012 files in any order: training tar (of tars), validation tar, devkit."""
    found: dict[str, str] = {}
    for path in map(str, paths):
        role = _recognise(path)
        if role in found:
            raise UserError(f"{path} and {found[role]} are both a {role}")
        found[role] = path
    for role in ("training archive", "validation archive", "devkit"):
        if role not in found:
            raise UserError(f"no {role} among {', '.join(map(str, paths))}")
    wnid_of, truth = _read_devkit(found["devkit"])
    classes = sorted(wnid_of.values())
    _check_classes(found["devkit"], classes)
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    train = _list_train_archive(found["training archive"], label_of, workers or available_cpus())
    labels = [label_of[wnid_of[number]] for number in truth]
    return Listing(tuple(classes), (train, _list_val_archive(found["validation archive"], labels)))


def _recognise(path: str) -> str:
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return "devkit"
    for member in _members(path):
        if member.name.endswith(".tar"):
            return "training archive"
        if _VAL_IMAGE.fullmatch(PurePosixPath(member.name).name):
            return "validation archive"
        break
    raise UserError(f"{path}: none of ILSVRC2012_img_train.tar (a tar of tars), ILSVRC2012_img_val.tar and the devkit")


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
    wanted = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                _refuse_unsafe(path, member)
                file = tar.extractfile(member)
                if file is not None and PurePosixPath(member.name).name in wanted:
                    found[PurePosixPath(member.name).name] = file.read()
    except UserError:
        raise
    except (*TAR_DAMAGE, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged or not a .tar.gz ({error}): copy it again") from None
    for name in wanted:
        if name not in found:
            raise UserError(f"{path}: no {name} in it, so it is not ILSVRC2012_devkit_t12.tar.gz")
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(found[wanted[0]]), squeeze_me=True)["synsets"])
        wnid_of = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
        truth = [int(line) for line in found[wanted[1]].split()]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: its meta.mat or ground truth is not as in ILSVRC2012 ({error})") from None
    unknown = set(truth) - set(wnid_of)
    if unknown:
        raise UserError(f"{path}: the ground truth names the class number {min(unknown)}, which meta.mat does not")
    return wnid_of, truth


def _list_train_archive(path: str, label_of: dict[str, int], workers: int) -> Source:
    tasks: dict[str, tuple[str, int, int]] = {}
    for member in _members(path):
        wnid = PurePosixPath(member.name).name.removesuffix(".tar")
        if wnid not in label_of:
            raise UserError(f"{path}: member {member.name} is no class of the devkit")
        tasks[wnid] = (path, member.offset_data, member.size)
    missing = sorted(set(label_of) - set(tasks))
    if missing:
        raise UserError(f"{path}: {missing[0]}.tar is missing ({len(missing)} of {len(label_of)} classes)")
    wnids = sorted(tasks)
    members: list[list[tuple[str, int, int]]] = [[] for _ in wnids]
    with closing(run_parallel(_list_tar, [tasks[wnid] for wnid in wnids], min(workers, len(wnids)))) as results:
        for number, result in results:
            members[number] = result
    rows: list[tuple[int, ...]] = []
    names: list[str] = []
    ignored = 0
    for wnid, inside in zip(wnids, members, strict=True):
        images = [m for m in inside if _is_image(PurePosixPath(m[0]).name)]
        if not images:
            raise UserError(f"{path}: no image in {wnid}.tar")
        ignored += len(inside) - len(images)
        rows += [(0, offset, size, label_of[wnid], 0) for _, offset, size in images]
        names += [_name(wnid, PurePosixPath(name).name) for name, _, _ in images]
    return _source("train", "archive", [path], rows, names, ignored)


def _list_tar(task: tuple[str, int, int]) -> list[tuple[str, int, int]]:
    return [(member.name, member.offset_data, member.size) for member in _members(*task)]


def _list_val_archive(path: str, labels: Sequence[int]) -> Source:
    found: dict[int, tuple[int, int]] = {}
    ignored = 0
    for member in _members(path):
        match = _VAL_IMAGE.fullmatch(PurePosixPath(member.name).name)
        if match is None:
            ignored += 1
        elif not 1 <= int(match[1]) <= len(labels):
            raise UserError(f"{path}: {member.name}, but the devkit knows only {len(labels)} validation images")
        else:
            found[int(match[1])] = (member.offset_data, member.size)
    numbers = range(1, len(labels) + 1)
    for number in numbers:
        if number not in found:
            raise UserError(f"{path}: ILSVRC2012_val_{number:08d}.JPEG is missing: copy it again")
    rows = [(0, *found[number], labels[number - 1], 0) for number in numbers]
    return _source("val", "archive", [path], rows, [f"ILSVRC2012_val_{number:08d}.JPEG" for number in numbers], ignored)
