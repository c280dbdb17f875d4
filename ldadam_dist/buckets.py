"""Puts matrices of equal layout into batches, and chooses the rank that computes each projector."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldadam_dist.layout import MatrixLayout
from ldadam_dist.step import Block

STACK_ELEMENTS = 2**15
"""Matrices of at most so many elements a shard are copied into one batch; larger ones are stepped in place."""

BATCH_ELEMENTS = 2**21
"""Elements a shard in one batch of copied matrices."""


@dataclass
class Matrix:
    """The storage of one matrix on this process, oriented: every tensor is a view, transposed for a right projection.

    Attributes:
        layout: where it lies.
        grad: (m_local, n_local).
        weight: (m_local, n_local), or (m_local, n) where replicated.
        error: (m_local, n_local), or None without error feedback.
        projector: (stored rows, r).
        exp_avg, exp_avg_sq: (r, stored columns).
    """

    layout: MatrixLayout
    grad: Tensor
    weight: Tensor
    error: Tensor | None
    projector: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def shard_elements(self) -> int:
        """Elements of the largest shard: unlike this process's own, the same on every rank."""
        layout = self.layout
        return -(-layout.m // layout.over_m.count) * -(-layout.n // layout.over_n.count)


def batches(matrices: Iterable[tuple[Hashable, Matrix]]) -> list[list[int]]:
    """Indices of the matrices that are stepped together: equal keys, small enough to be copied.

    Args:
        matrices: (key, matrix) in the order of the parameters; keys hold all that must be equal in a batch.
    Returns:
        batches in the order of their first matrices; the same on every process.
    """
    done: list[list[int]] = []
    filling: dict[Hashable, list[int]] = {}
    for i, (key, matrix) in enumerate(matrices):
        size = matrix.shard_elements
        batch = filling.get(key)
        if batch is None or size > STACK_ELEMENTS or (len(batch) + 1) * size > BATCH_ELEMENTS:
            done.append([])
            batch = filling[key] = done[-1]
        batch.append(i)
    return done


def assign_owners(layouts: Sequence[MatrixLayout]) -> list[int]:
    """For each matrix the index, in its group, of the rank that computes its projector.

    The heaviest matrix goes first, each to the rank with the least work so far; the work is that of a QR, m·r².
    """
    load: dict[Hashable, list[int]] = {}
    owners = [0] * len(layouts)
    for i in sorted(range(len(layouts)), key=lambda i: -layouts[i].m * layouts[i].rank ** 2):
        layout = layouts[i]
        axis = layout.shared_over
        work = load.setdefault(axis.group, [0] * axis.count)
        owners[i] = work.index(min(work))
        work[owners[i]] += layout.m * layout.rank**2
    return owners


def load_block(matrices: Sequence[Matrix], dtype: torch.dtype) -> Block:
    """The batch in the dtype of the maths. One matrix of that dtype is not copied: A forms in its error."""

    def stack(tensors: Iterable[Tensor]) -> Tensor:
        parts = [t.to(dtype) for t in tensors]
        return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)

    errors = [matrix.error for matrix in matrices if matrix.error is not None]
    accumulated = stack(errors if errors else (matrix.grad for matrix in matrices))
    if errors:
        for total, matrix in zip(accumulated, matrices, strict=True):
            total.add_(matrix.grad)
    return Block(
        accumulated=accumulated,
        weight=stack(matrix.weight for matrix in matrices),
        projector=stack(matrix.projector for matrix in matrices),
        exp_avg=stack(matrix.exp_avg for matrix in matrices),
        exp_avg_sq=stack(matrix.exp_avg_sq for matrix in matrices),
    )


def store_block(matrices: Sequence[Matrix], block: Block, states: tuple[Tensor, Tensor, Tensor]) -> None:
    """Write a stepped batch back: weight and error where they were copied, and the new states."""
    for i, matrix in enumerate(matrices):
        for target, source in (
            (matrix.weight, block.weight),
            (matrix.error, block.accumulated),
            (matrix.projector, states[0]),
            (matrix.exp_avg, states[1]),
            (matrix.exp_avg_sq, states[2]),
        ):
            if target is not None and target.data_ptr() != source[i].data_ptr():
                target.copy_(source[i])
