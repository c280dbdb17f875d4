"""Matrices of which each process has a run of elements, which may begin and end anywhere within a row.

So are matrices cut in DeepSpeed's flat partitions. A row belongs to the process that has its first element
(`layout.RowCut`). For a step the others lend their pieces of it, gradient and weight, and get the
weight back. So the step sees whole rows, and error and factors are stored for whole rows. On the wire that is at most
three rows for each process, where a step moves 3·m·r elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldadam_dist.buckets import Matrix
from ldadam_dist.layout import Axis, RowCut
from ldadam_dist.requests import Exchange, Send


@dataclass
class CutMatrix(Matrix):
    """A matrix of which this process has a run of elements; `grad` and `weight` are theirs between steps.

    Attributes:
        cut: where the matrix is cut.
        transposed: whether its columns are projected.
        elements: the weights of this process, a view into the flat parameter.
    """

    grad: Tensor
    cut: RowCut
    transposed: bool
    elements: Tensor

    @property
    def axis(self) -> Axis:
        """The group over which its rows are cut."""
        return self.layout.over_n if self.transposed else self.layout.over_m

    @property
    def lent(self) -> int:
        """Elements that this process lends."""
        return self.cut.lent(self.axis.index)

    @property
    def lenders(self) -> list[int]:
        """The processes that lend to this one."""
        return list(self.cut.lenders(self.axis.index))

    def oriented(self, elements: Tensor) -> Tensor:
        """Elements of whole rows as a matrix."""
        rows = elements.view(-1, self.cut.columns)
        return rows.mT if self.transposed else rows


def complete_rows(matrices: Sequence[CutMatrix], device: torch.device) -> Exchange:
    """Make the gradients and weights of a batch those of whole rows; `hand_back` must follow the step.

    Args:
        matrices: of equal layout.
        device: where the processes communicate.
    """
    outgoing = [
        (m.cut.borrower(m.axis.index), torch.cat([m.grad[: m.lent], m.weight[: m.lent]]).to(device))
        for m in matrices
        if m.lent
    ]
    incoming = [(p, 2 * m.cut.lent(p)) for m in matrices for p in m.lenders]
    like = matrices[0].elements.new_empty(0, device=device)
    borrowed = iter((yield Send(matrices[0].axis, tuple(outgoing), tuple(incoming), like)))
    for matrix in matrices:
        both = [next(borrowed).to(matrix.elements.device).chunk(2) for _ in matrix.lenders]
        grad, weight = (
            torch.cat([own[matrix.lent :], *parts]) if parts else own[matrix.lent :]
            for own, parts in ((matrix.grad, [g for g, _ in both]), (matrix.weight, [w for _, w in both]))
        )
        matrix.grad, matrix.weight = matrix.oriented(grad), matrix.oriented(weight)


def hand_back(matrices: Sequence[CutMatrix], device: torch.device) -> Exchange:
    """Write the stepped weights of whole rows to the processes that have their elements."""
    outgoing: list[tuple[int, Tensor]] = []
    for matrix in matrices:
        if matrix.lenders:  # the rows are a copy
            rows = matrix.weight.mT if matrix.transposed else matrix.weight
            lengths = [len(matrix.elements) - matrix.lent, *map(matrix.cut.lent, matrix.lenders)]
            own, *parts = rows.reshape(-1).split(lengths)
            matrix.elements[matrix.lent :] = own
            outgoing += zip(matrix.lenders, (part.to(device) for part in parts), strict=True)
    lending = [m for m in matrices if m.lent]
    incoming = [(m.cut.borrower(m.axis.index), m.lent) for m in lending]
    like = matrices[0].elements.new_empty(0, device=device)
    stepped = yield Send(matrices[0].axis, tuple(outgoing), tuple(incoming), like)
    for matrix, part in zip(lending, stepped, strict=True):
        matrix.elements[: matrix.lent] = part.to(matrix.elements.device)
