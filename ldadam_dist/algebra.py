"""Pure batched tensor functions of the LDAdam step (arXiv 2410.16103); torch only, no state, no communication."""

from __future__ import annotations

import torch
from torch import Tensor

_NULL = 32.0
"""A direction is numerically null below this many units of rounding of the largest one. Exactly dependent columns leave
0.1 to 20 units, 70 at worst; more would discard weak directions that float32 still resolves."""


def orthonormalize(matrix: Tensor) -> Tensor:
    """Orthonormal basis of the columns, in their order (Gram-Schmidt, by Householder QR).

    Columns that depend on earlier ones carry rounding noise only, which differs from mesh to mesh; they are replaced
    by fixed directions, so the result is orthonormal and reproducible whatever the rank.

    Args:
        matrix: (b, m, r) with m ≥ r, finite.
    Returns:
        (b, m, r), QᵀQ = I; unique up to the sign of each column.
    """
    largest = matrix.abs().amax(dim=(-2, -1), keepdim=True)  # a norm would square what is quadratic in the gradient
    matrix = matrix / torch.where(largest > 0, largest, 1.0)
    basis: Tensor
    basis, triangle = torch.linalg.qr(matrix)
    null = triangle.diagonal(dim1=-2, dim2=-1).abs() <= _NULL * torch.finfo(matrix.dtype).eps
    if bool(null.any()):
        m, r = matrix.shape[-2:]
        fixed = test_matrix(torch.arange(m, device=matrix.device), r, matrix.dtype)
        fixed = fixed / torch.linalg.vector_norm(fixed, dim=0)
        basis = torch.linalg.qr(torch.where(null[:, None, :], fixed, matrix)).Q
    return basis


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


def rotate_second_moment(
    exp_avg_sq: Tensor, exp_avg: Tensor, rotation: Tensor, rotated_exp_avg: Tensor, *, bias1: float, bias2: float
) -> Tensor:
    """Second moment expressed in the new subspace (LDAdam, projection-aware update).

        V' = bias2 · | (R∘R) (V/bias2 − (M/bias1)²) + (R M/bias1)² |

    The variance is rotated and the squared mean added back; the absolute value guards the rounding of a difference
    of near-equal terms.

    Args:
        exp_avg_sq, exp_avg: (b, r, n), moments in the old subspace.
        rotation: (b, r, r), R = U'ᵀU.
        rotated_exp_avg: (b, r, n), R M.
        bias1, bias2: 1 − βᵢ^(t−1).
    Returns:
        (b, r, n), non-negative.
    """
    variance = (exp_avg_sq / bias2).addcmul_(exp_avg, exp_avg, value=-1.0 / bias1**2)
    rotated = (rotation * rotation) @ variance
    return rotated.addcmul_(rotated_exp_avg, rotated_exp_avg, value=1.0 / bias1**2).mul_(bias2).abs_()


def adam_direction(exp_avg: Tensor, exp_avg_sq: Tensor, *, bias1: float, bias2: float, eps: float) -> Tensor:
    """Adam's bias-corrected direction (M/bias1) / (sqrt(V/bias2) + eps).

    Args:
        exp_avg, exp_avg_sq: any equal shape; exp_avg_sq is non-negative.
        bias1, bias2: 1 − βᵢ^t.
        eps: added to the root.
    Returns:
        the direction, same shape.
    """
    return (exp_avg / bias1).div_((exp_avg_sq / bias2).sqrt_().add_(eps))
