"""Collectives and links: whether they give the right numbers, and how fast.

A collective's bandwidth is the bytes that each rank must send at least, over the time: of a vector of S bytes on n
ranks 2·S·(n−1)/n for an all-reduce, S·(n−1)/n for the others. A link's is S over the time in which two hosts send each
other S bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

# Newer names of the same collectives, where torch has them: the old ones warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_to_all = dist.all_to_all_single

_REPEATS = 3
_ROUNDS = 8
"""Of exchanges between hosts: so many partners, at most, each host has."""


@dataclass
class Timing:
    """One collective on one device type; `seconds` is the slowest rank's."""

    name: str
    device: str
    seconds: float
    gigabytes_per_second: float


def time_collectives(device: torch.device, elements: int, timeout: float) -> list[Timing]:
    """Run the optimizer's collectives on all ranks, on the device and on the CPU as checkpoints do.

    Args:
        elements: float32 numbers in the whole vector; rounded up to a multiple of the ranks.
    Raises:
        ValueError: a collective gave wrong numbers.
        RuntimeError: a collective failed or took longer than the timeout.
    """
    size, number = dist.get_world_size(), dist.get_rank()
    elements += -elements % size
    share = elements // size
    timings = []
    for on in dict.fromkeys([device, torch.device("cpu")]):
        mine = torch.full((share,), float(number + 1), device=on)
        whole = torch.full((elements,), float(number + 1), device=on)
        out, part = torch.empty_like(whole), torch.empty_like(mine)
        ranks_in_order = torch.arange(1.0, size + 1, device=on).repeat_interleave(share)
        total = torch.tensor(size * (size + 1) / 2, device=on)
        # name: (how to run it, its result, what that should be, times S·(n−1)/n)
        kinds: dict[str, tuple[Callable[[], Any], torch.Tensor, torch.Tensor, int]] = {
            "all_reduce": (partial(dist.all_reduce, whole, async_op=True), whole, total, 2),
            "reduce_scatter": (partial(_reduce_scatter, part, whole, async_op=True), part, total, 1),
            "all_gather": (partial(_all_gather, out, mine, async_op=True), out, ranks_in_order, 1),
            "all_to_all": (partial(_all_to_all, out, whole, async_op=True), out, ranks_in_order, 1),
        }
        for name, (run, result, expected, factor) in kinds.items():
            mean = 0.0
            for attempt in range(_REPEATS + 1):  # the first one connects
                whole.fill_(number + 1)
                _barrier(on, timeout)
                started = time.perf_counter()
                finish(run(), on, timeout)
                if attempt:
                    mean += (time.perf_counter() - started) / _REPEATS
            if not torch.equal(result, expected.expand_as(result)):
                raise ValueError(f"{name} on {on.type} gave wrong numbers on rank {number}")
            seconds = torch.tensor(mean, device=on)
            finish(dist.all_reduce(seconds, dist.ReduceOp.MAX, async_op=True), on, timeout)
            sent = factor * elements * 4 * (size - 1) / size
            timings.append(Timing(name, on.type, seconds.item(), sent / seconds.item() / 1e9))
    return timings


def time_links(leaders: list[int], device: torch.device, elements: int, timeout: float) -> dict[int, float]:
    """GB/s between this host and others, by the number of their first rank; called by the first rank of each host.

    In each round the hosts are paired, so that a slow one slows its partner's measurement only. The first exchange of
    a pair connects them and has both begin together; the fastest of the others counts, as anything else that runs on
    a host can only slow it down.
    """
    me, found = dist.get_rank(), {}
    payload, buffer = torch.ones(elements, device=device), torch.empty(elements, device=device)
    for pairs in rounds(leaders)[:_ROUNDS]:
        partner = next((b if a == me else a for a, b in pairs if me in (a, b)), None)
        if partner is None:
            continue
        exchange(payload, buffer, partner, device, timeout)
        fastest = float("inf")
        for _ in range(_REPEATS):
            started = time.perf_counter()
            exchange(payload, buffer, partner, device, timeout)
            fastest = min(fastest, time.perf_counter() - started)
        found[partner] = elements * 4 / fastest / 1e9
    return found


def exchange(payload: torch.Tensor, buffer: torch.Tensor, partner: int, device: torch.device, timeout: float) -> None:
    operations = [dist.P2POp(dist.isend, payload, partner), dist.P2POp(dist.irecv, buffer, partner)]
    for work in dist.batch_isend_irecv(operations):
        finish(work, device, timeout)


def rounds(players: list[int]) -> list[list[tuple[int, int]]]:
    """Pairs for each round, so that everyone meets everyone once: the first stays, the others move in a circle."""
    circle: list[int | None] = [*players] if len(players) % 2 == 0 else [*players, None]
    half, out = len(circle) // 2, []
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        out.append([(a, b) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return out


def finish(work: Any, device: torch.device, timeout: float) -> None:
    """Wait for a collective, on a GPU with a time limit of its own: there `wait` returns when it is queued."""
    if device.type == "cpu":
        work.wait()  # gloo keeps the group's time limit
        return
    work.wait()
    event = torch.cuda.Event()
    event.record()
    deadline = time.monotonic() + timeout
    while not event.query():
        if time.monotonic() > deadline:
            raise RuntimeError(f"a collective on {device} was not done within {timeout:.0f} s")
        time.sleep(2e-5)


def _barrier(device: torch.device, timeout: float) -> None:
    finish(dist.all_reduce(torch.zeros(1, device=device), async_op=True), device, timeout)
