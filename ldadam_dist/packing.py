"""The states of a matrix as tensors of Adam's shape, which DeepSpeed's universal checkpoints are made of.

`ds_to_universal` knows two tensors beside the weights, exp_avg and exp_avg_sq, each with an element for every weight.
What AdamW keeps is that. The states of a matrix are put into one vector,

    error, rows · columns;  projector, m · r;  exp_avg transposed, n · r;  exp_avg_sq transposed, n · r

which is cut into planes of rows · columns elements. The first is exp_avg and the second exp_avg_sq. As r < min(m, n),
there are at most four: the third and the fourth are the imaginary parts of exp_avg_sq and of exp_avg, which are complex
only in a flat tensor with a matrix that needs them. So every rank fits, and nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldadam_dist.layout import Bounds
from ldadam_dist.rules import Side

Runs = list[Bounds]
"""Runs of a vector that a process has, one after the other."""


@dataclass(frozen=True)
class Packing:
    """The vector of one matrix.

    Attributes:
        rows, columns: the matrix's shape.
        rank: directions that are kept of it.
        side: the side that is projected.
    """

    rows: int
    columns: int
    rank: int
    side: Side

    @property
    def m(self) -> int:
        """Extent of the projected dimension."""
        return self.rows if self.side == "left" else self.columns

    @property
    def n(self) -> int:
        """Extent of the kept dimension."""
        return self.columns if self.side == "left" else self.rows

    @property
    def plane(self) -> int:
        """Elements of a plane."""
        return self.rows * self.columns

    @property
    def length(self) -> int:
        """Elements of the vector."""
        return self.plane + self.rank * (self.m + 2 * self.n)

    @property
    def planes(self) -> int:
        """Planes that the vector takes, 2 to 4."""
        return math.ceil(self.length / self.plane)

    @property
    def whole(self) -> tuple[Bounds, Bounds, Bounds]:
        """The bounds of somebody who has everything; see `states_at`."""
        return (0, self.rows), (0, self.m), (0, self.n)

    def states_at(self, error: Bounds, projector: Bounds, moments: Bounds) -> Runs:
        """Where states are in the vector.

        Args:
            error: bounds of the rows of the error.
            projector: of the projector's.
            moments: of the moments' columns.
        """
        after = self.plane + self.m * self.rank
        return [
            (error[0] * self.columns, error[1] * self.columns),
            (self.plane + projector[0] * self.rank, self.plane + projector[1] * self.rank),
            (after + moments[0] * self.rank, after + moments[1] * self.rank),
            (after + (self.n + moments[0]) * self.rank, after + (self.n + moments[1]) * self.rank),
        ]

    def planes_at(self, start: int, stop: int) -> Runs:
        """Where elements `start` to `stop` of each plane are in the vector, which may end before."""
        return [
            (min(i * self.plane + start, self.length), min(i * self.plane + stop, self.length))
            for i in range(self.planes)
        ]

    def join(self, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The runs of `states_at`, on the CPU.

        Args:
            state: error (rows, columns), projector (m, r), exp_avg and exp_avg_sq (r, n), or those parts of them.
            dtype: of the result.
        """
        parts = state["error"], state["projector"], state["exp_avg"].mT, state["exp_avg_sq"].mT
        return torch.cat([part.reshape(-1).to("cpu", dtype) for part in parts])

    def split(self, vector: Tensor, error: Bounds, projector: Bounds, moments: Bounds) -> dict[str, Tensor]:
        """What `join` took, from the runs of `states_at` with the same bounds."""
        parts = vector.split([stop - start for start, stop in self.states_at(error, projector, moments)])
        exp_avg, exp_avg_sq = (part.view(-1, self.rank).mT.contiguous() for part in parts[2:])
        return {
            "error": parts[0].view(-1, self.columns),
            "projector": parts[1].view(-1, self.rank),
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
        }


def dtypes_of(planes: int, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """dtypes of exp_avg and of exp_avg_sq that hold so many planes of `dtype`."""
    return (dtype.to_complex() if planes > 3 else dtype), (dtype.to_complex() if planes > 2 else dtype)


def planes_of(exp_avg: Tensor, exp_avg_sq: Tensor) -> list[Tensor]:
    """The planes of two tensors, as views."""
    (first, *last), second = (
        list(torch.view_as_real(t).unbind(-1)) if t.is_complex() else [t] for t in (exp_avg, exp_avg_sq)
    )
    return [first, *second, *last]


def read_planes(planes: Sequence[Tensor], runs: Runs) -> Tensor:
    """Runs of the vector whose planes are given whole."""
    size = len(planes[0])
    every = [(i * size, (i + 1) * size) for i in range(len(planes))]
    parts = [planes[start // size][start % size :][:length] for start, _, length in overlaps(every, runs)]
    return torch.cat(parts) if parts else planes[0].new_empty(0)


def overlaps(these: Runs, those: Runs) -> Iterator[tuple[int, int, int]]:
    """(where it begins in the elements of `these`, where in those of `those`, length) of what both have.

    Args:
        these, those: runs in the order of the vector.
    """
    here = 0
    for start, stop in these:
        there = 0
        for first, last in those:
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield here + low - start, there + low - first, high - low
            there += last - first
        here += stop - start
