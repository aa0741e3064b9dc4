"""What benchmarks/fuzz.py tries: a function for each kind of input, which changes a valid one and hands it over.

Each returns None where the input was taken, or the line that refuses it; whatever else it raises is a failure.
"""

import copy
import io
import json
import random
import shutil
import struct
import tarfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.global_hydra import GlobalHydra
from images import encoded, make_images, patch

from data.index import load_index
from data.reader import BadImage, ShardReader
from data.shards import verify
from data.write_shards.__main__ import _parser as write_shards_parser
from data.write_shards.write import write_folder
from repghost import reparameterize, repghostnet
from repghost.command_line import compose_config, read_command_line
from repghost.errors import printable, user_message
from repghost.export.options import read_options
from repghost.options import parse
from repghost.predict import __main__ as predict
from repghost.schema.check import keys
from repghost.weights import load_model, save_weights

Outcome = str | None
Target = Callable[[random.Random, Path], Outcome]

WORDS = [
    "", " ", "0", "-1", "1", "2", "1e9", "1e400", "-0.0", "nan", "inf", "-inf", "null", "None", "true", "false", "yes",
    "auto", "abc", "ü", "日本語", "😀", "a b", "a=b", "a,b", "[1,2]", "[", "{a:1}", "{", "}", "(", ")", "'", '"', "\\",
    "$", "${x}", "${width}", "#", "~", "~/x", "../x", "/", "/dev/null", "/dev/zero", "/proc/self", "..", ".", "*", "?",
    "a\nb", "\t", "\x1b[31m", "x" * 5000, "99999999999999999999", "0x10", "1_000", "007", "1.5.2", "!!python", "%s",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "ü", "\x00", "../x", "/etc/passwd", "x" * 300, [], {}, [1], {"a": 1}, [[]], ["cat", "cat"], "1", "\n",
]  # fmt: skip


def attempt(action: Callable[[], object]) -> Outcome:
    """The line that a command would say of what `action` raises. Raises what is no mistake of the user."""
    try:
        action()
    except Exception as error:
        if (line := user_message(error)) is None:
            raise
        return printable(line)
    return None


def changed_bytes(draw: random.Random, content: bytes) -> bytes:
    """A few bytes flipped, cut, doubled, inserted, zeroed or replaced; headers are hit more often than the rest."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        if not data:
            break
        reach = draw.choice([16, 600, len(data), len(data)])
        at, length = draw.randrange(min(reach, len(data))), draw.choice([1, 4, 64, 512, 5000])
        match draw.randrange(7):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at : at + length] = bytes(min(length, len(data) - at))
            case 5:
                data[at:at] = draw.randbytes(length)
            case 6:
                data[at : at + 4] = struct.pack("<i", draw.choice([0, -1, 2**31 - 1, 255, 1 << 24]))
    return bytes(data)


def changed_json(draw: random.Random, content: Any) -> Any:
    """`content` with one to three of its values replaced, removed or doubled."""
    content = json.loads(json.dumps(content))
    for _ in range(draw.choice([1, 1, 2, 3])):
        places: list[tuple[Any, Any]] = []
        found = [content]
        while found:
            value = found.pop()
            if isinstance(value, dict | list):
                keys = list(value) if isinstance(value, dict) else range(len(value))
                places += [(value, key) for key in keys]
                found += [value[key] for key in keys]
        if not places:
            return copy.deepcopy(draw.choice(VALUES))
        parent, key = draw.choice(places)
        match draw.randrange(4):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[key]))
            case 2 if isinstance(parent, dict):
                parent[str(draw.choice(VALUES))] = parent.pop(key)
            case _:
                other, other_key = draw.choice(places)
                copied = other[other_key] if isinstance(other, list) and other_key in range(len(other)) else None
                parent[key] = copy.deepcopy(draw.choice([*VALUES, copied]))  # no place is in another twice
    return content


# -- shards ------------------------------------------------------------------------------------------------------------


@cache
def members() -> list[tuple[str, bytes]]:
    """The members of a shard of four samples, of each format."""
    formats = ("jpg", "png", "webp", "jpeg")
    images = [(f"k{i}.{kind}", encoded(patch(i), kind.replace("jpeg", "jpg"))) for i, kind in enumerate(formats)]
    labels = [(f"k{i}.cls", str(i % 2).encode()) for i in range(len(formats))]
    return [member for pair in zip(images, labels, strict=True) for member in pair]


def shards(draw: random.Random, folder: Path) -> Outcome:
    """A shard of others: its members, their order, names and types, or the bytes of the whole tar."""
    rows: list[list[Any]] = [[name, content, b"0"] for name, content in members()]
    whole = draw.random() < 0.4
    for _ in range(0 if whole else draw.choice([1, 1, 2, 4])):
        row = draw.choice(rows)
        match draw.randrange(6):
            case 0:
                row[1] = changed_bytes(draw, row[1])
            case 1:
                row[0] = draw.choice([draw.choice(WORDS) or "x", f"{draw.choice(WORDS)}.jpg", "k0.cls", "k1.jpg"])
            case 2:
                row[1] = str(draw.choice([*WORDS, *VALUES])).encode(errors="replace")
            case 3:
                rows.remove(row)
            case 4:
                rows.insert(draw.randrange(len(rows)), list(draw.choice(rows)))
            case 5:
                row[2] = draw.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, b"S", b"x"])
        rows = rows or [["k9.jpg", b"", b"0"]]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
        for name, content, kind in rows:
            member = tarfile.TarInfo(name.replace("\x00", ""))
            member.size, member.type = len(content), kind
            tar.addfile(member, io.BytesIO(content))
    content = changed_bytes(draw, buffer.getvalue()) if whole else buffer.getvalue()
    root = fresh(folder / "shards")
    (root / "train-0.tar").write_bytes(content)
    return attempt(lambda: read_all(root, folder / "cache", "train"))


def read_all(root: Path, cache: Path, split: str) -> None:
    """Loads an index and decodes every image; images that cannot be decoded are named, as `verify` names them."""
    index = load_index(root, split, cache)
    index.keys()
    damaged = verify(index.shards, index.samples, [None] * len(index.shards), workers=1)
    reader, bad = ShardReader(index), 0
    for i in range(len(index)):
        try:
            reader.decode(i, reader.read(i))
        except BadImage as error:
            bad += 1
            assert len(str(error).splitlines()) == 1, str(error)
    assert bool(damaged) == bool(bad), f"verify finds {len(damaged)} bad images, the reader {bad}"


# -- manifests ---------------------------------------------------------------------------------------------------------


@cache
def prepared(folder: Path) -> Path:
    root = folder / "prepared"
    write_folder(make_images(folder / "images", train=6, val=3), root, images_per_shard=7, workers=1, quiet=True)
    shutil.rmtree(root / "parts")
    return root


def manifests(draw: random.Random, folder: Path) -> Outcome:
    """manifest.json, as JSON or as bytes, or the file of an index."""
    root = Path(shutil.copytree(prepared(folder), folder / "changed", dirs_exist_ok=True))
    path = root / draw.choice(["manifest.json", "manifest.json", "manifest.json", "train.index.npy"])
    if path.suffix == ".json" and draw.random() < 0.8:
        path.write_text(json.dumps(changed_json(draw, json.loads(path.read_text()))), errors="replace")
    else:
        path.write_bytes(changed_bytes(draw, path.read_bytes()))

    def read_splits() -> None:
        for split in ("train", "val"):
            read_all(root, folder / "cache", split)

    return attempt(read_splits)


# -- weights -----------------------------------------------------------------------------------------------------------


@cache
def weights_files(folder: Path) -> list[Path]:
    """A network of width 0.1 in all forms that are read."""
    model = repghostnet(0.1, 3).eval()
    state, base = model.state_dict(), fresh(folder / "weights")
    save_weights(model, base / "a.safetensors")
    save_weights(reparameterize(model), base / "fused.safetensors")
    torch.save({"state_dict_ema": state, "epoch": 3}, base / "zip.pth.tar")
    torch.save({"ema": state, "format": 2, "run": {"width": 0.1}}, base / "last.ckpt")
    torch.save({f"module.{k}": v for k, v in state.items()}, base / "old.pth", _use_new_zipfile_serialization=False)
    return sorted(base.iterdir())


def weights(draw: random.Random, folder: Path) -> Outcome:
    """A file of weights: its bytes, the header of safetensors, or the tensors of a checkpoint."""
    source = draw.choice(weights_files(folder))
    path = fresh(folder / "changed_weights") / source.name
    content = source.read_bytes()
    if source.suffix == ".safetensors" and draw.random() < 0.6:
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(changed_json(draw, json.loads(content[8 : 8 + length]))).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    elif source.suffix != ".safetensors" and draw.random() < 0.6:
        torch.save(changed_state(draw, torch.load(source, weights_only=True)), path)
    else:
        path.write_bytes(changed_bytes(draw, content))
    return attempt(lambda: load_model(path, 0.1))


def changed_state(draw: random.Random, content: dict[str, Any]) -> Any:
    """One to three tensors of another shape, dtype, name or value, or the dict around them changed."""
    state = next((v for v in content.values() if isinstance(v, dict) and len(v) > 9), content)
    for _ in range(draw.choice([1, 1, 3])):
        name = draw.choice(list(state))
        tensor = state[name] if isinstance(state[name], torch.Tensor) else torch.zeros(2)
        match draw.randrange(7):
            case 0:
                state[name] = tensor.to(draw.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8]))
            case 1:
                state[name] = tensor.flatten()[: draw.randrange(3)]
            case 2:
                state[draw.choice(["_orig_mod.", "model.", "x."]) + name] = state.pop(name)
            case 3 if tensor.is_floating_point() and tensor.numel():
                tensor.view(-1)[0] = draw.choice([np.nan, np.inf, -1.0])
            case 4:
                state[name] = draw.choice(VALUES)
            case 5:
                del state[name]
            case _:
                content[str(draw.choice(VALUES))] = draw.choice(VALUES)
    return draw.choice([content, content, content, state, [state], {"model": {"x": state}}])


def fresh(folder: Path) -> Path:
    """`folder`, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


TARGETS: dict[str, Target] = {"shards": shards, "manifests": manifests, "weights": weights}


# -- command lines -----------------------------------------------------------------------------------------------------

PROGRAMS = {
    "train": ["data=digits", "data.root=x", "recipe=quick", "trainer=cpu", "logger=wandb", "-m", "--cfg", "~logger"],
    "evaluate": ["run=x", "weights=timm", "data=imagenet_a", "trainer=gpu", "data.root=x", "report=[classes,worst]"],
    "predict": ["x.jpg", "run=x", "weights=timm", "format=csv", "top=3", "--help="],
    "export": ["run=x", "format=onnx", "int8=true", "input_size=3x3", "batch=dynamic"],
    "write_shards": ["folder", "x", "y", "--seed", "3", "--resize", "9", "--val-share", "0.1"],
}


def commands(draw: random.Random, folder: Path) -> Outcome:
    """A command line of any program: keys and values of its own and of others, up to where its work would begin."""
    program = draw.choice(list(PROGRAMS))
    typical = PROGRAMS[program]
    arguments = draw.sample(typical, draw.randrange(len(typical) + 1))
    names = list(keys(program)) if program in ("train", "evaluate") else ["run", "top", "width", "out", "format"]
    for _ in range(draw.choice([1, 1, 2, 4])):
        name, value = draw.choice([*names, *names, *WORDS]), draw.choice([*WORDS, str(draw.choice(VALUES))])
        prefix, equals = draw.choice(["", "", "", "", "", "+", "++", "~"]), draw.choice(["=", "=", "=", "=", "", "=="])
        arguments.insert(draw.randrange(len(arguments) + 1), f"{prefix}{name}{equals}{value}")
    if draw.random() < 0.2:
        arguments.append(draw.choice(WORDS))
    return understood(program, [argument.replace("\x00", "") for argument in arguments])


def understood(program: str, arguments: list[str]) -> Outcome:
    """What the program says of the arguments, None where it would begin to work."""
    GlobalHydra.instance().clear()
    match program:
        case "train" | "evaluate":
            return attempt(lambda: compose_config(program, read_command_line(program, arguments)[1]))
        case "predict":
            return attempt(lambda: parse(predict.Options, arguments))
        case "export":
            return attempt(lambda: read_options(arguments))
    errors = io.StringIO()
    try:
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            write_shards_parser().parse_args(arguments)
    except SystemExit:  # argparse's way, after its usage
        return errors.getvalue().strip().rpartition("\n")[2] or None
    return None


TARGETS["commands"] = commands
