"""Where one matrix lies: its orientation, and how its two dimensions are cut over processes.

A matrix is always seen oriented: `m` is the projected dimension, `n` the kept one, so that the accumulated gradient
is m×n and the projector m×r. Nothing here communicates; a process group is carried as an opaque handle.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Bounds = tuple[int, int]
"""(start, stop) of a piece of a dimension."""


def chunk_bounds(length: int, parts: int) -> list[Bounds]:
    """Bounds of the pieces into which `torch.chunk` and DTensor's `Shard` cut a dimension; trailing ones may be empty.

    Args:
        length: extent of the dimension.
        parts: number of pieces, at least 1.
    Returns:
        `parts` pairs (start, stop); 5 over 4 gives (0, 2), (2, 4), (4, 5), (5, 5).
    """
    size = -(-length // parts)
    return [(min(i * size, length), min((i + 1) * size, length)) for i in range(parts)]


@dataclass(frozen=True)
class Pieces:
    """A dimension cut over a group.

    Attributes:
        bounds: (start, stop) of the piece of each group rank.
        longest: the longest piece.
        regular: the pieces lie one after the other, all as long as the longest until the dimension ends.
    """

    bounds: tuple[Bounds, ...]
    longest: int
    regular: bool


@functools.cache
def cut(length: int, cuts: tuple[int, ...], order: tuple[int, ...] | None = None) -> Pieces:
    """Cut a dimension several times: into `cuts[0]` chunks, each of these into `cuts[1]`, and so on.

    Args:
        length: extent of the dimension.
        cuts: number of chunks, the outermost cut first.
        order: which of the pieces each group rank has; None: they are numbered alike.
    """
    bounds = [(0, length)]
    for parts in cuts:
        bounds = [(start + a, start + b) for start, stop in bounds for a, b in chunk_bounds(stop - start, parts)]
    if order is not None:
        bounds = [bounds[position] for position in order]
    longest = max(stop - start for start, stop in bounds)
    regular = all(start == min(p * longest, length) for p, (start, _) in enumerate(bounds))
    return Pieces(tuple(bounds), longest, regular)


def cut_at(edges: tuple[int, ...]) -> Pieces:
    """Cut a dimension where each of `edges` says that a piece begins; the last is its end. They do not fall."""
    bounds = tuple(itertools.pairwise(edges))
    return Pieces(bounds, max(stop - start for start, stop in bounds), regular=False)


@dataclass(frozen=True)
class RowCut:
    """Where the elements of a row-major matrix are cut, if they may be cut anywhere.

    Attributes:
        starts: the element at which the run of each process begins, and the number of all elements; it does not fall.
        columns: length of a row.
        edges: the row at which the rows of each process begin, and the number of rows: a row belongs to the process
            that has its first element.
    """

    starts: tuple[int, ...]
    columns: int

    @functools.cached_property
    def edges(self) -> tuple[int, ...]:
        return tuple(-(-start // self.columns) for start in self.starts)

    @property
    def even(self) -> bool:
        """Whether no row is cut."""
        return all(start % self.columns == 0 for start in self.starts)

    def lent(self, process: int) -> int:
        """Leading elements of a process that belong to a row of another."""
        return min(self.edges[process] * self.columns, self.starts[process + 1]) - self.starts[process]

    def borrower(self, process: int) -> int:
        """The process to which the row belongs in which a process begins."""
        return bisect_right(self.starts, self.starts[process] // self.columns * self.columns) - 1

    def lenders(self, process: int) -> Iterator[int]:
        """The processes that lend to a process, in the order of their elements."""
        for other in range(process + 1, len(self.starts) - 1):
            if self.borrower(other) != process:
                return
            if self.lent(other):
                yield other


@dataclass(frozen=True)
class Axis:
    """The group of processes over which one dimension of a matrix is cut.

    Attributes:
        cuts: number of chunks of each cut, the outermost first: (8,) for one mesh dimension, (2, 8) for two. Empty
            where the dimension is whole.
        index: this process's rank in the group.
        group: the process group, opaque and hashable; equal groups must be equal objects. None where nothing is cut.
        order: which of the pieces, in the order of the cuts, each group rank has; None: they are numbered alike.
    """

    cuts: tuple[int, ...] = ()
    index: int = 0
    group: Any = None
    order: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Number of processes."""
        return math.prod(self.cuts)

    def pieces(self, length: int) -> Pieces:
        """The pieces, by group rank, of a dimension that is `length` long over the whole group."""
        return cut(length, self.cuts, self.order)

    def bounds(self, length: int) -> Bounds:
        """This process's piece."""
        return self.pieces(length).bounds[self.index]


WHOLE = Axis()

Place = tuple[int, int]
"""A process that shares a matrix: its group ranks over the projected and over the kept dimension."""


@dataclass(frozen=True)
class Part:
    """One of the tensors of a matrix, and how a process's part of it is cut out.

        "block"      m × n, cut in both dimensions like the block that is stepped
        "rows"       m × any, the rows of the block, all columns
        "projector"  m × r, stored rows
        "moments"    r × n, stored columns
        "own"        a row for each process over the projected dimension, all columns

    Attributes:
        kind: which of these.
        rows, columns: extent of the whole.
    """

    kind: Literal["block", "rows", "projector", "moments", "own"]
    rows: int
    columns: int


@dataclass(frozen=True)
class MatrixLayout:
    """One matrix as this process sees it.

    What the parameter's own sharding leaves whole is split over the group that would replicate it: rows of the
    projector over `over_n`, columns of the moments over `over_m`. So every state is partitioned.

    Attributes:
        m, n: global extent of the projected and of the kept dimension.
        rank: number of directions r that the projector keeps, at most min(m, n).
        over_m, over_n: the groups that cut the projected and the kept dimension.
        replicas: cuts of `over_n` by processes that hold the same weights and gradients: each of them steps its own
            slice of the kept dimension, and the update's low-rank factor is gathered over this group.
        sync: the innermost cuts of `over_n` are by processes that hold the same weights and gradients of their own:
            each contracts all of its block, and the mean of the contractions is that of the mean gradient. They cut
            the states but the error.
        m_edges, n_edges: where the blocks of the processes begin in either dimension, and its end, if it is not cut
            into chunks. What is split over a group besides always is.
        m_pieces, n_pieces: the blocks' bounds in either dimension, by group rank.
        m_range, n_range: this process's bounds of either dimension; that is the block it steps.
        weight_range: the bounds of the kept dimension that its weights cover; more than n_range under replicas.
    """

    m: int
    n: int
    rank: int
    over_m: Axis = WHOLE
    over_n: Axis = WHOLE
    replicas: Axis = WHOLE
    sync: Axis = WHOLE
    m_edges: tuple[int, ...] | None = None
    n_edges: tuple[int, ...] | None = None
    m_pieces: Pieces = field(init=False, compare=False, repr=False)
    n_pieces: Pieces = field(init=False, compare=False, repr=False)
    m_range: Bounds = field(init=False, compare=False)
    n_range: Bounds = field(init=False, compare=False)
    weight_range: Bounds = field(init=False, compare=False)

    def __post_init__(self) -> None:
        m_pieces = self.over_m.pieces(self.m) if self.m_edges is None else cut_at(self.m_edges)
        n_pieces = self._without(len(self.sync.cuts)) if self.n_edges is None else cut_at(self.n_edges)
        object.__setattr__(self, "m_pieces", m_pieces)
        object.__setattr__(self, "n_pieces", n_pieces)
        object.__setattr__(self, "m_range", self.m_pieces.bounds[self.over_m.index])
        object.__setattr__(self, "n_range", self.n_pieces.bounds[self.over_n.index])
        weights = self._without(len(self.replicas.cuts + self.sync.cuts)) if self.replicas.count > 1 else n_pieces
        object.__setattr__(self, "weight_range", weights.bounds[self.over_n.index])

    def _without(self, inner: int) -> Pieces:
        """What each process of `over_n` has of the kept dimension, were it not cut by so many of the innermost cuts."""
        axis = self.over_n
        if not inner:
            return axis.pieces(self.n)
        outer = cut(self.n, axis.cuts[:-inner])
        alike = math.prod(axis.cuts[-inner:])
        order = range(axis.count) if axis.order is None else axis.order
        bounds = tuple(outer.bounds[position // alike] for position in order)
        return Pieces(bounds, outer.longest, regular=False)

    @property
    def processes(self) -> int:
        """Number of processes that share the matrix."""
        return self.over_m.count * self.over_n.count

    @property
    def whole(self) -> bool:
        """Whether nobody shares the matrix."""
        return self.processes == 1

    @property
    def place(self) -> Place:
        """This process."""
        return self.over_m.index, self.over_n.index

    @property
    def m_local(self) -> int:
        """Rows of the block stepped here."""
        return self.m_range[1] - self.m_range[0]

    @property
    def n_local(self) -> int:
        """Columns of the block stepped here."""
        return self.n_range[1] - self.n_range[0]

    @property
    def weight_columns(self) -> int:
        """Columns of the weight held here."""
        return self.weight_range[1] - self.weight_range[0]

    @property
    def shard_elements(self) -> int:
        """Elements of the largest block: unlike this process's own, the same on every one."""
        return self.m_pieces.longest * self.n_pieces.longest

    @property
    def held_elements(self) -> int:
        """Elements of the largest weight, and of the factors as long as it; the same on every process."""
        rows = self.m_pieces.longest
        columns = self.n_pieces.longest * self.replicas.count
        return rows * columns + self.rank * (rows + columns)

    @property
    def stored_rows(self) -> Bounds:
        """Bounds, within the block's rows, of the projector rows stored here."""
        return self.over_n.bounds(self.m_local)

    @property
    def stored_columns(self) -> Bounds:
        """Bounds, within the block's columns, of the moments' columns stored here."""
        start, stop = self.over_m.bounds(self.n_local)
        first, last = self.sync.bounds(stop - start)
        return start + first, start + last

    @property
    def summed_columns(self) -> int:
        """Columns of the block in the slice that a sum over the projected dimension leaves here: those that are stored
        on processes of `sync`."""
        start, stop = self.over_m.bounds(self.n_local)
        return stop - start

    @property
    def slice_in_weight(self) -> Bounds:
        """Bounds, within the weight's columns, of the block stepped here."""
        return self.n_range[0] - self.weight_range[0], self.n_range[1] - self.weight_range[0]

    def bounds(self, part: Part, place: Place) -> tuple[Bounds, Bounds]:
        """Bounds, in rows and in columns, of what the process at `place` has of a part."""
        i, j = place
        rows, columns = (0, part.rows), (0, part.columns)
        if part.kind == "own":
            rows = (i, i + 1)
        elif part.kind != "moments":
            rows = self.m_pieces.bounds[i]
        if part.kind == "projector":
            rows = _within(rows, self.over_n, j)
        if part.kind in ("block", "moments"):
            columns = self.n_pieces.bounds[j]
        if part.kind == "moments":
            columns = _within(columns, self.over_m, i)
        return rows, columns


def _within(outer: Bounds, axis: Axis, index: int) -> Bounds:
    """The piece of `outer` that rank `index` of an axis has."""
    start, stop = axis.pieces(outer[1] - outer[0]).bounds[index]
    return outer[0] + start, outer[0] + stop
