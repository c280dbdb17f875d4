"""Pure batched tensor functions of the LDAdam step (arXiv 2410.16103); torch only, no state, no communication."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from ldadam_dist.separate import Separate, is_fake

Factor: TypeAlias = float | Tensor
"""A number; on the device, (b, 1, 1) or (), if it changes with the step in what a graph has captured."""

_NULL = 32.0
"""A direction is null below this many units of rounding of the largest one, where nothing else says how large rounding
is. Exactly dependent columns leave 0.1 to 20 units, 70 at worst; more would discard weak directions that float32 still
resolves."""

_ROUNDING = 8.0
"""The same in units of `rounding_floor`: exactly dependent columns leave 0.01 to 2 of them."""

_MARK = 4.0
"""Added to the columns of a basis that are null. No element of another column exceeds 1, so that whoever has any row of
the basis knows which columns are null."""


def orthonormalize(matrix: Tensor, floor: Tensor | None = None) -> Tensor:
    """Orthonormal basis of the columns, in their order (Gram-Schmidt), with fixed directions for null columns.

    Columns that depend on earlier ones carry rounding noise only, which differs from mesh to mesh. They are null: fixed
    directions stand in their places, orthogonal to all others, so the result is reproducible whatever the rank.

    Args:
        matrix: (b, m, r) with m ≥ r, finite.
        floor: (b, r), what a column must keep beside the earlier ones, from `rounding_floor`; by default it is judged
            against the largest column.
    Returns:
        (b, m, r), marked; `unmarked` takes it apart into null columns and an orthonormal basis, unique up to signs.
    """
    # LAPACK's QR is as quick as any product on a CPU; a GPU takes long for it, and would wait for the host to look.
    on_host = (matrix.device.type == "cpu" or matrix.dtype == torch.float64) and not is_fake(matrix)
    return householder_basis(matrix, floor) if on_host else cholesky_basis(matrix, floor)


def unmarked(basis: Tensor) -> tuple[Tensor, Tensor]:
    """A marked basis with zeros for null columns, so that these neither project nor move, and as it is stored.

    Args:
        basis: (b, any rows, r), as `orthonormalize` and `leading_directions` give it, or some of its rows.
    Returns:
        (b, rows, r) with zeros, and (b, rows, r) with fixed directions, where the next step looks for new ones.
    """
    null = basis > _MARK / 2
    return torch.where(null, 0.0, basis), torch.where(null, basis - _MARK, basis)


def rounding_floor(totals: Tensor, kept: int, dtype: torch.dtype) -> Tensor:
    """What rounding may leave of a null column of Y = B UtBᵀ, with UtB = UᵀB.

    A product of a row with a column is rounded by a unit of their norms. So a row of UtB of norm w carries noise of
    u‖B‖, and its column of Y noise of u‖B‖w from the second product, and of u‖B‖²/√n from the first.

    Args:
        totals: (b, r + 1), the squares of w of each row of UtB and, last, of ‖B‖, or of a bound of it.
        kept: n, the length of the rows.
        dtype: of the products.
    Returns:
        (b, r), float64; infinite for a row of UtB that is noise itself.
    """
    norms = totals.double().sqrt()
    rows, whole = norms[:, :-1], norms[:, -1:]
    unit = _ROUNDING * torch.finfo(dtype).eps
    floor = unit * whole * (rows + whole / kept**0.5)
    return torch.where(rows <= unit * whole, torch.inf, floor)


def householder_basis(matrix: Tensor, floor: Tensor | None = None) -> Tensor:
    """`orthonormalize` by Householder QR, and once more if a column is null."""
    largest = _largest(matrix)
    matrix = matrix / torch.where(largest > 0, largest, 1.0)  # it is quadratic in the gradient: its norm may overflow
    noise = _noise(matrix, floor, largest)
    hopeless = torch.isinf(noise)
    if bool(hopeless.any()):
        matrix = torch.where(hopeless[:, None], 0.0, matrix)
    basis: Tensor
    basis, triangle = torch.linalg.qr(matrix)
    null = _unresolved(triangle, triangle.diagonal(dim1=-2, dim2=-1).abs() <= noise, noise)
    return _filled(matrix, null) if bool(null.any()) else basis


def _noise(matrix: Tensor, floor: Tensor | None, largest: Tensor) -> Tensor:
    """(b, r): what is null of the columns of a matrix (b, m, r) that has been divided by `largest` (b, 1, 1)."""
    if floor is None:
        return matrix.new_full((len(matrix), matrix.shape[-1]), _NULL * torch.finfo(matrix.dtype).eps)
    scale = largest.squeeze(-1).double()
    return torch.where(scale > 0, floor / torch.where(scale > 0, scale, 1.0), torch.inf).to(matrix.dtype)


def _unresolved(triangle: Tensor, null: Tensor, noise: Tensor) -> Tensor:
    """The null columns and those that are noise of earlier ones: a basis vector is as noisy as its pivot is small.

    With Y = Q T, noise N of Y tilts the basis by N T⁻¹, so it leaves |T_kk| ‖N T⁻¹ e_k‖ of column k.

    Args:
        triangle: (b, r, r), T; rows and columns of null columns are left out.
        null: bool (b, r).
        noise: (b, r), norms of the columns of N.
    Returns:
        bool (b, r).
    """
    one = torch.eye(triangle.shape[-1], dtype=triangle.dtype, device=triangle.device)
    kept = torch.where(null[:, None] | null[..., None], one, triangle)
    inverse = torch.linalg.solve_triangular(kept, one.expand_as(kept), upper=True)
    tilt = (torch.where(null, 0.0, noise)[..., None] * inverse).square_().sum(-2).sqrt_()
    return null.logical_or(tilt >= 1)


def _filled(matrix: Tensor, null: Tensor) -> Tensor:
    """Marked orthonormal basis of the columns that are not null, and fixed directions orthogonal to all of them.

    Args:
        matrix: (b, m, r).
        null: bool (b, r).
    """
    m, r = matrix.shape[-2:]
    columns = torch.where(null[:, None], _fixed_directions(m, r, matrix.dtype, matrix.device), matrix)
    order = null.int().argsort(dim=-1, stable=True)[:, None].expand_as(matrix)  # so that they yield to nothing fixed
    basis = torch.empty_like(columns)
    basis.scatter_(-1, order, torch.linalg.qr(columns.gather(-1, order)).Q)
    return basis + _MARK * null[:, None]


def cholesky_basis(matrix: Tensor, floor: Tensor | None = None) -> Tensor:
    """`orthonormalize` of float32 by Cholesky QR, in float64: the host never waits for a result.

    The first factor says which columns are null, of which rounding in float64 leaves nothing like float32's. The second
    leaves these out. The third makes orthonormal what the second has left, at worst 1e-3 for columns that float32 just
    tells apart, and the fixed directions.
    """
    unit = torch.finfo(matrix.dtype).eps
    m, r = matrix.shape[-2:]
    largest = _largest(matrix)
    columns = matrix.double() / torch.where(largest > 0, largest, 1.0)
    noise = _noise(matrix, floor, largest)
    columns = torch.where(torch.isinf(noise)[:, None], 0.0, columns)
    norms = torch.linalg.vector_norm(columns, dim=-2, keepdim=True)
    columns /= torch.where(norms > 0, norms, 1.0)
    # The shift is above float64's rounding, so that no pivot is negative, and far below the square of what is null.
    one = torch.eye(r, dtype=columns.dtype, device=matrix.device)
    gram = torch.add(columns.mT @ columns, one, alpha=1e-13)
    norms = norms.squeeze(-2)
    triangle = torch.linalg.cholesky_ex(gram, upper=True).L
    pivots = triangle.diagonal(dim1=-2, dim2=-1)
    null = (pivots * norms <= noise) | (pivots <= 8 * unit)
    null = _unresolved(triangle, null, torch.where(norms > 0, noise / norms, 0.0))
    apart = (null[:, None] | null[..., None]) & (one == 0)
    triangle = torch.linalg.cholesky_ex(torch.where(apart, 0.0, gram), upper=True).L
    basis: Tensor = torch.linalg.solve_triangular(triangle, columns, upper=True, left=False)
    directions = (_fixed_directions if is_fake(matrix) else _kept_directions)(m, r, basis.dtype, basis.device)
    basis = torch.where(null[:, None], directions, basis)
    order = null.int().argsort(dim=-1, stable=True)[:, None].expand_as(basis)  # fixed ones yield to all others
    ordered = basis.gather(-1, order)
    triangle = torch.linalg.cholesky_ex(ordered.mT @ ordered, upper=True).L
    basis.scatter_(-1, order, torch.linalg.solve_triangular(triangle, ordered, upper=True, left=False))
    return basis.to(matrix.dtype) + _MARK * null[:, None]


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
        (b, m, rank), orthonormal columns in the order of falling singular values, marked as by `orthonormalize`.
    """
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    missing = (0, max(0, rank - values.shape[-1]))
    left, values = (torch.nn.functional.pad(found[..., :rank], missing) for found in (left, values))
    null = values <= _NULL * torch.finfo(matrix.dtype).eps * values[..., :1]
    return _filled(left, null)


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
