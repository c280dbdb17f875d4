"""Where one matrix lies: its orientation, and how its two dimensions are cut over processes.

A matrix is always seen oriented: `m` is the projected dimension, `n` the kept one, so that the accumulated gradient
is m×n and the projector m×r. Nothing here communicates; a process group is carried as an opaque handle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def chunk_bounds(length: int, parts: int) -> list[tuple[int, int]]:
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
class Axis:
    """The group of processes over which one dimension of a matrix is cut.

    Attributes:
        count: number of shards; 1 means that the dimension is whole here.
        index: this process's place among them.
        group: the process group, opaque and hashable; equal groups must be equal objects. None where count is 1.
    """

    count: int = 1
    index: int = 0
    group: Any = None

    def bounds(self, length: int) -> tuple[int, int]:
        """This process's part (start, stop) of a dimension that is `length` long over the whole group."""
        return chunk_bounds(length, self.count)[self.index]


WHOLE = Axis()


@dataclass(frozen=True)
class MatrixLayout:
    """One matrix as this process sees it.

    What the parameter's own sharding leaves whole is split over the group that would replicate it: rows of the
    projector over `over_n`, columns of the moments over `over_m`. So every state is partitioned.

    Attributes:
        m, n: global extent of the projected and of the kept dimension.
        rank: number of directions r that the projector keeps, at most min(m, n).
        over_m, over_n: the groups that cut the projected and the kept dimension.
        replicated: the shards of `over_n` are replicas: each holds the whole weight, steps its own slice of the kept
            dimension, and the update's low-rank factor is gathered.
        m_range, n_range: this process's (start, stop) of either dimension; that is the block it steps.
    """

    m: int
    n: int
    rank: int
    over_m: Axis = WHOLE
    over_n: Axis = WHOLE
    replicated: bool = False
    m_range: tuple[int, int] = field(init=False)
    n_range: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "m_range", self.over_m.bounds(self.m))
        object.__setattr__(self, "n_range", self.over_n.bounds(self.n))

    @property
    def whole(self) -> bool:
        """Whether nobody shares the matrix."""
        return self.over_m.count == self.over_n.count == 1

    @property
    def shared_over(self) -> Axis:
        """The axis over which the matrix is cut, if it is one; an axis of one process where the matrix is whole."""
        return self.over_m if self.over_m.count > 1 else self.over_n

    @property
    def m_local(self) -> int:
        """Rows of the block stepped here."""
        return self.m_range[1] - self.m_range[0]

    @property
    def n_local(self) -> int:
        """Columns of the block stepped here."""
        return self.n_range[1] - self.n_range[0]

    @property
    def stored_rows(self) -> tuple[int, int]:
        """(start, stop) within the block's rows: the projector rows stored here."""
        return self.over_n.bounds(self.m_local)

    @property
    def stored_columns(self) -> tuple[int, int]:
        """(start, stop) within the block's columns: the moments' columns stored here."""
        return self.over_m.bounds(self.n_local)
