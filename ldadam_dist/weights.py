"""The weights of a batch in a step: changed where they are, each element read and written once, and rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ldadam_dist.rounding import Place, chunks, write
from ldadam_dist.separate import Separate


@dataclass
class Weights:
    """Weights of b matrices.

    Attributes:
        stored: (b, m, n). In another dtype than the computation, or on another device, they are brought there a part
            at a time, so that there is never a copy of a whole one.
        places: where each lies in the whole matrix, if it is rounded stochastically.
    """

    stored: Tensor | Separate
    places: Sequence[Place | None] = (None,)

    def add_product_(self, left: Tensor, right: Tensor, *, keep: float | Tensor, factor: float | Tensor) -> None:
        """W = keep · W + factor · left right, with left (b, m, r) and right (b, r, n)."""
        alpha = 1.0 if isinstance(factor, Tensor) else factor
        if isinstance(factor, Tensor):
            right = factor * right
        decay, beta = (keep, 1.0) if isinstance(keep, Tensor) else (None, keep)
        if (self.stored.dtype, self.stored.device) == (left.dtype, left.device):
            if decay is not None:
                self.stored.mul_(decay)
            self.stored.baddbmm_(left, right, beta=beta, alpha=alpha)
            return

        def change(part: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return (part if decay is None else part.mul_(decay)).addmm_(a, b, beta=beta, alpha=alpha)

        for w, a, b, place in zip(self.stored, left, right, self.places, strict=True):
            _by_parts(w, left, place, lambda part, i, j, a=a, b=b: change(part, a[i], b[:, j]))

    def add_(self, update: Tensor, *, keep: float | Tensor) -> None:
        """W = keep · W + update, with update (b, m, n)."""
        if isinstance(self.stored, Tensor) and (self.stored.dtype, self.stored.device) == (update.dtype, update.device):
            self.stored.mul_(keep).add_(update)
            return
        for w, change, place in zip(self.stored, update, self.places, strict=True):
            _by_parts(w, update, place, lambda p, i, j, change=change: p.mul_(keep).add_(change[i, j]))


def _by_parts(whole: Tensor, like: Tensor, place: Place | None, change: Callable[..., Tensor]) -> None:
    """Replace each part by what `change` makes of it, which gets its place as slices of rows and columns."""
    everything = slice(None)
    by_columns = whole.stride(0) < whole.stride(1)  # a transposed view: its parts are to be contiguous
    for start, stop in chunks(*(whole.mT.shape if by_columns else whole.shape)):
        rows, columns = (everything, slice(start, stop)) if by_columns else (slice(start, stop), everything)
        part, there = whole[rows, columns], place
        if place is not None:
            down, across = (0, start) if by_columns else (start, 0)
            there = replace(place, row=place.row + down, column=place.column + across)
        write(part, change(part.to(like.device, like.dtype, copy=True), rows, columns), there)
