"""Walks the sampler for many ranks and checks that every epoch is shared out evenly, completely and without repetition.

    python benchmarks/simulate_ranks.py                    512 ranks, ImageNet's 1,281,167 images, two epochs
    python benchmarks/simulate_ranks.py --ranks 64 --rows 32 --accumulate 4

For every epoch, every rank and every batch it asks what a training process asks: the first position of the batch
(`data.sampling.Partition`), and which samples stand there in the order of the epoch (`data.sampling.epoch_order`).
Then it checks that
- balanced: all ranks have the same number of batches, so that none waits for another at an epoch's end;
- complete: every sample is in the epoch once, but for the rest that fills no step: fewer samples than a step takes;
- without repetition: no sample is on two ranks, or twice on one;
- the same for any number of ranks: a step's samples, put together, are the next ones of the epoch's order;
- another order in every epoch.
It does the same for validation, where all samples count and what is beyond them is masked. Exit code 1 if anything of
this does not hold. The cost that it prints is that of one rank, which draws the order of an epoch by itself.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.sampling import Partition, epoch_order

IMAGENET = (1_281_167, 50_000)  # training and validation images


def violations(samples: int, rows: int, ranks: int, accumulate: int, order: np.ndarray, train: bool) -> Iterator[str]:
    """What is wrong with an epoch of `samples` samples that stand in `order`; nothing, if all is well."""
    parts = [Partition(samples, rows, rank, ranks, accumulate, drop_last=train) for rank in range(ranks)]
    counts = {part.batches for part in parts}
    if len(counts) > 1:
        yield f"the ranks have {min(counts)} to {max(counts)} batches"
    step = rows * ranks * accumulate
    if train and any(part.batches % accumulate for part in parts):
        yield "a rank's epoch ends within a step"

    # [ranks, batches, rows]: where every row of every batch stands in the epoch.
    batches = max(counts)
    starts = np.array([[part.start(batch) for batch in range(batches)] for part in parts], dtype=np.int64)
    positions = starts.reshape(ranks, batches, 1) + np.arange(rows)
    visits = np.bincount(order[positions[positions < samples]], minlength=samples)
    left_out = int((visits == 0).sum())
    if (most := int(visits.max(initial=0))) > 1:
        yield f"a sample is visited {most} times"
    if left_out != (expected := samples % step if train else 0):
        yield f"{left_out} samples are left out, not {expected}"
    if train and (positions >= samples).any():
        yield "a training batch has a row without a sample"
    globally = positions.transpose(1, 0, 2).reshape(-1)
    if not np.array_equal(globally, np.arange(len(globally))):
        yield "a step's samples are not the next ones of the order"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=512, help="(default %(default)s)")
    parser.add_argument("--rows", type=int, default=128, help="of a batch on one rank (default %(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step (default %(default)s)")
    parser.add_argument("--samples", type=int, nargs=2, default=IMAGENET, metavar=("TRAIN", "VAL"))
    parser.add_argument("--epochs", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    options = parser.parse_args(arguments)
    train, val = options.samples
    shape = (options.rows, options.ranks, options.accumulate)

    found: list[str] = []
    orders: list[np.ndarray] = []
    spent = []
    for epoch in range(options.epochs):
        start = time.perf_counter()
        order = epoch_order(options.seed, epoch, train)
        spent.append(time.perf_counter() - start)
        if not np.array_equal(np.sort(order), np.arange(train)):
            found.append(f"epoch {epoch}: the order is no permutation")
        if any(np.array_equal(order, other) for other in orders):
            found.append(f"epoch {epoch}: the order is that of an epoch before")
        orders.append(order)
        found += [f"epoch {epoch}: {violation}" for violation in violations(train, *shape, order, train=True)]
    found += [f"validation: {v}" for v in violations(val, options.rows, options.ranks, 1, np.arange(val), train=False)]

    one = Partition(train, options.rows, 0, options.ranks, options.accumulate)
    step = options.rows * options.ranks * options.accumulate
    print(
        f"{options.ranks} ranks of {options.rows} rows, {options.accumulate} batch(es) a step: {step:,} images a step\n"
        f"training    {train:,} samples, {one.batches} batches a rank in each of {options.epochs} epochs, "
        f"{train - train // step * step:,} samples left out of an epoch\n"
        f"validation  {val:,} samples, {Partition(val, *shape[:1], 0, options.ranks, drop_last=False).batches} "
        f"batches a rank\n"
        f"cost        {max(spent):.2f} s and {orders[0].nbytes / 1e6:.0f} MB for the order of an epoch, once an epoch "
        f"on every rank; {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB at most for all ranks "
        "in this process"
    )
    for line in found:
        print(f"VIOLATION   {line}")
    if not found:
        print("balanced, complete, without repetition, the same steps as on one rank")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
