"""Drives steps in flight together and answers their requests with collectives.

A window of jobs runs in lockstep: each round advances every job to its next request, and requests of one kind over
one group become a single collective on a flat buffer. Rounds and buffers follow from the order of the jobs and from
their layouts alone, so every process issues the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldadam_dist.layout import Axis, MatrixLayout, chunk_bounds
from ldadam_dist.requests import Exchange, Gather, OnOwner, Request, ScatterSum, Sum

# Newer names of the same collectives, where torch has them: the old ones warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

WINDOW_ELEMENTS = 2**25
"""Elements of local matrices in flight together: bounds the temporary memory of a step, in the dtype of the maths."""


@dataclass
class Job:
    """A batch of matrices of equal layout, to be stepped.

    Attributes:
        layout: where each of them lies.
        owners: for each matrix, the index in its group of the rank that computes its projector.
        elements: local elements, for the window.
        start: makes the exchange; memory is taken here, not before.
        finish: takes the exchange's result.
    """

    layout: MatrixLayout
    owners: tuple[int, ...]
    elements: int
    start: Callable[[], Exchange]
    finish: Callable[[Any], None]


def run(jobs: Iterable[Job], window: int = WINDOW_ELEMENTS) -> None:
    """Run all jobs, at most `window` local elements (and at least one job) at a time.

    A job that asks nobody runs by itself: its matrix is then still in the cache from one product to the next.
    """
    for together in _windows(jobs, window):
        exchanges = [job.start() for job in together]
        answers: dict[int, Tensor | None] = dict.fromkeys(range(len(together)))
        while answers:
            asked: dict[int, Request] = {}
            for i, answer in answers.items():
                try:
                    asked[i] = exchanges[i].send(answer)  # type: ignore[arg-type]  # None starts a generator
                except StopIteration as end:
                    together[i].finish(end.value)
            answers = _answer(together, asked)


def _windows(jobs: Iterable[Job], window: int) -> Iterator[list[Job]]:
    together: list[Job] = []
    elements = 0
    for job in jobs:
        if job.layout.whole:
            yield [job]
            continue
        if together and elements + job.elements > window:
            yield together
            together, elements = [], 0
        together.append(job)
        elements += job.elements
    if together:
        yield together


def _answer(jobs: Sequence[Job], asked: dict[int, Request]) -> dict[int, Tensor | None]:
    """Answers by job number. What needs nobody else is answered at once; the rest is grouped into collectives."""
    answers: dict[int, Tensor | None] = dict.fromkeys(asked)  # keeps the jobs' order
    together: dict[tuple[Any, ...], list[int]] = {}
    for i, request in asked.items():
        axis = _axis_of(request, jobs[i].layout)
        if axis.count == 1:
            answers[i] = request.function(request.tensor) if isinstance(request, OnOwner) else request.tensor
        else:
            key = (type(request), axis.group, request.tensor.dtype, _route(request, jobs[i].layout))
            together.setdefault(key, []).append(i)
    for (kind, *_), members in together.items():
        axis = _axis_of(asked[members[0]], jobs[members[0]].layout)
        requests: list[Any] = [asked[i] for i in members]
        if kind is Sum:
            results = _sum(requests, axis)
        elif kind is ScatterSum:
            results = _scatter_sum(requests, axis)
        elif kind is Gather:
            results = _gather(requests, axis)
        else:
            results = _on_owner(requests, [jobs[i] for i in members], axis)
        answers.update(zip(members, results, strict=True))
    return answers


def _axis_of(request: Request, layout: MatrixLayout) -> Axis:
    if not isinstance(request, OnOwner):
        return request.axis
    if layout.over_m.count > 1 and layout.over_n.count > 1:
        raise RuntimeError("a matrix cut in both dimensions cannot be brought together on one owner.")
    return layout.shared_over


def _route(request: Request, layout: MatrixLayout) -> str | None:
    """How an owner's request travels: partial sums, columns or rows; None for every other request."""
    if not isinstance(request, OnOwner):
        return None
    return "rows" if layout.over_m.count > 1 else request.combine


def _flat(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    """All elements in one contiguous vector; a fresh one, as collectives overwrite it."""
    parts = [t.reshape(-1) for t in tensors]
    return torch.cat(parts) if parts else like.new_empty(0)


def _unflat(flat: Tensor, shapes: Iterable[Sequence[int]]) -> list[Tensor]:
    out, at = [], 0
    for shape in shapes:
        size = int(torch.Size(shape).numel())
        out.append(flat[at : at + size].view(*shape))
        at += size
    return out


def _sum(requests: Sequence[Sum], axis: Axis) -> list[Tensor]:
    flat = _flat((q.tensor for q in requests), requests[0].tensor)
    dist.all_reduce(flat, group=axis.group)
    return _unflat(flat, (q.tensor.shape for q in requests))


def _scatter_sum(requests: Sequence[ScatterSum], axis: Axis) -> list[Tensor]:
    bounds = [chunk_bounds(q.tensor.shape[-1], axis.count) for q in requests]
    parts = [
        _flat((q.tensor[..., slice(*b[p])] for q, b in zip(requests, bounds, strict=True)), requests[0].tensor)
        for p in range(axis.count)
    ]
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mine = padded.new_empty(padded.shape[1])
    _reduce_scatter(mine, padded.view(-1), group=axis.group)
    shapes = [
        (*q.tensor.shape[:-1], b[axis.index][1] - b[axis.index][0]) for q, b in zip(requests, bounds, strict=True)
    ]
    return _unflat(mine, shapes)


def _gather(requests: Sequence[Gather], axis: Axis) -> list[Tensor]:
    def shapes(p: int) -> list[list[int]]:
        out = []
        for q in requests:
            start, stop = chunk_bounds(q.length, axis.count)[p]
            shape = list(q.tensor.shape)
            shape[q.dim] = stop - start
            out.append(shape)
        return out

    mine = _flat((q.tensor for q in requests), requests[0].tensor)
    longest = sum(torch.Size(shape).numel() for shape in shapes(0))
    assert mine.numel() <= longest, "a stored slice is longer than its layout says"
    mine = torch.nn.functional.pad(mine, (0, longest - mine.numel()))
    whole = mine.new_empty(axis.count, longest)
    _all_gather(whole.view(-1), mine, group=axis.group)
    pieces = zip(*(_unflat(whole[p], shapes(p)) for p in range(axis.count)), strict=True)
    return [torch.cat(piece, dim=q.dim) for q, piece in zip(requests, pieces, strict=True)]


def _on_owner(requests: Sequence[OnOwner], jobs: Sequence[Job], axis: Axis) -> list[Tensor]:
    owned = [_owned_by(jobs, owner) for owner in range(axis.count)]
    route = _route(requests[0], jobs[0].layout)

    # To the owner. Partial sums are reduced; rows and columns are sent.
    if route == "sum":
        whole = _reduce_to_owners(requests, owned, axis)
    else:
        whole = _send_to_owners(requests, jobs, owned, axis, -2 if route == "rows" else -1)

    # On the owner.
    solved = [requests[i].function(matrices) for (i, _), matrices in zip(owned[axis.index], whole, strict=True)]

    # Back: every rank needs all rows where the kept dimension is cut, and its own rows where the projected one is.
    results = [
        q.tensor.new_empty(len(q.tensor), job.layout.m_local, q.columns) for q, job in zip(requests, jobs, strict=True)
    ]
    if route == "rows":
        _return_rows(results, solved, requests, jobs, owned, axis)
    else:
        _broadcast_from_owners(results, solved, owned, axis)
    return results


def _owned_by(jobs: Sequence[Job], owner: int) -> list[tuple[int, list[int]]]:
    """(job number, its matrices) that `owner` solves, without the jobs in which it owns none."""
    chosen = [(i, [b for b, o in enumerate(job.owners) if o == owner]) for i, job in enumerate(jobs)]
    return [(i, matrices) for i, matrices in chosen if matrices]


def _reduce_to_owners(requests: Sequence[OnOwner], owned: list[Any], axis: Axis) -> list[Tensor]:
    flats = [_flat((requests[i].tensor[b] for i, b in chosen), requests[0].tensor) for chosen in owned]
    works = [
        dist.reduce(flat, group_dst=owner, group=axis.group, async_op=True)
        for owner, flat in enumerate(flats)
        if flat.numel()
    ]
    for work in works:
        work.wait()
    mine = owned[axis.index]
    return _unflat(flats[axis.index], [(len(b), *requests[i].tensor.shape[1:]) for i, b in mine])


def _broadcast_from_owners(results: list[Tensor], solved: list[Tensor], owned: list[Any], axis: Axis) -> None:
    flats, works = [], []
    for owner, chosen in enumerate(owned):
        shapes = [(len(b), *results[i].shape[1:]) for i, b in chosen]
        if owner == axis.index:
            flat = _flat(solved, results[0])
        else:
            flat = results[0].new_empty(sum(torch.Size(shape).numel() for shape in shapes))
        flats.append((flat, shapes))
        if flat.numel():
            works.append(dist.broadcast(flat, group_src=owner, group=axis.group, async_op=True))
    for work in works:
        work.wait()
    for (flat, shapes), chosen in zip(flats, owned, strict=True):
        for (i, b), piece in zip(chosen, _unflat(flat, shapes), strict=True):
            results[i][b] = piece


def _send_to_owners(
    requests: Sequence[OnOwner], jobs: Sequence[Job], owned: list[Any], axis: Axis, dim: int
) -> list[Tensor]:
    """The owned matrices, put together from the pieces that lie along `dim`."""

    def piece_shape(i: int, count: int, p: int) -> list[int]:
        layout = jobs[i].layout
        start, stop = chunk_bounds(layout.m if dim == -2 else layout.n, axis.count)[p]
        shape = [count, *requests[i].tensor.shape[1:]]
        shape[dim] = stop - start
        return shape

    mine = owned[axis.index]
    arriving = [[piece_shape(i, len(b), p) for i, b in mine] for p in range(axis.count)]
    outgoing = [_flat((requests[i].tensor[b] for i, b in chosen), requests[0].tensor) for chosen in owned]
    pieces = zip(*_all_to_all(outgoing, arriving, axis), strict=True)
    return [torch.cat(piece, dim=dim) for piece in pieces]


def _return_rows(
    results: list[Tensor],
    solved: list[Tensor],
    requests: Sequence[OnOwner],
    jobs: Sequence[Job],
    owned: list[Any],
    axis: Axis,
) -> None:
    def rows_of(i: int, p: int) -> slice:
        return slice(*chunk_bounds(jobs[i].layout.m, axis.count)[p])

    outgoing = [
        _flat((s[:, rows_of(i, p)] for (i, _), s in zip(owned[axis.index], solved, strict=True)), requests[0].tensor)
        for p in range(axis.count)
    ]
    arriving = [[(len(b), *results[i].shape[1:]) for i, b in chosen] for chosen in owned]
    for chosen, pieces in zip(owned, _all_to_all(outgoing, arriving, axis), strict=True):
        for (i, b), piece in zip(chosen, pieces, strict=True):
            results[i][b] = piece


def _all_to_all(
    outgoing: Sequence[Tensor], arriving: Sequence[Sequence[Sequence[int]]], axis: Axis
) -> list[list[Tensor]]:
    """Send vector p to rank p; from each rank receive tensors of the `arriving` shapes."""
    sizes = [sum(torch.Size(shape).numel() for shape in shapes) for shapes in arriving]
    received = outgoing[0].new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(list(outgoing)), sizes, [t.numel() for t in outgoing], group=axis.group)
    return [_unflat(part, shapes) for part, shapes in zip(received.split(sizes), arriving, strict=True)]


def agree(status: Tensor, group: Any, device: torch.device) -> Tensor:
    """Element-wise maximum of a small CPU tensor over a group.

    Args:
        status: CPU tensor, of one shape on every process.
        group: process group.
        device: where it communicates.
    """
    on_device = status.to(device)
    dist.all_reduce(on_device, op=dist.ReduceOp.MAX, group=group)
    return on_device.to(status.device)
