"""Seeds of generators that are drawn from once a step: pure functions of where the run stands."""

import numpy as np


def step_seed(*parts: int) -> int:
    """A 63-bit seed for what is drawn at one place of a run, such as (seed, epoch, batch, rank).

    numpy's SeedSequence mixes the numbers, so that neighbours give unrelated streams.
    """
    words = np.random.SeedSequence(parts).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))
