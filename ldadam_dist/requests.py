"""What the step asks of the processes that share a matrix; the runtime answers.

Every tensor carries a leading batch dimension b: matrices of equal layout that are stepped together. Requests are
made in an order that follows from layout and hyperparameters alone, so it is the same on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from ldadam_dist.layout import Axis


@dataclass(frozen=True)
class Sum:
    """Sum of a tensor over the processes of `axis`. Answer: the sum, on every process."""

    axis: Axis
    tensor: Tensor


@dataclass(frozen=True)
class ScatterSum:
    """Sum of a (b, r, n) tensor over `axis`. Answer: this process's slice of the last dimension."""

    axis: Axis
    tensor: Tensor


@dataclass(frozen=True)
class Gather:
    """Slices of dimension `dim`, put side by side. Answer: the whole tensor, on every process.

    `length` is the extent of the whole; its slices are those of `chunk_bounds(length, axis.count)`.
    """

    axis: Axis
    tensor: Tensor
    dim: Literal[-2, -1]
    length: int


@dataclass(frozen=True)
class OnOwner:
    """Bring each matrix together on the rank that owns it, apply `function` there, and give everyone their rows.

    Attributes:
        tensor: (b, m_local, k), this process's part.
        combine: how the parts over the kept dimension make the whole: "sum" of partial sums, or "columns" side by
            side. Parts over the projected dimension are always rows.
        function: (c, m, K) -> (c, m, columns), for any batch size c.
        columns: number of columns of the result.

    Answer: (b, m_local, columns), this process's rows of the results.
    """

    tensor: Tensor
    combine: Literal["sum", "columns"]
    function: Callable[[Tensor], Tensor]
    columns: int


Request: TypeAlias = Sum | ScatterSum | Gather | OnOwner
Exchange: TypeAlias = Generator[Request, Tensor, Any]
"""A computation that yields requests, receives their answers and returns a result."""
