"""Collectives over one group, each answering many requests with one call on a flat buffer.

`axis` names the group; the pieces that a request means are those of its own axis. What communicates is a generator that
pauses while a collective is on its way (`failures.Waiting`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ldadam_dist.layout import Axis
from ldadam_dist.requests import Gather, ScatterSum, Send, Sum
from ldadam_dist.runtime.failures import Waiting, collective, complete, finish

# Newer names of the same collectives, where torch has them: the old ones warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def flat(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    """All elements in one contiguous vector; a fresh one, as collectives overwrite it."""
    parts = [t.reshape(-1) for t in tensors]
    return torch.cat(parts) if parts else like.new_empty(0)


def unflat(vector: Tensor, shapes: Iterable[Sequence[int]]) -> list[Tensor]:
    """Tensors of these shapes out of one vector, as views."""
    out, at = [], 0
    for shape in shapes:
        size = torch.Size(shape).numel()
        out.append(vector[at : at + size].view(*shape))
        at += size
    return out


def split(tensor: Tensor, dim: Literal[-2, -1], axis: Axis) -> Tensor:
    """The pieces of a tensor by group rank, (count, ...), each padded with zeros to the longest."""
    length, pieces = tensor.shape[dim], axis.pieces(tensor.shape[dim])
    if pieces.regular:
        padded = _pad(tensor, dim, axis.count * pieces.longest - length)
        parts: Tensor = padded.unflatten(dim, (axis.count, pieces.longest)).movedim(dim - 1, 0)
        return parts
    each = [tensor.narrow(dim, start, stop - start) for start, stop in pieces.bounds]
    return torch.stack([_pad(part, dim, pieces.longest - part.shape[dim]) for part in each])


def join(parts: Tensor, dim: Literal[-2, -1], axis: Axis, length: int) -> Tensor:
    """What `split` took apart: (count, ...) padded pieces side by side, `length` long."""
    pieces = axis.pieces(length)
    if pieces.regular:
        return parts.movedim(0, dim - 1).flatten(dim - 1, dim).narrow(dim, 0, length)
    in_order = sorted(range(axis.count), key=lambda p: pieces.bounds[p])
    return torch.cat([parts[p].narrow(dim, 0, pieces.bounds[p][1] - pieces.bounds[p][0]) for p in in_order], dim)


def _pad(tensor: Tensor, dim: Literal[-2, -1], extra: int) -> Tensor:
    if not extra:
        return tensor
    return pad(tensor, (0, extra) if dim == -1 else (0, 0, 0, extra))


def answer_sums(requests: Sequence[Sum], axis: Axis) -> Waiting[list[Tensor]]:
    """One all-reduce."""
    total = flat((q.tensor for q in requests), requests[0].tensor)
    yield from complete([partial(dist.all_reduce, total)], axis.group)
    return unflat(total, (q.tensor.shape for q in requests))


def answer_scatter_sums(requests: Sequence[ScatterSum], axis: Axis) -> Waiting[list[Tensor]]:
    """One reduce-scatter."""
    parts = [split(q.tensor, -1, q.axis) for q in requests]
    outgoing = torch.cat([part.flatten(1) for part in parts], dim=1)
    mine = outgoing.new_zeros(outgoing.shape[1])
    yield from complete([partial(_reduce_scatter, mine, outgoing.view(-1))], axis.group)
    answers = []
    for q, padded in zip(requests, unflat(mine, (part.shape[1:] for part in parts)), strict=True):
        start, stop = q.axis.bounds(q.tensor.shape[-1])
        answers.append(padded[..., : stop - start])
    return answers


def answer_gathers(requests: Sequence[Gather], axis: Axis) -> Waiting[list[Tensor]]:
    """One all-gather."""
    padded = []
    for q in requests:
        start, stop = q.axis.bounds(q.length)
        assert q.tensor.shape[q.dim] == stop - start, "a stored slice is not as long as its layout says"
        padded.append(_pad(q.tensor, q.dim, q.axis.pieces(q.length).longest - q.tensor.shape[q.dim]))
    mine = flat(padded, padded[0])
    whole = mine.new_zeros(axis.count, mine.numel())
    yield from complete([partial(_all_gather, whole.view(-1), mine)], axis.group)
    sections = whole.split([part.numel() for part in padded], dim=1)
    return [
        join(section.unflatten(1, part.shape), q.dim, q.axis, q.length)
        for q, section, part in zip(requests, sections, padded, strict=True)
    ]


def answer_sends(requests: Sequence[Send], axis: Axis) -> Waiting[list[list[Tensor]]]:
    """One all-to-all."""
    group_ranks = range(axis.count)
    outgoing = [[vector for q in requests for to, vector in q.outgoing if to == p] for p in group_ranks]
    lengths = [[length for q in requests for source, length in q.incoming if source == p] for p in group_ranks]
    received = yield from exchange(outgoing, [sum(each) for each in lengths], axis, requests[0].tensor)
    vectors = [iter(whole.split(each)) for whole, each in zip(received, lengths, strict=True)]
    return [[next(vectors[source]) for source, _ in q.incoming] for q in requests]


def exchange(
    outgoing: Sequence[Sequence[Tensor]], sizes: Sequence[int], axis: Axis, like: Tensor
) -> Waiting[list[Tensor]]:
    """One all-to-all: the tensors `outgoing[p]` go to group rank p, and a vector of `sizes[p]` comes from it."""
    # One element more goes from here to here: back-ends need not take a vector without any, and the fake one does not.
    sent, coming = [sum(t.numel() for t in tensors) for tensors in outgoing], list(sizes)
    sent[axis.index] += 1
    coming[axis.index] += 1
    parts = [[*tensors, like.new_zeros(1)] if p == axis.index else tensors for p, tensors in enumerate(outgoing)]
    received = like.new_zeros(sum(coming))
    outgoing_vector = flat((t for part in parts for t in part), like)
    yield from complete([partial(dist.all_to_all_single, received, outgoing_vector, coming, sent)], axis.group)
    return [vector[:size] for vector, size in zip(received.split(coming), sizes, strict=True)]


def reduce_to(vectors: dict[int, Tensor], axis: Axis) -> Waiting[None]:
    """Sum vector p, in place, on group rank p; on the others it is spoilt."""
    calls = [partial(dist.reduce, v, group_dst=p) for p, v in vectors.items() if v.numel()]
    yield from complete(calls, axis.group)


def broadcast_from(vectors: dict[int, Tensor], axis: Axis) -> Waiting[None]:
    """Give everyone, in place, vector p of group rank p."""
    calls = [partial(dist.broadcast, v, group_src=p) for p, v in vectors.items() if v.numel()]
    yield from complete(calls, axis.group)


def agree(status: Tensor, group: Any, device: torch.device) -> Tensor:
    """Element-wise maximum of a small CPU tensor over a group.

    Args:
        status: CPU tensor, of one shape on every process.
        group: process group.
        device: where it communicates.
    """
    return maxima(status.to(device, copy=True), group).to(status.device)


def all_reduce(vector: Tensor, group: Any) -> Waiting[None]:
    """Sum a tensor over a group, in place."""
    yield from complete([partial(dist.all_reduce, vector)], group)


def maxima(tensor: Tensor, group: Any) -> Tensor:
    """Element-wise maximum of a tensor over a group, in place."""
    finish(complete([partial(dist.all_reduce, tensor, op=dist.ReduceOp.MAX)], group))
    return tensor


def mean_slice(tensor: Tensor, axis: Axis) -> Tensor:
    """Mean of a (b, r, n) tensor over an axis: this process's slice of the last dimension."""
    if axis.count == 1:
        return tensor
    return finish(answer_scatter_sums([ScatterSum(axis, tensor / axis.count)], axis))[0]


def joined(tensor: Tensor, axis: Axis, length: int) -> Tensor:
    """Slices of the last dimension of a (b, r, n) tensor, put side by side, `length` long."""
    if axis.count == 1:
        return tensor
    return finish(answer_gathers([Gather(axis, tensor, -1, length)], axis))[0]


def gather_objects(mine: Any, group: Any) -> list[Any]:
    """What each rank of a group gives, by group rank; any picklable object."""
    found: list[Any] = [None] * dist.get_world_size(group)
    with collective("all_gather_object", partial(ranks_of, group)):
        dist.all_gather_object(found, mine, group=group)
    return found


def is_group(group: Any) -> bool:
    """Whether it is a process group that this process is in."""
    return dist.is_available() and isinstance(group, dist.ProcessGroup)


def ranks_of(group: Any) -> list[int]:
    """Global ranks of a group's members."""
    return dist.get_process_group_ranks(group)
