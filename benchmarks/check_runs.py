"""What check_gpu.py does with the project's commands, as a user types them: training, evaluation, stops, failures.

Each check is a function of a Bench that returns a figure, or words where there is no number to judge; it raises Failed
with the end of the command's output when something goes wrong, and Skipped where this machine cannot run it.
"""

import json
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from benchmarks.check_bench import Bench, Command, require_devices, require_gpu
from benchmarks.check_report import Failed, Skipped
from benchmarks.common import ROOT, nvidia_smi, read_table
from data.index import load_index

STOPPED = 75  # checkpoint.exit_code


# -- what a run comes to -----------------------------------------------------------------------------------------------


def digits(bench: Bench) -> float:
    """Top-1 of a network trained on the digits."""
    return float(bench.digits()["top1"])


def torch_loader(bench: Bench) -> float:
    """Top-1 with loader=torch."""
    return float(bench.train("torch_loader", loader="torch", **bench.scale.digits)["top1"])


def fp16(bench: Bench) -> float:
    """Top-1 with precision=fp16, whose scaler skips the first steps."""
    require_gpu(bench)
    return float(bench.train("fp16", precision="fp16", **bench.scale.digits)["top1"])


def finetune(bench: Bench) -> float:
    """Top-1 of three epochs that begin with the weights of the digits, the first with all but the last layer frozen."""
    bench.digits()
    keys = dict(bench.scale.digits) | {"epochs": 3, "recipe": "finetune", "freeze_epochs": 1}
    keys |= {"recipe.warmup_epochs": 1, "weights": bench.run("digits") / "model.safetensors"}
    return float(bench.train("finetune", **keys)["top1"])


def evaluated(bench: Bench, name: str, trainer: str) -> dict[str, Any]:
    """What evaluate.py writes about the digits."""
    bench.digits()
    keys = [f"run={bench.run('digits')}", f"trainer={trainer}", "trainer.devices=1"]
    said = bench.finished(name, ROOT / "evaluate.py", *keys)
    written = said.rpartition("written to ")[2].splitlines()[0]
    return cast(dict[str, Any], json.loads((bench.folder / written).read_text()))


def repeated_evaluation(bench: Bench) -> float:
    """How many of three evaluations differ from the first one in any digit."""
    trainer = "cpu" if bench.device == "cpu" else "gpu"
    found = [evaluated(bench, f"evaluation_{i}", trainer) for i in range(3)]
    bench.kept["evaluation"] = found[0]
    return sum(each != found[0] for each in found)


def evaluation_on_cpu(bench: Bench) -> float:
    """Images that are right on one of GPU and CPU only, at least: the larger difference of both forms."""
    require_gpu(bench)
    mine = bench.kept.get("evaluation") or evaluated(bench, "evaluation_gpu", "gpu")
    other = evaluated(bench, "evaluation_cpu", "cpu")
    pairs = (mine["top1"], other["top1"]), (mine["fused"]["top1"], other["fused"]["top1"])
    return max(abs(round(a * mine["images"] / 100) - round(b * mine["images"] / 100)) for a, b in pairs)


# -- stops -------------------------------------------------------------------------------------------------------------


def resumed(bench: Bench, name: str, **keys: Any) -> str:
    """The same command again, which has to end with each epoch once."""
    bench.train(name, **keys)
    wanted = list(range(bench.scale.short["epochs"]))
    if (found := bench.epochs(name)) != wanted:
        raise Failed(f"metrics.csv of {name} has the epochs {found} instead of {wanted}")
    return f"went on, {len(wanted)} epochs"


def stopped(bench: Bench, name: str, send: Callable[[Command], None], **more: Any) -> tuple[int, str]:
    """Exit code and output of a short run to which `send` sends a signal in its second epoch; more: keys."""
    with bench.command(name, *bench.keys(name, **bench.scale.short, **more)) as command:
        command.until(lambda: bool(bench.epochs(name)))
        send(command)
        return command.end(), command.said


def stopped_by_sigterm(bench: Bench, name: str, **more: Any) -> str:
    """SIGTERM in the second epoch; says which exit code came, the one that is documented."""
    code, said = stopped(bench, name, lambda command: command.signal(signal.SIGTERM), **more)
    if code != STOPPED:
        raise Failed(f"exit code {code} after SIGTERM", said)
    return f"exit code {code}"


def sigterm(bench: Bench) -> str:
    """SIGTERM in the second epoch, and the same command again."""
    return f"{stopped_by_sigterm(bench, 'sigterm')}, {resumed(bench, 'sigterm', **bench.scale.short)}"


def sigkill(bench: Bench) -> str:
    """kill -9 in the second epoch, and the same command again; on a CPU the results of any stop are the same."""
    stopped(bench, "sigkill", lambda command: command.signal_all(signal.SIGKILL))
    said = resumed(bench, "sigkill", **bench.scale.short)
    if bench.device != "cpu" or not bench.epochs("sigterm"):
        return said
    one, other = ((bench.run(name) / "metrics.csv").read_bytes() for name in ("sigterm", "sigkill"))
    if one != other:
        raise Failed("metrics.csv differs between a run that was stopped and one that was killed")
    return f"{said}, the same as after SIGTERM"


def from_cpu(bench: Bench) -> str:
    """A checkpoint that a CPU wrote, resumed on a GPU."""
    require_gpu(bench)
    stopped_by_sigterm(bench, "from_cpu", trainer="cpu")
    return resumed(bench, "from_cpu", **bench.scale.short)


# -- several devices ---------------------------------------------------------------------------------------------------


def several(bench: Bench) -> float:
    """Top-1 of the digits on all devices."""
    require_devices(bench, 2)
    batch_size = max(64, 16 * bench.devices)
    epochs = bench.scale.digits["epochs"] * batch_size // 64  # as many steps
    keys = dict(bench.scale.digits) | {"epochs": epochs, "batch_size": batch_size, "trainer.devices": bench.devices}
    return float(bench.train("several", **keys)["top1"])


def failing_rank(bench: Bench) -> float:
    """Seconds from the damage of an image, which only one rank reads, to the end of every process."""
    require_devices(bench, 2)
    cache = bench.folder / "damaged"
    keys = dict(bench.scale.short) | {"epochs": 1000, "data.cache": cache, "data.skip_budget": 0}
    keys |= {"trainer.devices": bench.devices, "batch_size": max(64, 16 * bench.devices)}
    with bench.command("failing_rank", *bench.keys("failing_rank", **keys)) as command:
        command.until(lambda: bool(bench.epochs("failing_rank")))
        bench.kept["contexts"] = nvidia_smi("compute-apps", ("gpu_uuid", "pid")) if bench.device == "cuda" else []
        damaged = damage(cache / "digits", cache)
        began = time.monotonic()
        code = command.end(within=bench.scale.patience[1])
        seconds = time.monotonic() - began
    if code != 2 or damaged not in command.text:
        raise Failed(f"exit code {code} instead of 2 and a line about {damaged}", command.said)
    return seconds


def contexts(bench: Bench) -> float:
    """Processes on the GPU that has most of them, while each has a rank: one, unless ranks use each other's GPUs."""
    require_gpu(bench)
    require_devices(bench, 2)
    if "contexts" not in bench.kept:
        failing_rank(bench)
    if not (found := Counter(row["gpu_uuid"] for row in bench.kept["contexts"])):
        raise Skipped("nvidia-smi names no processes here, as in a container")
    return max(found.values())


def damage(shards: Path, cache: Path) -> str:
    """Changes a byte in the middle of one training image; returns the name of its shard."""
    index = load_index(shards, "train", cache)
    sample = index.samples[len(index) // 2]
    shard, place = Path(index.shards[sample["shard"]]), int(sample["offset"]) + int(sample["size"]) // 2
    with open(shard, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))
        file.seek(int(sample["offset"]))
        assert zlib.crc32(file.read(int(sample["size"]))) != sample["crc32"]
    return shard.name


def rate_of(bench: Bench, name: str) -> float:
    """Images per second of a run's last epoch."""
    return float(read_table(bench.run(name) / "timing.csv")[-1]["images_per_second"])
