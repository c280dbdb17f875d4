"""Brings matrices together on the ranks that own them, and hands out what these computed.

A matrix that is cut in both dimensions travels in two hops: over the kept dimension to the column of its owner, and
within that column over the projected dimension to the owner. It comes back the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from ldadam_dist.layout import WHOLE, Axis, Bounds, MatrixLayout, Part, Place
from ldadam_dist.requests import Delegate, OnOwner
from ldadam_dist.runtime.collectives import broadcast_from, exchange, flat, reduce_to, unflat
from ldadam_dist.runtime.failures import Waiting

Owned = dict[int, list[tuple[int, list[int]]]]
"""For each owner, in ascending order: (request number, its matrices in that request)."""

Parcel = tuple[int, Place]
"""An owner, and the process whose parts of this owner's matrices travel together."""

Parcels = dict[Parcel, list[Tensor]]
"""What is in each parcel: the parts, or one vector of all their elements."""


def answer_delegates(
    requests: Sequence[Delegate], layouts: Sequence[MatrixLayout], owned: Owned
) -> Waiting[list[tuple[Tensor, ...]]]:
    """Parts to the owners, whole results cut up and sent back: an all-to-all each way for each cut dimension."""
    return (yield from _at_owners(requests, layouts, owned, layouts[0].over_m, layouts[0].over_n))


def answer_on_owners(
    requests: Sequence[OnOwner], layouts: Sequence[MatrixLayout], owned: Owned
) -> Waiting[list[Tensor]]:
    """Sums reduced into the owner's column, rows to the owner and back, results broadcast from that column."""
    like, over_m, over_n = requests[0].tensor, layouts[0].over_m, layouts[0].over_n
    columns: dict[int, Owned] = {}
    for owner, matrices in owned.items():
        columns.setdefault(owner % over_n.count, {})[owner // over_n.count] = matrices

    def every(tensors: Sequence[Sequence[Tensor]], column: Owned) -> Tensor:
        return flat((t[chosen] for matrices in column.values() for i, chosen in matrices for t in tensors[i]), like)

    def fill(tensors: Sequence[Sequence[Tensor]], column: Owned, vector: Tensor) -> None:
        into = [(t, chosen) for matrices in column.values() for i, chosen in matrices for t in tensors[i]]
        pieces = unflat(vector, ((len(chosen), *tensor.shape[1:]) for tensor, chosen in into))
        for (tensor, chosen), piece in zip(into, pieces, strict=True):
            tensor[chosen] = piece

    sums = [(q.tensor, q.totals[:, None]) for q in requests]
    if over_n.count > 1:
        vectors = {j: every(sums, column) for j, column in columns.items()}
        yield from reduce_to(vectors, over_n)
        sums = [(torch.zeros_like(rows), torch.zeros_like(totals)) for rows, totals in sums]
        if over_n.index in columns:
            fill(sums, columns[over_n.index], vectors[over_n.index])

    results = [like.new_zeros(*q.tensor.shape[:2], q.columns) for q in requests]
    if over_n.index in columns:
        delegates = [
            Delegate(
                tensors=tensors,
                parts=(
                    Part("rows", layout.m, q.tensor.shape[-1]),
                    Part("own", over_m.count, q.totals.shape[-1]),
                ),
                function=_with_totals(q.function),
                returns=(Part("rows", layout.m, q.columns),),
            )
            for q, layout, tensors in zip(requests, layouts, sums, strict=True)
        ]
        answers = yield from _at_owners(delegates, layouts, columns[over_n.index], over_m, WHOLE)
        results = [answer for (answer,) in answers]

    if over_n.count > 1:
        each = [(result,) for result in results]
        vectors = {j: every(each, column) for j, column in columns.items()}
        yield from broadcast_from(vectors, over_n)
        for j, vector in vectors.items():
            fill(each, columns[j], vector)
    return results


def _at_owners(
    requests: Sequence[Delegate], layouts: Sequence[MatrixLayout], owned: Owned, over_m: Axis, over_n: Axis
) -> Waiting[list[tuple[Tensor, ...]]]:
    """Answer requests about matrices cut over `over_m` and `over_n`, whose owner is i · over_n.count + j."""
    like, here = requests[0].tensors[0], (over_m.index, over_n.index)
    me = over_m.index * over_n.count + over_n.index
    mine = owned.get(me, [])
    route = _Route(over_m, over_n, list(owned), like)

    def shapes(parcel: Parcel, returning: bool) -> list[tuple[int, int, int]]:
        owner, place = parcel
        return [
            (len(chosen), *_extent(layouts[i].bounds(part, place)))
            for i, chosen in owned[owner]
            for part in (requests[i].returns if returning else requests[i].parts)
        ]

    # To the owner.
    parcels = {
        (owner, here): [t[chosen] for i, chosen in matrices for t in requests[i].tensors]
        for owner, matrices in owned.items()
    }
    parcels = yield from route.go(parcels, lambda parcel: sum(map(prod, shapes(parcel, False))))

    # On the owner.
    wholes = [[like.new_zeros(len(b), part.rows, part.columns) for part in requests[i].parts] for i, b in mine]
    for parcel in list(parcels):
        pieces = iter(_opened(parcels.pop(parcel), shapes(parcel, False)))
        for (i, _), tensors in zip(mine, wholes, strict=True):
            for part, whole in zip(requests[i].parts, tensors, strict=True):
                _cut(whole, layouts[i].bounds(part, parcel[1])).copy_(next(pieces))
    solved = [requests[i].function(*tensors) for (i, _), tensors in zip(mine, wholes, strict=True)]

    # Back.
    for parcel in route.held(_AT_OWNER):
        parcels[parcel] = [
            _cut(whole, layouts[i].bounds(part, parcel[1]))
            for (i, _), results in zip(mine, solved, strict=True)
            for part, whole in zip(requests[i].returns, results, strict=True)
        ]
    parcels = yield from route.come_back(parcels, lambda parcel: sum(map(prod, shapes(parcel, True))))
    answers = [
        tuple(like.new_zeros(len(q.tensors[0]), *_extent(layout.bounds(part, here))) for part in q.returns)
        for q, layout in zip(requests, layouts, strict=True)
    ]
    for owner, matrices in owned.items():
        pieces = iter(_opened(parcels[owner, here], shapes((owner, here), True)))
        for i, chosen in matrices:
            for answer in answers[i]:
                answer[chosen] = next(pieces)
    return answers


_AT_PLACE, _IN_COLUMN, _AT_OWNER = range(3)
"""Where a parcel is: with its process, in that process's row and the owner's column, with the owner."""


@dataclass(frozen=True)
class _Route:
    """How parcels travel between the processes and the owners.

    Attributes:
        over_m, over_n: the axes that cut the matrices.
        owners: those that own any matrix, in ascending order.
        like: a tensor of the dtype and device of the parcels.
    """

    over_m: Axis
    over_n: Axis
    owners: list[int]
    like: Tensor

    def go(self, parcels: Parcels, size: Callable[[Parcel], int]) -> Waiting[Parcels]:
        """From the processes to the owners; `size` is the number of elements of any parcel."""
        parcels = yield from self._hop(parcels, size, _AT_PLACE, _IN_COLUMN)
        return (yield from self._hop(parcels, size, _IN_COLUMN, _AT_OWNER))

    def come_back(self, parcels: Parcels, size: Callable[[Parcel], int]) -> Waiting[Parcels]:
        """From the owners to the processes."""
        parcels = yield from self._hop(parcels, size, _AT_OWNER, _IN_COLUMN)
        return (yield from self._hop(parcels, size, _IN_COLUMN, _AT_PLACE))

    def held(self, stage: int) -> list[Parcel]:
        """The parcels that are here at a stage, in an order that sender and receiver share."""
        i, j = self.over_m.index, self.over_n.index
        if stage == _AT_PLACE:
            return [(owner, (i, j)) for owner in self.owners]
        if stage == _IN_COLUMN:
            column = [owner for owner in self.owners if owner % self.over_n.count == j]
            return [(owner, (i, place)) for owner in column for place in range(self.over_n.count)]
        me = i * self.over_n.count + j
        places = product(range(self.over_m.count), range(self.over_n.count))
        return [(me, place) for place in places] if me in self.owners else []

    def _at(self, parcel: Parcel, stage: int) -> Place:
        owner, place = parcel
        row, column = divmod(owner, self.over_n.count)
        return (place, (place[0], column), (row, column))[stage]

    def _hop(self, parcels: Parcels, size: Callable[[Parcel], int], old: int, new: int) -> Waiting[Parcels]:
        dim, axis = (0, self.over_m) if _AT_OWNER in (old, new) else (1, self.over_n)
        if axis.count == 1:
            return parcels
        outgoing: list[list[Tensor]] = [[] for _ in range(axis.count)]
        for parcel in self.held(old):
            outgoing[self._at(parcel, new)[dim]] += parcels.pop(parcel)
        coming: list[list[Parcel]] = [[] for _ in range(axis.count)]
        for parcel in self.held(new):
            coming[self._at(parcel, old)[dim]].append(parcel)
        sizes = [[size(parcel) for parcel in some] for some in coming]
        received = yield from exchange(outgoing, [sum(some) for some in sizes], axis, self.like)
        return {
            parcel: [vector]
            for some, vectors, each in zip(coming, received, sizes, strict=True)
            for parcel, vector in zip(some, vectors.split(each), strict=True)
        }


def _opened(parcel: list[Tensor], shapes: list[tuple[int, int, int]]) -> list[Tensor]:
    """The tensors of a parcel: one vector if it has travelled, else as they were put in."""
    return unflat(parcel[0], shapes) if parcel[0].ndim == 1 else parcel


def _cut(whole: Tensor, bounds: tuple[Bounds, Bounds]) -> Tensor:
    """View of a part of (c, rows, columns) whole tensors."""
    (top, bottom), (left, right) = bounds
    return whole[:, top:bottom, left:right]


def _extent(bounds: tuple[Bounds, Bounds]) -> tuple[int, int]:
    (top, bottom), (left, right) = bounds
    return bottom - top, right - left


def _with_totals(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor]]:
    """The same of what each process over the projected dimension has of the totals, (c, processes, s)."""
    return lambda tensor, each: (function(tensor, each.sum(dim=-2)),)
