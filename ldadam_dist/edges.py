"""Blocks of an error in 8 or 4 bits through which a cut goes: how large their elements are on all processes.

A block is 32 elements of a row of the whole parameter. Each process tells the largest |x| of what it has of its first
and of its last block, and looks up what others tell of the same ones. Where no block is cut nobody tells anything.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ldadam_dist.layout import Bounds, MatrixLayout
from ldadam_dist.quantized import BLOCK, Quantized
from ldadam_dist.requests import Exchange, Gather
from ldadam_dist.separate import Separate


def shared_edges(
    errors: Sequence[Tensor | Quantized | None], values: Tensor | Separate, layout: MatrixLayout
) -> Exchange:
    """The `edges` with which the errors of a batch are stored; see `quantized.Format.encode`.

    Args:
        errors: where each is stored.
        values: (b, m_local, n_local), what is to be stored.
        layout: of all of them.
    Returns:
        for each (rows as they are stored, 2), or None where that is not needed.
    """
    found: list[Tensor | None] = [None] * len(errors)
    for transposed in (False, True):
        stored = {i: e for i, e in enumerate(errors) if isinstance(e, Quantized) and e.transposed == transposed}
        axis, pieces = (layout.over_m, layout.m_pieces) if transposed else (layout.over_n, layout.n_pieces)
        alike = 1 if transposed else layout.sync.count
        order = axis.order or tuple(range(axis.count))
        told = _told(tuple(pieces.bounds[order.index(p)] for p in range(len(order))), order[axis.index], alike)
        if not stored or told is None:
            continue
        mine = torch.stack([_largest(values[i].mT if transposed else values[i], e.first) for i, e in stored.items()])
        whole: Tensor = yield Gather(axis, mine, -1, 2 * axis.count)
        # Replicas with errors of their own come one after the other: this one asks those like it.
        whole = whole.unflatten(-1, (-1, alike, 2))[..., order[axis.index] % alike, :].flatten(-2)
        first, last = (whole[..., start:stop] for start, stop in told)
        if first.shape[-1]:
            found_here = torch.stack([first.amax(-1), last.amax(-1)], dim=-1)
            for i, edges in zip(stored, found_here, strict=True):
                found[i] = edges
    return found


@functools.lru_cache(maxsize=4096)
def _told(bounds: tuple[Bounds, ...], position: int, alike: int) -> tuple[Bounds, Bounds] | None:
    """Which of the numbers that processes tell, two each, are of the first and of the last block of one of them.

    Args:
        bounds: what each process has of a row, in the order of the pieces.
        position: of the one.
        alike: so many after one another have the same piece; only every such one tells.
    Returns:
        None if no block is cut; two empty ranges for a process without elements.
    """
    bounds = bounds[position % alike :: alike]
    if not any(start % BLOCK and start < stop for start, stop in bounds):
        return None
    # Rising, but for processes without elements, which tell zeros: so those of a block lie between two of them.
    ends = [(start, stop - 1) if start < stop else (-1, -1) for start, stop in bounds]
    blocks = [column // BLOCK for both in ends for column in both]
    start, stop = bounds[position // alike]
    if start == stop:
        return (0, 0), (0, 0)

    def where(block: int) -> Bounds:
        return blocks.index(block), len(blocks) - blocks[::-1].index(block)

    return where(start // BLOCK), where((stop - 1) // BLOCK)


def _largest(values: Tensor, first: int) -> Tensor:
    """(rows, 2), the largest |x| of the first and of the last block of rows that begin at column `first`."""
    columns = values.shape[1]
    if not columns:
        return values.new_zeros(len(values), 2)
    last = max((first + columns - 1) // BLOCK * BLOCK - first, 0)
    ends = values[:, : BLOCK - first % BLOCK], values[:, last:]
    return torch.stack([end.abs().amax(1) for end in ends], dim=-1)
