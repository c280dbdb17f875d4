"""Pure batched tensor functions of the LDAdam step (arXiv 2410.16103); torch only, no state, no communication."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from ldadam_dist.separate import Separate

Factor: TypeAlias = float | Tensor
"""A number; on the device, (b, 1, 1) or (), if it changes with the step in what a graph has captured."""

_NULL = 32.0
"""A direction is numerically null below this many units of rounding of the largest one. Exactly dependent columns leave
0.1 to 20 units, 70 at worst; more would discard weak directions that float32 still resolves."""


def orthonormalize(matrix: Tensor) -> Tensor:
    """Orthonormal basis of the columns, in their order (Gram-Schmidt).

    Columns that depend on earlier ones carry rounding noise only, which differs from mesh to mesh; they are replaced
    by fixed directions, so the result is orthonormal and reproducible whatever the rank.

    Args:
        matrix: (b, m, r) with m ≥ r, finite.
    Returns:
        (b, m, r), QᵀQ = I; unique up to the sign of each column.
    """
    # LAPACK's QR is as quick as any product on a CPU; a GPU takes long for it, and would wait for the host to look.
    on_host = matrix.device.type == "cpu" or matrix.dtype == torch.float64
    return householder_basis(matrix) if on_host else cholesky_basis(matrix)


def householder_basis(matrix: Tensor) -> Tensor:
    """`orthonormalize` by Householder QR, and once more if a column is null."""
    largest = _largest(matrix)
    matrix = matrix / torch.where(largest > 0, largest, 1.0)  # it is quadratic in the gradient: its norm may overflow
    basis: Tensor
    basis, triangle = torch.linalg.qr(matrix)
    null = triangle.diagonal(dim1=-2, dim2=-1).abs() <= _NULL * torch.finfo(matrix.dtype).eps
    if bool(null.any()):
        m, r = matrix.shape[-2:]
        fixed = _fixed_directions(m, r, matrix.dtype, matrix.device)
        basis = torch.linalg.qr(torch.where(null[:, None, :], fixed, matrix)).Q
    return basis


def cholesky_basis(matrix: Tensor) -> Tensor:
    """`orthonormalize` of float32 by Cholesky QR, twice, in float64: the host never waits for a result.

    The first factor says which columns are null, of which rounding in float64 leaves nothing like float32's. The second
    makes orthonormal what the first has left, at worst 1e-3 for columns that float32 just tells apart, and the fixed
    directions.
    """
    unit = torch.finfo(matrix.dtype).eps
    largest = _largest(matrix)
    columns = matrix.double() / torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.vector_norm(columns, dim=-2, keepdim=True)
    columns /= torch.where(norms > 0, norms, 1.0)
    # The shift is above float64's rounding, so that no pivot is negative, and far below the square of what is null.
    gram = (columns.mT @ columns).add_(torch.eye(columns.shape[-1], device=matrix.device), alpha=1e-13)
    triangle = torch.linalg.cholesky_ex(gram, upper=True).L
    pivots = triangle.diagonal(dim1=-2, dim2=-1)
    null = (pivots * norms.squeeze(-2) <= _NULL * unit) | (pivots <= 8 * unit)
    basis: Tensor = torch.linalg.solve_triangular(triangle, columns, upper=True, left=False)
    m, r = basis.shape[-2:]
    fixed = _kept_directions(m, r, basis.dtype, basis.device)
    basis = torch.where(null[:, None, :], fixed, basis)
    triangle = torch.linalg.cholesky_ex(basis.mT @ basis, upper=True).L
    basis = torch.linalg.solve_triangular(triangle, basis, upper=True, left=False)
    return basis.to(matrix.dtype)


def _largest(matrix: Tensor) -> Tensor:
    """The largest |entry| of each matrix, (b, 1, 1); on a CPU a norm would take several times as long."""
    return torch.maximum(matrix.amax((-2, -1), keepdim=True), -matrix.amin((-2, -1), keepdim=True))


def _fixed_directions(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Columns of length 1 that nothing but their shape decides."""
    fixed = test_matrix(torch.arange(rows, device=device), columns, dtype)
    return fixed.div_(torch.linalg.vector_norm(fixed, dim=0))


@lru_cache(maxsize=16)
def _kept_directions(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same, for who asks at every step."""
    return _fixed_directions(rows, columns, dtype, device)


def leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """Left singular vectors of the `rank` largest singular values; fixed directions where those vanish.

    Args:
        matrix: (b, m, k), finite.
        rank: at most m; where k is smaller, fixed directions fill up.
    Returns:
        (b, m, rank), orthonormal columns in the order of falling singular values.
    """
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    left, values = left[..., :rank], values[..., :rank]
    noise = _NULL * torch.finfo(matrix.dtype).eps * values[..., :1]
    scaled = left * torch.where(values > noise, values, 0.0)[..., None, :]
    return orthonormalize(torch.nn.functional.pad(scaled, (0, rank - scaled.shape[-1])))


def test_matrix(rows: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of one fixed matrix of pseudo-random entries, uniform in [-1, 1).

    Each entry is an integer hash of its global position, so any slice is the same on any mesh and device.

    Args:
        rows: (k,) int64, global row indices.
        columns: number of columns.
        dtype: floating dtype of the result.
    Returns:
        (k, columns).
    """
    mask = 0xFFFFFFFF
    x = (rows[:, None] * 0x9E3779B1 + torch.arange(columns, device=rows.device) * 0x85EBCA77) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the mixing rounds of a 32-bit finaliser
        x = ((x ^ (x >> shift)) * factor) & mask
    return ((x ^ (x >> 16)).to(torch.float64) / 2.0**31 - 1.0).to(dtype)


test_matrix.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever pytest makes of the name


def bias_corrections(
    betas: tuple[float, float], steps: int | Tensor, dtype: torch.dtype
) -> tuple[Factor, Factor]:
    """1 − βᵢ^steps, of both moments.

    Args:
        betas: decay rates.
        steps: taken so far; (b, 1, 1) float64 where the host does not know it.
        dtype: of what they correct.
    Returns:
        two numbers; tensors like `steps`, in `dtype`, if that is one.
    """
    if isinstance(steps, Tensor):
        return tuple((1 - beta**steps).to(dtype) for beta in betas)  # type: ignore[return-value]
    return 1 - betas[0] ** steps, 1 - betas[1] ** steps


def rotate_second_moment(
    exp_avg_sq: Tensor,
    exp_avg: Tensor,
    rotation: Tensor,
    rotated_exp_avg: Tensor,
    *,
    bias1: Factor,
    bias2: Factor,
    decay: float = 1.0,
) -> Tensor:
    """Second moment expressed in the new subspace (LDAdam, projection-aware update), times a factor.

        V' = decay · bias2 · | (R∘R) (V/bias2 − (M/bias1)²) + (R M/bias1)² |
           = | decay (R∘R) (V − c M²) + decay c (R M)² |,  c = bias2/bias1²

    The variance is rotated and the squared mean added back; the absolute value guards the rounding of a difference
    of near-equal terms. The second form takes fewer passes.

    Args:
        exp_avg_sq, exp_avg: (b, r, n), moments in the old subspace.
        rotation: (b, r, r), R = U'ᵀU.
        rotated_exp_avg: (b, r, n), R M.
        bias1, bias2: 1 − βᵢ^(t−1).
        decay: the factor.
    Returns:
        (b, r, n), non-negative.
    """
    c = bias2 / bias1**2
    weights = rotation.square().mul_(decay)
    if isinstance(c, Tensor):
        variance = torch.addcmul(exp_avg_sq, exp_avg, -c * exp_avg)
        return (weights @ variance).addcmul_(rotated_exp_avg, decay * c * rotated_exp_avg).abs_()
    variance = torch.addcmul(exp_avg_sq, exp_avg, exp_avg, value=-c)
    return (weights @ variance).addcmul_(rotated_exp_avg, rotated_exp_avg, value=decay * c).abs_()


def adam_direction(
    exp_avg: Tensor, exp_avg_sq: Tensor, *, bias1: Factor, bias2: Factor, eps: float
) -> tuple[Tensor, Factor]:
    """Adam's bias-corrected direction, as a tensor and a factor.

        (M/bias1) / (sqrt(V/bias2) + eps) = s M / (sqrt(V) + sqrt(bias2) eps),  s = sqrt(bias2) / bias1

    Args:
        exp_avg, exp_avg_sq: any equal shape; exp_avg_sq is non-negative.
        bias1, bias2: 1 − βᵢ^t.
        eps: added to the root.
    Returns:
        M / (sqrt(V) + sqrt(bias2) eps), same shape, and s, which costs no pass where the product with the direction is.
    """
    denominator = exp_avg_sq.sqrt().add_(bias2**0.5 * eps)
    return torch.div(exp_avg, denominator, out=denominator), bias2**0.5 / bias1


def add_scaled_(target: Tensor, source: Tensor, factor: Factor) -> Tensor:
    """target += factor · source, in place; equal shapes."""
    return target.addcmul_(source, factor) if isinstance(factor, Tensor) else target.add_(source, alpha=factor)


def add_products_(target: Tensor | Separate, products: Sequence[tuple[Tensor, Tensor, Factor]]) -> None:
    """target += Σ factor · left right, in place and without a tensor of its size.

    Args:
        target: (b, m, n).
        products: (left, right, factor) of each product, left (b, m, r) and right (b, r, n).
    """
    m, n = target.shape[-2:]
    # Side by side they are one product, which reads and writes the target once. Where they are not thin, the copies
    # cost more than that.
    if len(products) > 1 and 4 * products[0][0].shape[-1] * (m + n) < m * n:
        lefts = torch.cat([left for left, _, _ in products], dim=-1)
        rights = torch.cat([factor * right for _, right, factor in products], dim=-2)
        products = [(lefts, rights, 1.0)]
    for left, right, factor in products:
        if isinstance(factor, Tensor):
            right, factor = factor * right, 1.0
        target.baddbmm_(left, right, alpha=factor)
