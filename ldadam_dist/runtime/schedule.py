"""Runs the jobs of a window in lockstep, and groups what they ask for.

Each round advances every job to its next request, and requests of one kind over one group become a single collective.
Rounds and buffers follow from the order of the jobs and from their layouts alone, so every process issues the same
collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ldadam_dist.layout import Axis, MatrixLayout
from ldadam_dist.requests import Delegate, Exchange, Gather, OnOwner, Request, ScatterSum, Send, Sum, alone
from ldadam_dist.runtime.collectives import answer_gathers, answer_scatter_sums, answer_sends, answer_sums
from ldadam_dist.runtime.cores import side_by_side
from ldadam_dist.runtime.failures import Waiting, finish
from ldadam_dist.runtime.owners import Owned, answer_delegates, answer_on_owners


@dataclass
class Job:
    """A batch of matrices of equal layout, to be stepped.

    Attributes:
        layout: where each of them lies.
        device: where they are stepped.
        owners: for each matrix, the number of the process that computes its projector: its place (i, j) as
            i · over_n.count + j.
        start: makes the exchange, which takes memory when it is first advanced and stores its result itself.
    """

    layout: MatrixLayout
    device: torch.device
    owners: tuple[int, ...]
    start: Callable[[], Exchange]


def run(windows: Iterable[Iterable[Job]]) -> None:
    """Run the jobs of windows side by side: while the collectives of one are on their way, the next computes.

    They take turns, one round each. So the order of their collectives does not depend on which are done first.
    """
    running = [_rounds(jobs) for jobs in windows]
    while running:
        running = [window for window in running if next(window, _ENDED) is not _ENDED]


_ENDED = object()


def _rounds(jobs: Iterable[Job]) -> Waiting[None]:
    """Run the jobs of one window: those of shared matrices together. Pauses once a round.

    A job that asks nobody runs by itself: its matrix is then still in the cache from one product to the next.
    """
    shared, on_cores = [], []
    for job in jobs:
        if not job.layout.whole:
            shared.append(job)
        elif job.device.type == "cpu":
            on_cores.append((len(job.owners) * job.layout.shard_elements, lambda job=job: alone(job.start())))
        else:
            alone(job.start())
    side_by_side(on_cores)
    exchanges = [job.start() for job in shared]
    answers: dict[int, Any] = dict.fromkeys(range(len(shared)))
    while answers:
        asked: dict[int, Request] = {}
        for i, answer in answers.items():
            with suppress(StopIteration):
                asked[i] = exchanges[i].send(answer)
        answers = yield from _answer(shared, asked)


_OVER_ONE_GROUP: dict[type, Callable[..., Waiting[Sequence[Any]]]] = {
    Sum: answer_sums,
    ScatterSum: answer_scatter_sums,
    Gather: answer_gathers,
    Send: answer_sends,
}


def _answer(jobs: Sequence[Job], asked: dict[int, Request]) -> Waiting[dict[int, Any]]:
    """Answers by job number. What needs nobody else is answered at once; the rest is grouped into collectives.

    Pauses exactly once, when the first collective of each group is on its way: how many follow depends on the rank.
    """
    answers: dict[int, Any] = dict.fromkeys(asked)  # keeps the jobs' order
    together: dict[tuple[Any, ...], list[int]] = {}
    for i, request in asked.items():
        if isinstance(request, (OnOwner, Delegate)):
            axes: tuple[Axis, ...] = (jobs[i].layout.over_m, jobs[i].layout.over_n)
        else:
            axes = (request.axis,)
        if all(axis.count == 1 for axis in axes):
            answers[i] = request.alone()
        else:
            tensor = request.tensors[0] if isinstance(request, Delegate) else request.tensor
            groups = (axis.group for axis in axes)
            together.setdefault((type(request), tensor.dtype, *groups), []).append(i)
    under_way: list[tuple[list[int], Waiting[Sequence[Any]]]] = []
    for (kind, *_), members in together.items():
        requests: list[Any] = [asked[i] for i in members]
        layouts = [jobs[i].layout for i in members]
        if kind in _OVER_ONE_GROUP:
            answering = _OVER_ONE_GROUP[kind](requests, requests[0].axis)
        else:
            owned = _owned([jobs[i] for i in members])
            answering = (answer_on_owners if kind is OnOwner else answer_delegates)(requests, layouts, owned)
        next(answering)
        under_way.append((members, answering))
    yield
    for members, answering in under_way:
        answers.update(zip(members, finish(answering), strict=True))
    return answers


def _owned(jobs: Sequence[Job]) -> Owned:
    """What each owner has: (job number, its matrices), without the jobs in which it owns none."""
    owned: Owned = {}
    for i, job in enumerate(jobs):
        for b, owner in enumerate(job.owners):
            mine = owned.setdefault(owner, [])
            if not mine or mine[-1][0] != i:
                mine.append((i, []))
            mine[-1][1].append(b)
    return dict(sorted(owned.items()))
