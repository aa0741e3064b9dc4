"""The four layouts in which ImageNet and other sets arrive, listed as arrays before any image is read.

A `Source` says where the bytes of every image of one split lie and what its label is; `data.write_shards`
reads them from there. Labels follow the sorted class names (sorted WordNet ids for ImageNet), as in
torchvision and timm; Parquet files state their own labels. Archives are walked by their tar headers, the tars
inside a tar too, at their offsets: nothing is extracted, and members that could lead outside (absolute names,
"..", links, devices) are refused.

Check: `pytest tests/test_write_shards.py`.
"""

import csv
import hashlib
import io
import json
import os
import re
import stat
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from data.parallel import available_cpus, run_parallel
from data.tars import TAR_DAMAGE, check_tar_end
from repghost.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "val")
ENTRY = np.dtype([("file", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i8"), ("group", "<i8")])

_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@dataclass(frozen=True)
class Source:
    """All images of one split in a fixed order; `table`: [N] of ENTRY, `keys`: N unique names.

    Image i is, by kind, "file": the file `files[file]`; "archive": its `size` bytes from `offset` on;
    "parquet": row `offset` of that file, which lies in row group `group` (counted over all files).
    """

    split: str
    kind: str
    files: list[str]
    table: np.ndarray
    keys: list[str]
    ignored: int = 0  # files that are no images by their extension

    def __len__(self) -> int:
        return len(self.keys)

    def digest(self) -> str:
        """Hex digest of what decides the order and the labels, wherever the files lie."""
        digest = hashlib.sha256("\n".join(self.keys).encode())
        digest.update(self.table["label"].tobytes())
        digest.update(self.table["group"].tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Listing:
    """A data set before it is written: class names in label order, and a source for each split."""

    classes: tuple[str, ...]
    sources: tuple[Source, ...]

    @property
    def shuffle(self) -> str:
        """How the images get into their order (`data.write_shards`): "global" or "row-groups"."""
        return "row-groups" if self.sources[0].kind == "parquet" else "global"


def _source(
    split: str,
    kind: str,
    files: list[str],
    rows: Sequence[tuple[int, ...]],
    names: list[str],
    ignored: int = 0,
) -> Source:
    """`rows` as in ENTRY; `names` are the keys with the file's extension, not yet unique."""
    return Source(split, kind, files, np.array(rows, ENTRY), _unique(names), ignored)


def _name(class_name: str, path: str) -> str:
    """ "n01440764_10026.JPEG" in class n01440764, or "cat_1.jpg" for 1.jpg in class cat."""
    return path if path.startswith(f"{class_name}_") else f"{class_name}_{path}"


def _unique(names: Sequence[str]) -> list[str]:
    """Keys from names such as "cat/a.b.jpg": "cat_a_b". webdataset ends a key at the first dot.

    Names that differ in their extension only keep it ("cat_a_b_png"); whatever still collides gets a number.
    """
    parts = [os.path.splitext(name) for name in names]
    keys = [re.sub(r"[^\w-]", "_", stem) for stem, _ in parts]
    count = Counter(keys)
    taken: set[str] = set()
    for i, (_, extension) in enumerate(parts):
        key = base = keys[i] + (f"_{extension[1:].lower()}" if count[keys[i]] > 1 else "")
        number = 2
        while key in taken:
            key, number = f"{base}_{number}", number + 1
        taken.add(key)
        keys[i] = key
    return keys


def _check_classes(where: object, classes: Sequence[str]) -> None:
    if not classes:
        raise UserError(f"{where}: no class folders in it: expected one folder of images for each class")
    if len(classes) == 1:
        raise UserError(f"{where}: only one class ({classes[0]}), so there is nothing to learn")


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)  # "._a.jpg" is a file of macOS


# --- folder ---------------------------------------------------------------------------------------


def list_folder(root: str | Path, split: str | None = None) -> Listing:
    """Class folders, below `root`/train and `root`/val or, with `split`, directly below `root`."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if split is None:
        if not all((root / name).is_dir() for name in SPLITS):
            raise UserError(f"{root}: no train/ and val/ in it: say with --split train (or val) what its folders are")
        folders = {name: root / name for name in SPLITS}
    else:
        folders = {split: root}
    class_folders = {name: _subfolders(folder) for name, folder in folders.items()}
    classes = next(iter(class_folders.values()))
    _check_classes(next(iter(folders.values())), classes)
    return Listing(
        tuple(classes),
        tuple(_list_class_folders(name, folder, class_folders[name], classes) for name, folder in folders.items()),
    )


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _list_class_folders(split: str, folder: Path, names: Sequence[str], classes: Sequence[str]) -> Source:
    label_of = {name: label for label, name in enumerate(classes)}
    files: list[str] = []
    rows: list[tuple[int, ...]] = []
    keys: list[str] = []
    ignored = 0
    if not names:
        raise UserError(f"{folder}: no class folders in it")
    for name in names:
        if name not in label_of:
            raise UserError(f"{folder / name}: a class in {split} that is not in train")
        before = len(files)
        for path, size in _walk(folder / name):
            if not _is_image(os.path.basename(path)):
                ignored += 1
                continue
            rows.append((len(files), 0, size, label_of[name], 0))
            keys.append(_name(name, os.path.relpath(path, folder / name)))
            files.append(path)
        if len(files) == before:
            raise UserError(f"{folder / name}: no image in this class folder ({' '.join(IMAGE_EXTENSIONS)})")
    return _source(split, "file", files, rows, keys, ignored)


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """(path, bytes) of every file below `folder`, sorted. A folder without permission is an error."""

    def stop(error: OSError) -> None:
        raise error

    entered: set[str] = set()  # links may lead in circles
    for path, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if (real := os.path.realpath(path)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        for name in sorted(names):
            full = os.path.join(path, name)
            status = os.stat(full)
            if stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                yield full, status.st_size


# --- archives -------------------------------------------------------------------------------------


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


# --- kaggle ---------------------------------------------------------------------------------------


def list_kaggle(root: str | Path) -> Listing:
    """Kaggle's tree: ILSVRC/Data/CLS-LOC/{train/WNID,val} and LOC_val_solution.csv beside ILSVRC."""
    root = Path(root).resolve()
    candidates = [root / part for part in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", ".")]
    images = next((c for c in candidates if (c / "train").is_dir() and (c / "val").is_dir()), None)
    if images is None:
        raise UserError(f"{root}: no ILSVRC/Data/CLS-LOC with train/ and val/ in it")
    solutions = [folder / "LOC_val_solution.csv" for folder in (root, *images.parents[:3])]
    solution = next((path for path in solutions if path.exists()), None)
    if solution is None:
        raise UserError(f"{solutions[-1]}: missing: it holds the labels of the validation images")
    classes = _subfolders(images / "train")
    _check_classes(images / "train", classes)
    train = _list_class_folders("train", images / "train", classes, classes)
    return Listing(tuple(classes), (train, _list_kaggle_val(images / "val", solution, classes)))


def _list_kaggle_val(folder: Path, solution: Path, classes: Sequence[str]) -> Source:
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    with open(solution, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"ImageId", "PredictionString"} <= set(reader.fieldnames or ()):
            raise UserError(f"{solution}: no columns ImageId and PredictionString")
        # "n01751748 111 108 230 366 ...": the class, then boxes.
        wnid_of = {row["ImageId"]: row["PredictionString"].partition(" ")[0] for row in reader}
    files: list[str] = []
    rows: list[tuple[int, ...]] = []
    ignored = 0
    for path, size in _walk(folder):
        name = os.path.basename(path)
        if not _is_image(name):
            ignored += 1
            continue
        wnid = wnid_of.pop(os.path.splitext(name)[0], None)
        if wnid is None:
            raise UserError(f"{path}: {solution} has no row for this image")
        if wnid not in label_of:
            raise UserError(f"{solution}: {name} has the class {wnid}, which is not in train")
        rows.append((len(files), 0, size, label_of[wnid], 0))
        files.append(path)
    if wnid_of:
        raise UserError(f"{folder}: {next(iter(wnid_of))} is missing ({len(wnid_of)} images that {solution} lists)")
    return _source("val", "file", files, rows, [os.path.basename(path) for path in files], ignored)


# --- parquet --------------------------------------------------------------------------------------


def list_parquet(root: str | Path) -> Listing:
    """The hub's layout: data/train-*.parquet, data/validation-*.parquet with the columns image and label."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    folder = root / "data" if (root / "data").is_dir() else root
    files = {split: sorted(map(str, folder.glob(f"{split}*.parquet"))) for split in SPLITS}  # "validation-" too
    for split in SPLITS:
        if not files[split]:
            raise UserError(f"{folder}: no {split}*.parquet in it")
    named = _parquet_class_names(root, files["train"][0])
    sources = tuple(_list_parquet_files(split, files[split]) for split in SPLITS)
    highest = int(sources[0].table["label"].max())
    classes = named or tuple(str(label) for label in range(highest + 1))
    _check_classes(folder, classes)
    for source in sources:
        i = int(source.table["label"].argmax())
        if source.table["label"][i] >= len(classes):
            path = source.files[source.table["file"][i]]
            raise UserError(f"{path}: label {source.table['label'][i]}, but there are {len(classes)} classes")
    return Listing(classes, sources)


def _list_parquet_files(split: str, files: list[str]) -> Source:
    rows: list[tuple[int, ...]] = []
    names: list[str] = []
    groups = 0
    for number, path in enumerate(files):
        with open_parquet(path) as file:
            has_paths = _image_has_paths(path, file.schema_arrow)
            row = 0
            for group in range(file.num_row_groups):
                columns = file.read_row_group(group, columns=["label", "image.path"] if has_paths else ["label"])
                labels = columns["label"].to_pylist()
                images = columns["image"].to_pylist() if has_paths else [{"path": None}] * len(labels)
                for label, image in zip(labels, images, strict=True):
                    if not isinstance(label, int) or label < 0:
                        raise UserError(f"{path}: the label of row {row} is {label}, not a class number")
                    rows.append((number, row, 0, label, groups))
                    names.append(_row_name(path, row, image["path"]))
                    row += 1
                groups += 1
    if not rows:
        raise UserError(f"{files[0]}: no rows")
    return _source(split, "parquet", files, rows, names)


def _row_name(path: str, row: int, image_path: str | None) -> str:
    return PurePosixPath(image_path).name if image_path else f"{Path(path).stem}_{row:06d}"


def _image_has_paths(path: str, schema: Any) -> bool:
    import pyarrow as pa

    if not {"image", "label"} <= set(schema.names):
        raise UserError(f"{path}: has the columns {', '.join(schema.names)}; image and label are needed")
    image = schema.field("image").type
    if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
        return image.get_field_index("path") >= 0
    if pa.types.is_binary(image) or pa.types.is_large_binary(image):
        return False
    raise UserError(f"{path}: the column image is {image}, neither bytes nor a struct of them")


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile; damaged files are a UserError."""
    import pyarrow as pa  # slow to import, and only this layout needs it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except pa.ArrowException as error:
        raise UserError(f"{path}: damaged or not Parquet ({' '.join(str(error).split())}): copy it again") from None


def _parquet_class_names(root: Path, path: str) -> tuple[str, ...] | None:
    """Names of the ClassLabel `label`: from the file's metadata, dataset_info.json or the data set's card."""
    with open_parquet(path) as file:
        metadata = file.schema_arrow.metadata or {}
    places = []
    if b"huggingface" in metadata:
        places.append(json.loads(metadata[b"huggingface"]).get("info", {}))
    if (root / "dataset_info.json").exists():
        info = json.loads((root / "dataset_info.json").read_text(encoding="utf-8"))
        places += [info, *(config for config in info.values() if isinstance(config, dict))]
    if (root / "README.md").exists():
        front_matter = re.match(r"---\n(.*?)\n---", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        info = (yaml.safe_load(front_matter[1]) or {}).get("dataset_info", {}) if front_matter else {}
        places += info if isinstance(info, list) else [info]
    for place in places:
        names = _class_label_names(place.get("features"))
        if names is not None:
            return names
    return None


def _class_label_names(features: Any) -> tuple[str, ...] | None:
    """The names in either form of `features`: {"label": {"names": [...]}}, or the list of a card."""
    if isinstance(features, dict):
        names = (features.get("label") or {}).get("names")
        return tuple(names) if names else None
    for feature in features or []:
        if feature.get("name") == "label" and isinstance(feature.get("dtype"), dict):
            names = feature["dtype"].get("class_label", {}).get("names", {})
            return tuple(names[number] for number in sorted(names, key=int)) or None
    return None
