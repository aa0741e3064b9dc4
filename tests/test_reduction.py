"""What ranks exchange in a step. Two threads stand for the ranks; tests/test_distributed.py has processes."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from repghost.model import RepGhostNet, repghostnet
from repghost.training.reduction import GO_ON, SAVE, STOP, RankAverage, Requests

CPU = torch.device("cpu")
RANKS = 2


def in_ranks(monkeypatch: pytest.MonkeyPatch, function: Callable[[int], object]) -> None:
    """Calls `function(rank)` in a thread for each rank."""
    barrier, parts, errors = threading.Barrier(RANKS, timeout=60), {}, []
    ranks = threading.local()

    def all_reduce(tensor: Tensor) -> None:
        parts[ranks.mine] = tensor.clone()
        barrier.wait()
        tensor.copy_(sum(parts[rank] for rank in range(RANKS)))
        barrier.wait()

    def call(rank: int) -> None:
        ranks.mine = rank
        try:
            function(rank)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    monkeypatch.setattr(dist, "get_world_size", lambda: RANKS)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    threads = [threading.Thread(target=call, args=[rank]) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def network(rank: int) -> RepGhostNet:
    """One with gradients and statistics that are the rank's own, in channels_last."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = repghostnet(0.1, 3).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(rank)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator))
    return model


def test_gradients_and_statistics_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [network(rank) for rank in range(RANKS)]

    def average_twice(rank: int) -> None:
        average = RankAverage(models[rank])
        average()
        for parameter in models[rank].parameters():
            assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()
        models[rank].zero_grad()
        for parameter, fresh in zip(models[rank].parameters(), network(rank).parameters(), strict=True):
            parameter.grad = fresh.grad
        average()

    in_ranks(monkeypatch, average_twice)
    one, other = (network(rank) for rank in range(RANKS))
    for mine in models:
        for a, b, c in zip(mine.parameters(), one.parameters(), other.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None and c.grad is not None
            assert torch.equal(a.grad, b.grad / 2 + c.grad / 2)
        for x, y, z in zip(mine.buffers(), one.buffers(), other.buffers(), strict=True):
            assert torch.equal(x, (y + z) / 2 if y.is_floating_point() else y)


def test_the_largest_request_is_followed_a_batch_later(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [(GO_ON, GO_ON), (SAVE, SAVE), (SAVE, STOP), (GO_ON, SAVE), (GO_ON, GO_ON)]
    answers: dict[int, list[int]] = {0: [], 1: []}

    def ask(rank: int) -> None:
        now = iter(wanted)
        requests, average = Requests(lambda: next(now)[rank], RANKS, CPU), RankAverage(network(rank))
        for batch in range(len(wanted)):
            if batch % 2:
                requests.exchange()
            else:
                average(requests)
            answers[rank].append(requests.largest())
        requests.clear()
        assert requests.largest() == GO_ON

    in_ranks(monkeypatch, ask)
    assert answers[0] == answers[1] == [GO_ON, GO_ON, SAVE, STOP, SAVE]


def test_an_answer_that_was_not_read_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(rank: int) -> None:
        now = iter([STOP if rank else GO_ON, GO_ON, GO_ON])
        requests = Requests(lambda: next(now), RANKS, CPU)
        for _ in range(3):  # as in the last batch of an epoch, at which nothing is saved
            requests.exchange()
        assert requests.largest() == STOP

    in_ranks(monkeypatch, ask)


def test_a_rank_alone_is_heard_at_once() -> None:
    requests = Requests(lambda: STOP, 1, CPU)
    requests.exchange()
    assert requests.largest() == STOP
