"""What a measured step tells of each matrix: squared norms over all processes that share it, and of its subspace."""

from __future__ import annotations

import torch
from torch import Tensor

from ldadam_dist.layout import MatrixLayout
from ldadam_dist.requests import Exchange, Sum
from ldadam_dist.separate import Separate

MEASURES = ("accumulated", "low_rank_grad", "error", "update", "overlap", "orthogonality")
"""Columns of `measure`: ‖A‖², ‖g‖², ‖E‖², ‖lr U'D‖², ‖U'ᵀU‖²/r, max |U'ᵀU' − I|."""


def squares(matrices: Tensor | Separate) -> Tensor:
    """(b,), the sum of the squares of each matrix (m, n)."""
    if isinstance(matrices, Tensor) and not (matrices.device.type == "cpu" and matrices.is_contiguous()):
        norms: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1))
        return norms.square()
    return torch.stack([_square(matrix) for matrix in matrices])


def _square(matrix: Tensor) -> Tensor:
    """On the host a product with itself takes a quarter of the time of a norm."""
    if matrix.device.type == "cpu" and matrix.is_contiguous():
        elements = matrix.view(-1)
        return torch.dot(elements, elements)
    norm: Tensor = torch.linalg.vector_norm(matrix)
    return norm.square()


def summed(parts: Tensor, layout: MatrixLayout) -> Exchange:
    """(b, k) over all blocks of the matrices, on every process that shares them."""
    parts = yield Sum(layout.over_m, parts[:, None])
    parts = yield Sum(layout.over_n, parts)
    return parts[:, 0]


def measure(sums: Tensor, projector: Tensor, rotation: Tensor | None, layout: MatrixLayout) -> Exchange:
    """What is told of a step.

    Args:
        sums: (b, 4), the first of `MEASURES`, of this process's parts.
        projector: (b, m_local, r), this process's rows of U'.
        rotation: (b, r, r), U'ᵀU; None at the first step.
        layout: how the matrices are cut.
    Returns:
        (b, 6), in the order of `MEASURES`; NaN for the overlap of a first step.
    """
    sums = yield from summed(sums, layout)
    gram = yield Sum(layout.over_m, projector.mT @ projector)
    ones = gram.diagonal(dim1=-2, dim2=-1) > 0.5  # null directions have none
    apart = (gram - torch.diag_embed(ones.to(gram.dtype))).abs().amax((-2, -1))
    overlap = torch.full_like(apart, torch.nan) if rotation is None else squares(rotation) / layout.rank
    return torch.cat([sums, overlap[:, None], apart[:, None]], dim=-1)


def spread(measures: Tensor, columns: int) -> Tensor:
    """(b, 6) as (b, 6, columns) that sum up to it, so that it can be cut like moments."""
    return (measures / columns)[..., None].expand(-1, -1, columns)
