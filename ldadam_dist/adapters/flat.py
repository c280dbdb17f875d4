"""Parameters inside a flat 1-D tensor of which each process has a partition, as under DeepSpeed's ZeRO.

A partition may begin and end anywhere. So a matrix lies on one process, which then steps it alone, or it is cut over
some of them, at any element. In the steps of a cut one all processes take part: those without any of it with empty
blocks, but with a share of the states and of the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.layout import WHOLE, Axis, Bounds, MatrixLayout, RowCut


@dataclass(frozen=True)
class FlatRange:
    """Where the elements of a parameter are.

    Attributes:
        starts: the element at which the run of each process begins, and the number of elements; it does not fall.
        index: this process.
        offset: where its run begins in its partition.
    """

    starts: tuple[int, ...]
    index: int
    offset: int

    @classmethod
    def in_partitions(cls, numel: int, offset: int, size: int, count: int, index: int) -> FlatRange:
        """Of `numel` elements that begin at `offset` of a flat tensor, cut into `count` partitions of `size`."""
        starts = [min(max(p * size - offset, 0), numel) for p in range(count)]
        return cls((*starts, numel), index, max(0, offset - index * size))

    @classmethod
    def in_runs(cls, numel: int, length: int, count: int, index: int, offset: int) -> FlatRange:
        """Of `numel` elements cut into `count` runs of `length`; this process has its own at `offset`."""
        return cls((*(min(p * length, numel) for p in range(count)), numel), index, offset)

    @property
    def length(self) -> int:
        """Elements on this process."""
        return self.starts[self.index + 1] - self.starts[self.index]

    def part(self, start: int, stop: int) -> FlatRange:
        """The same of its elements from `start` to `stop`, as of a parameter of their own."""
        starts = tuple(min(max(element, start), stop) - start for element in self.starts)
        return FlatRange(starts, self.index, self.offset + max(0, start - self.starts[self.index]))


class FlatAdapter:
    """A matrix, or a parameter that is stepped element by element, in a flat tensor; see `TensorAdapter`.

    Args:
        flat: this process's partition.
        elements: where its elements are.
        ranks: global ranks of the processes of `group`, by group rank.
        group: the group over which the flat tensor is partitioned.
        device: where matrices are stepped, and where the group communicates.
        columns: length of a row; 0 for what is no matrix.
    """

    sharded = False
    copies = 1
    averaged_in_backward = False
    sync: Axis | None = None
    alike: Axis | None = None

    def __init__(
        self, flat: Tensor, elements: FlatRange, ranks: Sequence[int], group: Any, device: torch.device, columns: int
    ) -> None:
        self._flat, self.elements, self._columns = flat, elements, columns
        self.device, self.is_matrix = device, columns > 0
        self.groups = ((group, device),)
        self._holders = [p for p in range(len(ranks)) if elements.starts[p] < elements.starts[p + 1]]
        self._ranks = ranks
        cut = RowCut(elements.starts, columns) if columns and len(self._holders) > 1 else None
        self._edges = None if cut is None else cut.edges
        self._axis = WHOLE if cut is None else Axis((len(ranks),), elements.index, group)
        self.cut = None if cut is None or cut.even else cut
        self.present = elements.length > 0 or cut is not None  # of a cut matrix everyone holds some of the states

    def check(self, param: Tensor, name: str) -> None:
        """Its place was checked when it was told."""

    def layout(self, rows: int, columns: int, side: str, rank: int) -> MatrixLayout:
        """Layout of the (rows, columns) matrix of which `side` is projected onto `rank` directions."""
        if side == "left":
            return MatrixLayout(rows, columns, rank, over_m=self._axis, m_edges=self._edges)
        return MatrixLayout(columns, rows, rank, over_n=self._axis, n_edges=self._edges)

    def held(self, number: int) -> tuple[Bounds, int]:
        """It is no stack: each matrix of one is a parameter here."""
        return (0, number), number

    def new_state(self, param: Tensor, shape: Sequence[int], part: str, side: str, dtype: torch.dtype) -> Tensor:
        """This process's part, of zeros, of a state of global `shape`; that of the error are whole rows."""
        return torch.zeros(self.state_shape(shape, part, side), dtype=dtype, device=param.device)

    def as_state(self, local: Tensor, param: Tensor, shape: Sequence[int], part: str, side: str) -> Tensor:
        """The state of global `shape` of which this process has `local`."""
        return local

    def new_moment(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        """A new moment of AdamW, of zeros, for the elements on this process."""
        return torch.zeros_like(self.local(param), dtype=dtype)

    def state_shape(self, shape: Sequence[int], part: str, side: str) -> tuple[int, ...]:
        """Shape of the tensor that `new_state` makes."""
        if not self.is_matrix:
            return (self.elements.length,)
        if not self.present:
            return 0, 0
        if part == "error":
            return self._block_rows(shape[0]), shape[1]
        m_or_n = shape[0] if part == "projector" else shape[1]
        if (part == "projector") == (side == "left"):
            here = self._block_rows(m_or_n)
        else:  # no rows of the parameter: split evenly
            start, stop = self._axis.bounds(m_or_n)
            here = stop - start
        return (here, shape[1]) if part == "projector" else (shape[0], here)

    def _block_rows(self, rows: int) -> int:
        """Rows of the block that is stepped here."""
        if self._edges is None:
            return rows
        return self._edges[self.elements.index + 1] - self._edges[self.elements.index]

    def local_shape(self, shape: Sequence[int], part: str, side: str) -> tuple[int, ...]:
        """Shape of what this process holds of a state."""
        return self.state_shape(shape, part, side)

    def places(self, param: Tensor, shape: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Where elements `start` to `stop` of its run are in the parameter; see `TensorAdapter.places`."""
        first = self.elements.starts[self.elements.index]
        elements = torch.arange(first + start, first + stop, device=self._flat.device)[:, None]
        columns = math.prod(shape[1:])
        return elements // columns, elements % columns

    def owner_rank(self, owner: int, side: str) -> int:
        """Global rank of a matrix's owner, from its number among the processes that share the matrix."""
        return self._ranks[owner]

    def describe(self) -> str:
        """Which ranks have elements of it."""
        ranks = [self._ranks[p] for p in self._holders]
        if len(ranks) < 2:
            return f"on rank {ranks[0]}" if ranks else "empty"
        return f"cut, ranks {ranks[0]}-{ranks[-1]}"

    def local(self, tensor: Tensor) -> Tensor:
        """The elements of the parameter on this process, as a matrix if they are whole rows; a state as it is."""
        return self._run(tensor.detach()) if tensor is self._flat else tensor.detach()

    def reductions(self) -> tuple[str, ...]:
        """What becomes of sums over elements on other processes; see `MeshAdapter.reductions`."""
        return ("sum",)

    def as_grad(self, error: Tensor, param: Tensor) -> Tensor:
        """Never asked: an engine's flat tensors have no errors in their gradients."""
        raise NotImplementedError

    def must_redistribute(self, param: Tensor) -> bool:
        """Whether the gradient is not laid out like the parameter."""
        return False

    def grad(self, param: Tensor) -> Tensor | None:
        """The gradient of the elements on this process."""
        return None if param.grad is None or not self.present else self._run(param.grad)

    def _run(self, flat: Tensor) -> Tensor:
        run = flat[self.elements.offset : self.elements.offset + self.elements.length]
        rows = self.is_matrix and self.cut is None
        return run.view(len(run) // self._columns, self._columns) if rows else run
