"""What check_gpu.py measures: DALI's decoder and its batches, and the rates of benchmarks/train_step.py and train.py.

What touches a GPU here runs in a process of its own, which gives the GPU back: this file is also the program that
Bench.called starts. Each check is a function as in benchmarks/check_runs.py.
"""

import json
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.check_bench import Bench, require_devices, require_gpu
from benchmarks.check_report import Failed, Skipped
from benchmarks.check_runs import rate_of
from benchmarks.common import ROOT, kernels_of_training, machine, read_table
from benchmarks.feeding import training_batches, training_config
from benchmarks.loader import measure
from benchmarks.setting import REPEATED, SHARDS, Setting, prepare, repeated
from data.crops import CenterCrops
from data.dali_loader import DaliLoader, dali_installed
from data.reader import LoaderOptions
from data.sampling import RankSampler
from repghost.dataset import Batch
from repghost.machine import available_cpus

SLEEP = 200_000_000  # cycles of a GPU, about a tenth of a second: longer than DALI takes for a batch
HELD = 4  # batches that are held back on a CPU, where nothing is queued
ROUNDING = 0.5  # of 255: decoders of a GPU, which share the images, differ by less in the mean of one

Means = list[list[float]]  # of the images of each batch


# -- the machine -------------------------------------------------------------------------------------------------------


def facts(device: str) -> dict[str, Any]:
    """Of the machine, with what only matters on a GPU; the GPU computes something. For a process of its own."""
    found = machine(torch.device(device))
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found |= {"gpus": torch.cuda.device_count(), "cuda": torch.version.cuda, "capability": f"{major}.{minor}"}
        found |= {"cudnn": torch.backends.cudnn.version(), "bf16": torch.cuda.is_bf16_supported()}
        images, weights = torch.randn(2, 8, 16, 16, device=device), torch.randn(8, 8, 3, 3, device=device)
        on_cpu = F.conv2d(images.cpu(), weights.cpu())
        kernels_of_training()
        torch.testing.assert_close(F.conv2d(images, weights).cpu(), on_cpu, rtol=1e-3, atol=1e-3)
    if dali_installed():
        import nvidia.dali

        found["dali"] = nvidia.dali.__version__
    return found


def topology() -> str:
    """What nvidia-smi says of GPUs and their connections."""
    said = []
    for command in (["nvidia-smi"], ["nvidia-smi", "topo", "-m"]):
        with suppress(OSError, subprocess.SubprocessError):
            said.append(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)
    return "\n".join(said)


# -- DALI --------------------------------------------------------------------------------------------------------------


def decoded(bench: Bench, batch_size: int) -> tuple[float, float | None]:
    """Images per second that DALI makes batches of, alone, and percent of the JPEG decoder of the busiest GPU.

    None where nvidia-smi names no such decoder.
    """
    if not dali_installed():
        raise Skipped("the package nvidia-dali-cuda130 is not installed")
    monitor = None
    if bench.device == "cuda":
        with suppress(OSError):
            monitor = subprocess.Popen(["nvidia-smi", "dmon", "-s", "u", "-d", "1"], stdout=subprocess.PIPE, text=True)
    try:
        what = bench.corpus, bench.scale.images, batch_size, bench.device, bench.scale.seconds
        rate = float(bench.called(decode_rate, *what))
    finally:
        if monitor is not None:
            monitor.terminate()
            said = monitor.communicate()[0]
    return rate, None if monitor is None else jpeg_share(said)


def decode_rate(corpus: str, images: int, batch_size: int, device: str, seconds: float) -> float:
    """Images per second of DALI's uint8 batches, with the defaults of train.py, for a process of its own."""
    setting = prepare(Path(corpus), images, batch_size, torch.device(device))
    shards = repeated(setting.folder.parent / SHARDS, REPEATED)
    keys = [f"data.root={shards}", f"data.cache={corpus}", "loader=dali", "width=0.5", f"batch_size={batch_size}"]

    def decoded_batches(setting: Setting, workers: int) -> Iterator[Batch]:
        return training_batches(training_config(setting.device, *keys), augmented=False)

    return measure(decoded_batches, setting, available_cpus(), seconds).second


def jpeg_share(said: str) -> float | None:
    """Percent in the column jpg of `nvidia-smi dmon -s u`, on average over the seconds of the busiest GPU in which it
    did anything at all; None where there is no such column, or no such decoder.
    """
    names: list[str] = []
    shares: dict[str, list[float]] = {}
    for line in said.splitlines():
        words = line.lstrip("# ").split()
        if line.startswith("#"):
            names = words if "jpg" in words else names
        elif "jpg" in names and len(words) == len(names):
            row = dict(zip(names, words, strict=True))
            with suppress(ValueError):  # "-"
                share = float(row["jpg"])
                shares.setdefault(row["gpu"], []).append(share)
    working = [mean([share for share in each if share] or [0.0]) for each in shares.values()]
    return max(working, default=None)


def decode(bench: Bench, batch_size: int) -> float:
    return float(bench.once(f"decode {batch_size}", lambda: decoded(bench, batch_size))[0])


def hardware_decoder(bench: Bench) -> float:
    """Percent of the time that the JPEG decoder worked."""
    require_gpu(bench)
    size = bench.scale.batch_sizes[1]
    share = bench.once(f"decode {size}", lambda: decoded(bench, size))[1]
    if share is None:
        raise Skipped("nvidia-smi dmon shows no JPEG decoder of this GPU")
    return float(share)


def race(bench: Bench) -> float:
    """Batches of DALI that are not the same when they are read late, behind a GPU that is busy.

    A loader that hands out memory which DALI uses again gives the pixels of a later batch then.
    """
    if not dali_installed():
        raise Skipped("the package nvidia-dali-cuda130 is not installed")
    what = bench.corpus, bench.scale.images, *bench.scale.race, bench.device
    return changed_batches(*bench.called(pixel_means, *what))


def changed_batches(at_once: Means, late: Means) -> int:
    """How many batches have an image whose mean is another one than a decoder's rounding could make it."""
    if all(batch == at_once[0] for batch in at_once):
        raise Failed("all batches have the same pixels")
    pairs = zip(at_once, late, strict=True)
    return sum(any(abs(a - b) > ROUNDING for a, b in zip(*batches, strict=True)) for batches in pairs)


def pixel_means(corpus: str, images: int, batches: int, batch_size: int, device: str) -> list[Means]:
    """Of the images of an evaluation's first batches, read at once, and in another pass read late."""
    setting = prepare(Path(corpus), images, batch_size, torch.device(device))
    crops = CenterCrops(setting.original, RankSampler(len(setting.original), batch_size), 224, 0.875)
    options = LoaderOptions(workers=available_cpus(), prefetch=2, pin_memory=setting.on_gpu)
    where = (0,) if setting.on_gpu else ()
    found = []
    for late in (False, True):
        loader = DaliLoader(crops, options, *where)
        found.append(means_of(islice(loader, batches), late, held=0 if setting.on_gpu or not late else HELD))
    return found


def means_of(batches: Iterable[Batch], late: bool, held: int) -> Means:
    """The mean of every image, each batch read `held` batches later; late: behind a sleep on a GPU."""
    waiting: deque[Tensor] = deque()
    means: list[Tensor] = []

    def read(images: Tensor) -> None:
        if late and images.is_cuda:
            torch.cuda._sleep(SLEEP)
        means.append(images.flatten(1).double().mean(dim=1))

    for batch in batches:
        waiting.append(batch.images)
        del batch  # the loader's reference is not to keep it
        if len(waiting) > held:
            read(waiting.popleft())
    while waiting:
        read(waiting.popleft())
    return [batch.tolist() for batch in means]


# -- rates -------------------------------------------------------------------------------------------------------------


def rates(bench: Bench, width: float, batch_size: int) -> dict[str, float]:
    """Images per second of the step, the loader and train.py, by the names of train_step.py."""

    def measured() -> dict[str, float]:
        name = f"rates_{width:g}_{batch_size}"
        out = bench.folder / f"{name}.csv"
        bench.finished(
            name, ROOT / "benchmarks/train_step.py", "--quick", "--alone", f"--device={bench.device}",
            f"--width={width}", f"--batch-size={batch_size}", f"--images={bench.scale.images}",
            f"--repeat={bench.scale.repeat}", f"--corpus={bench.corpus}", f"--out={out}", *bench.scale.measuring,
        )  # fmt: skip
        rows = read_table(out)
        return {row["what"]: float(row["images_per_second"]) for row in rows if row.get("images_per_second")}

    found: dict[str, float] = bench.once(f"rates {width} {batch_size}", measured)
    return found


def rate(bench: Bench, what: str, width: float, batch_size: int) -> float:
    return rates(bench, width, batch_size)[f"{what}: ours"]


def together(bench: Bench, width: float, batch_size: int) -> float:
    """Percent that train.py reaches of the slower of step and loader."""
    found = rates(bench, width, batch_size)
    return 100 * found["end to end: ours"] / min(found["step: ours"], found["loader: ours"])


def rate_on(bench: Bench, ranks: int) -> float:
    """Images per second of train.py on so many devices, with the smaller batch on each."""

    def trained() -> float:
        require_devices(bench, ranks)
        prepare(bench.corpus, bench.scale.images, bench.scale.batch_sizes[0], torch.device("cpu"))
        shards = bench.corpus / f"images-{bench.scale.images}" / SHARDS
        name = f"ranks_{ranks}"
        keys: dict[str, Any] = {"data": "imagenet", "data.root": repeated(shards, bench.scale.repeat * ranks)}
        keys |= {"recipe": "paper", "width": 0.5, "epochs": 2, "recipe.warmup_epochs": 1, "trainer.devices": ranks}
        keys |= {"batch_size": bench.scale.batch_sizes[0] * ranks, "data.cache": bench.corpus}
        bench.train(name, **keys)
        return rate_of(bench, name)

    return float(bench.once(f"rate on {ranks}", trained))


def scaling(bench: Bench, ranks: int) -> float:
    """Percent of `ranks` times the rate of one device."""
    require_devices(bench, ranks)
    return 100 * rate_on(bench, ranks) / (ranks * rate_on(bench, 1))


# -- tests -------------------------------------------------------------------------------------------------------------


def gpu_tests(bench: Bench) -> str:
    """The tests that need a GPU, all of which have to run."""
    require_gpu(bench)
    return tests_ran(bench, "-m", "gpu", ROOT / "tests")


def tests_ran(bench: Bench, *selection: str | Path) -> str:
    """What pytest says of the tests that it ran. Raises Failed when one failed or was skipped, and when none ran."""
    said = bench.finished("tests", "-m", "pytest", "-q", "-rs", "--rootdir", ROOT, *selection)
    summary = said.strip().splitlines()[-1]
    if "skipped" in summary or "passed" not in summary:
        raise Failed(f"not all of them ran: {summary}", said[-3000:])
    return summary


def main() -> None:
    """python benchmarks/check_rates.py FUNCTION ARGUMENTS OUT: arguments and result are JSON."""
    name, arguments, out = sys.argv[1:]
    Path(out).write_text(json.dumps(globals()[name](*json.loads(arguments))))


if __name__ == "__main__":
    main()
