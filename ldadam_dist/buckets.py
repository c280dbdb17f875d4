"""Puts matrices of equal layout into batches, in the dtype and on the device of the computation."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldadam_dist.algebra import Factor
from ldadam_dist.layout import MatrixLayout
from ldadam_dist.quantized import Quantized
from ldadam_dist.rounding import Place, is_narrower, write
from ldadam_dist.separate import Separate, is_fake
from ldadam_dist.step import Block
from ldadam_dist.weights import Weights

STACK_ELEMENTS = 2**15
"""Matrices of at most so many elements a shard are copied into one batch; larger ones are stepped where they are."""

BATCH_ELEMENTS = 2**21
"""Elements a shard in one batch of copied matrices."""


@dataclass
class Matrix:
    """The storage of one matrix on this process, oriented: every tensor is a view, transposed for a right projection.

    Attributes:
        layout: where it lies.
        grad: (m_local, n_local), or None if it is in the error already.
        weight: (m_local, n_local), under replicas all columns that they hold.
        error: (m_local, n_local), perhaps in 8 or 4 bits; None without error feedback.
        projector: (stored rows, r).
        exp_avg, exp_avg_sq: (r, stored columns).
        stochastic: whether what is stored narrower than it is computed is rounded stochastically, but the projector.
    """

    layout: MatrixLayout
    grad: Tensor | None
    weight: Tensor
    error: Tensor | Quantized | None
    projector: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    stochastic: bool = field(default=False, kw_only=True)

    def place(self, kind: str, t: int | Tensor) -> Place | None:
        """Where the elements of a tensor are in the whole one at step t, if it is rounded stochastically."""
        m, n = self.layout.m_range[0], self.layout.n_range[0]
        first = {
            "weight": (m, self.layout.weight_range[0]),
            "error": (m, n),
            "exp_avg": (0, n + self.layout.stored_columns[0]),
            "exp_avg_sq": (0, n + self.layout.stored_columns[0]),
        }
        return Place(kind, t, *first[kind]) if self.stochastic and kind in first else None


def batches(matrices: Iterable[tuple[Hashable, MatrixLayout, int]]) -> list[list[int]]:
    """Indices of the matrices that are stepped together: those of equal keys.

    Args:
        matrices: (key, layout, most) in the order of the parameters; keys hold all that must be equal in a batch.
            `most`: how many may be in it of those that are too large to be copied.
    Returns:
        batches in the order of their first matrices; the same on every process.
    """
    done: list[list[int]] = []
    filling: dict[Hashable, list[int]] = {}
    for i, (key, layout, most) in enumerate(matrices):
        size = layout.shard_elements
        batch = filling.get(key)
        if batch is None or len(batch) >= (most if size > STACK_ELEMENTS else BATCH_ELEMENTS // max(1, size)):
            done.append([])
            batch = filling[key] = done[-1]
        batch.append(i)
    return done


def load_block(
    matrices: Sequence[Matrix],
    dtype: torch.dtype,
    device: torch.device,
    t: Sequence[int | Tensor],
    moves: Sequence[Tensor] | None = None,
    decays: Factor = 1.0,
    measured: bool = False,
) -> Block:
    """The batch in the dtype and on the device of the maths, without the gradients where there are errors.

    Large matrices are not copied: A forms in their errors, if these have the dtype, and weights are changed where they
    are.

    Args:
        matrices: of equal layout.
        dtype, device: of the maths.
        t: the step that each takes.
        moves: for each a bool () that says on the device whether it is stepped; if not, its gradient counts as zeros,
            and neither error nor state changes, and the weight only decays. None if the host knows that all are.
        decays: see `Block`.
        measured: whether the block says how large the gradients are.
    """

    def converted(tensors: Iterable[Tensor | Quantized]) -> list[Tensor]:
        return [t.to(device=device, dtype=dtype) for t in tensors]

    def stack(tensors: Iterable[Tensor | Quantized]) -> Tensor:
        parts = converted(tensors)
        return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)

    large = matrices[0].layout.shard_elements > STACK_ELEMENTS
    apart = len(matrices) > 1 and large
    errors = [matrix.error for matrix in matrices if matrix.error is not None]
    grads = _grads(matrices, moves)
    squares = [torch.linalg.vector_norm(grad, dtype=dtype).square() for grad in grads if grad is not None and measured]
    blocks = errors or [grad for grad in grads if grad is not None]
    accumulated = Separate(converted(blocks)) if apart else stack(blocks)
    weights = [matrix.weight for matrix in matrices]
    copied = len(matrices) > 1 and not large
    stored = Separate(weights) if apart else stack(weights) if copied else weights[0].unsqueeze(0)
    return Block(
        accumulated=accumulated,
        weight=Weights(stored, [None if copied else m.place("weight", at) for m, at in zip(matrices, t, strict=True)]),
        projector=stack(matrix.projector for matrix in matrices),
        exp_avg=stack(matrix.exp_avg for matrix in matrices),
        exp_avg_sq=stack(matrix.exp_avg_sq for matrix in matrices),
        moves=1.0 if moves is None else torch.stack(list(moves)).view(-1, 1, 1).to(dtype),
        decays=decays,
        grad_squares=torch.stack(squares).to(device) if squares else None,
    )


def add_gradients(matrices: Sequence[Matrix], block: Block, moves: Sequence[Tensor] | None = None) -> bool:
    """Make A of the errors in a batch. Returns whether it has formed where the errors are stored.

    Args:
        matrices, moves: as in `load_block`.
        block: what it made.
    """
    if matrices[0].error is None:
        return False
    for total, grad in zip(block.accumulated, _grads(matrices, moves), strict=True):
        if grad is not None:
            total.add_(grad.to(total.device))
    error = matrices[0].error
    return isinstance(error, Tensor) and not is_fake(error) and error.data_ptr() == block.accumulated[0].data_ptr()


def _grads(matrices: Sequence[Matrix], moves: Sequence[Tensor] | None) -> list[Tensor | None]:
    """The gradients, those that do not move as zeros."""
    grads = [matrix.grad for matrix in matrices]
    if moves is None:
        return grads
    return [g if g is None else torch.where(on, g, g.new_zeros(())) for g, on in zip(grads, moves, strict=True)]


def store_block(
    matrices: Sequence[Matrix],
    block: Block,
    states: tuple[Tensor, Tensor, Tensor],
    t: Sequence[int | Tensor],
    moves: Sequence[Tensor] | None = None,
    edges: Sequence[Tensor | None] = (),
) -> None:
    """Write a batch back: weights and errors where they were copied, and states.

    Args:
        matrices, t, moves: as in `load_block`.
        block: what it made, stepped.
        states: new projectors, exp_avg and exp_avg_sq.
        edges: of the errors, from `edges.shared_edges`.
    """
    targets, sources = [], []
    for i, matrix in enumerate(matrices):
        for kind, target, source in (
            ("weight", matrix.weight, block.weight.stored),
            ("error", matrix.error, block.accumulated),
            ("projector", matrix.projector, states[0]),
            ("exp_avg", matrix.exp_avg, states[1]),
            ("exp_avg_sq", matrix.exp_avg_sq, states[2]),
        ):
            place, new = matrix.place(kind, t[i]), source[i]
            if isinstance(target, Quantized):
                target.copy_(new, place, None if moves is None else moves[i], edges[i] if edges else None)
                continue
            if target is None or (not is_fake(target) and target.data_ptr() == new.data_ptr()):
                continue
            if moves is not None and kind not in ("weight", "error"):  # which have not changed
                new = torch.where(moves[i], new, target)
            if place is not None and is_narrower(target.dtype, source.dtype):
                write(target, new, place)
            else:
                targets.append(target)
                sources.append(new)
    if targets:
        torch._foreach_copy_(targets, sources)  # one kernel for many, on a GPU
