"""The weights of a batch in a step: changed where they are, each element read and written once, and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ldadam_dist.rounding import Place, chunks, write


@dataclass
class Weights:
    """Weights of b matrices.

    Attributes:
        stored: (b, m, n). If it is in another dtype than the computation, or on another device, b is 1: a part at a
            time is brought there, so that there is never a copy of the whole.
        place: where it lies in the whole matrix, if it is rounded stochastically.
    """

    stored: Tensor
    place: Place | None = None

    def add_product_(self, left: Tensor, right: Tensor, *, keep: float, factor: float) -> None:
        """W = keep · W + factor · left right, with left (b, m, r) and right (b, r, n)."""
        if (self.stored.dtype, self.stored.device) == (left.dtype, left.device):
            self.stored.baddbmm_(left, right, beta=keep, alpha=factor)
        else:
            a, b = left[0], right[0]
            self._by_parts(left, lambda w, i, j: w.addmm_(a[i], b[:, j], beta=keep, alpha=factor))

    def add_(self, update: Tensor, *, keep: float) -> None:
        """W = keep · W + update, with update (b, m, n)."""
        if (self.stored.dtype, self.stored.device) == (update.dtype, update.device):
            self.stored.mul_(keep).add_(update)
        else:
            self._by_parts(update, lambda w, i, j: w.mul_(keep).add_(update[0, i, j]))

    def _by_parts(self, like: Tensor, change: Callable[[Tensor, slice, slice], Tensor]) -> None:
        """Replace each part by what `change` makes of it, which gets its place as slices of rows and columns."""
        (whole,) = self.stored
        everything = slice(None)
        by_columns = whole.stride(0) < whole.stride(1)  # a transposed view: its parts are to be contiguous
        for start, stop in chunks(*(whole.mT.shape if by_columns else whole.shape)):
            rows, columns = (everything, slice(start, stop)) if by_columns else (slice(start, stop), everything)
            part, place = whole[rows, columns], self.place
            if place is not None:
                down, across = (0, start) if by_columns else (start, 0)
                place = replace(place, row=place.row + down, column=place.column + across)
            write(part, change(part.to(like.device, like.dtype, copy=True), rows, columns), place)
