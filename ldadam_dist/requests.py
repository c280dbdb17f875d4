"""What the step asks of the processes that share a matrix; the runtime answers.

Every tensor carries a leading batch dimension b: matrices of equal layout that are stepped together. Requests are
made in an order that follows from layout and hyperparameters alone, so it is the same on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from ldadam_dist.layout import Axis, Part


@dataclass(frozen=True)
class Sum:
    """Sum of a tensor over the processes of `axis`. Answer: the sum, on every process."""

    axis: Axis
    tensor: Tensor

    def alone(self) -> Tensor:
        """The answer where nobody shares the matrix; every request has it."""
        return self.tensor


@dataclass(frozen=True)
class ScatterSum:
    """Sum of a (b, r, n) tensor over `axis`. Answer: this process's slice of the last dimension."""

    axis: Axis
    tensor: Tensor

    def alone(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Gather:
    """Slices of dimension `dim`, put side by side. Answer: the whole tensor, on every process.

    `length` is the extent of the whole; its slices are those of `axis.pieces(length)`.
    """

    axis: Axis
    tensor: Tensor
    dim: Literal[-2, -1]
    length: int

    def alone(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class OnOwner:
    """Add up the parts of each matrix over the kept dimension, apply `function` on its owner, give all their rows.

    Attributes:
        tensor: (b, m_local, k), this process's summand of its rows.
        function: (c, m, k), (c, s) -> (c, m, columns), for any batch size c.
        columns: number of columns of the result.
        totals: (b, s), this process's summand of numbers that are added up over all processes of the matrix.

    Answer: (b, m_local, columns), this process's rows of the results.
    """

    tensor: Tensor
    function: Callable[[Tensor, Tensor], Tensor]
    columns: int
    totals: Tensor

    def alone(self) -> Tensor:
        return self.function(self.tensor, self.totals)


@dataclass(frozen=True)
class Delegate:
    """Put the tensors of each matrix together on its owner, apply `function` there, and cut up what it returns.

    Attributes:
        tensors: this process's parts, (b, rows, columns) each.
        parts: which part of the whole each tensor is.
        function: the whole tensors, (c, rows, columns) each, to whole results, for any batch size c.
        returns: how each result is cut.

    Answer: a tuple of this process's parts of the results.
    """

    tensors: tuple[Tensor, ...]
    parts: tuple[Part, ...]
    function: Callable[..., tuple[Tensor, ...]]
    returns: tuple[Part, ...]

    def alone(self) -> tuple[Tensor, ...]:
        return self.function(*self.tensors)


@dataclass(frozen=True)
class Send:
    """Hand vectors to other processes of `axis`.

    Attributes:
        outgoing: (group rank, vector) pairs.
        incoming: (group rank, length) of each vector that comes from another; those of one rank in the order in which
            it sends them.
        tensor: of the dtype and device of the vectors.

    Answer: the vectors that came, in the order of `incoming`.
    """

    axis: Axis
    outgoing: tuple[tuple[int, Tensor], ...]
    incoming: tuple[tuple[int, int], ...]
    tensor: Tensor

    def alone(self) -> list[Tensor]:
        return []


Request: TypeAlias = Sum | ScatterSum | Gather | OnOwner | Delegate | Send
Exchange: TypeAlias = Generator[Request, Any, Any]
"""A computation that yields requests, receives their answers and returns a result."""


def alone(exchange: Exchange) -> Any:
    """The result of a computation on matrices that nobody shares."""
    answer = None
    while True:
        try:
            answer = exchange.send(answer).alone()
        except StopIteration as end:
            return end.value
