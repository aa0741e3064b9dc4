"""How many threads and processes a rank's loaders have, and how far they are ahead: from what the machine has.

Check: `pytest tests/test_loader.py -k plan`.
"""

from data.reader import LoaderOptions

CORES_FOR_TWO_READERS = 8


def plan_loader(
    loader: str, workers: int | str, readers: int | str, prefetch: int, *, cores: int, on_gpu: bool, has_dali: bool
) -> LoaderOptions:
    """The plan for the values of conf, each of which may be `auto` but for prefetch.

    cores: that a rank may use. on_gpu: whether it trains on one. has_dali: whether its package is installed.
    """
    loader = choose_loader(loader, workers, has_dali)
    if loader == "torch":
        readers = 0
    elif readers == "auto":
        # On a GPU the training process has the kernels to launch. On a CPU a process more would take a core from it.
        readers = (2 if cores >= CORES_FOR_TWO_READERS else min(1, cores - 1)) if on_gpu else 0
    if workers == "auto":
        # The core that launches kernels and those of the readers are not DALI's.
        workers = max(1, cores - 1 - int(readers)) if loader == "dali" and on_gpu else cores
    return LoaderOptions(loader=loader, workers=int(workers), readers=int(readers), prefetch=prefetch)


def choose_loader(loader: str, workers: int | str, has_dali: bool) -> str:
    """`dali` or `torch` for a value that may be `auto`."""
    if loader == "auto":
        # DALI is the faster one, also on a CPU; without workers nothing is to run beside the training.
        return "dali" if has_dali and workers != 0 else "torch"
    return loader
