"""The LDAdam step (arXiv 2410.16103, algorithm 1): the only statement of the algorithm.

It is written as a generator over the local block of a batch of equal matrices. It computes, and yields what must be
exchanged with the other shards; `runtime` answers. With an unsharded layout every answer is the tensor itself. So
`step_on_owner`, for layouts where that moves less, is the same step on whole matrices.

A is only ever contracted. So replicas whose gradients are their own (`layout.sync`) contract an A of their own, and the
mean of what comes out is that of the mean A: they take the same step, and the mean of their errors is its error.

Legend (b matrices; a block is m_local × n_local of an oriented m×n matrix):

    A  accumulated gradient G + E     U  projector, orthonormal columns     g  low-rank gradient U'ᵀA
    E  error                          M  exp_avg, r×n                       R  rotation U'ᵀU
    W  weight                         V  exp_avg_sq, r×n                    D  Adam's direction in the subspace, ÷ s
    t  step, from 1                   b1, b2  bias corrections              k  β1 / (1 − β1)

A direction of U' that rounding alone would decide is null: its column is zero, and so are its rows of g, R, M and D. It
is stored as a fixed direction, in which the next step looks for new ones.

U, M and V come and go as the slices stored here (`layout.stored_rows`, `layout.stored_columns`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ldadam_dist.algebra import (
    Factor,
    adam_direction,
    add_products_,
    add_scaled_,
    bias_corrections,
    leading_directions,
    orthonormalize,
    rotate_second_moment,
    rounding_floor,
    test_matrix,
    unmarked,
)
from ldadam_dist.layout import MatrixLayout, Part
from ldadam_dist.measures import MEASURES, measure, spread, squares, summed
from ldadam_dist.requests import Delegate, Exchange, Gather, OnOwner, ScatterSum, Sum, alone
from ldadam_dist.separate import Separate
from ldadam_dist.weights import Weights


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters of one step, as in `LDAdamW`; `exact_init` asks for an SVD of the first gradient, `measured` for
    `Block.measures`."""

    lr: Factor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    rho: float
    proj_method: str
    error_feedback: bool
    exact_init: bool
    measured: bool = False

    def kept(self, decays: Factor) -> Factor:
        """1 − lr·wd, the part of the weights that decay leaves; `decays` as in `Block`."""
        return 1 - decays * self.lr * self.weight_decay if self.weight_decay else 1.0


@dataclass
class Block:
    """Local tensors of b matrices of equal layout, oriented, in the dtype of the computation but for the weight.

    Attributes:
        accumulated: (b, m_local, n_local), A = G + E; overwritten by the new error if there is error feedback, else
            only read. `Separate` only from the second power iteration on, and where matrices are not brought together.
            Replicas of `layout.sync` have their own.
        weight: (b, m_local, n_local), under replicas all columns that they hold; updated in place, as it is stored.
        projector: (b, stored rows, r).
        exp_avg, exp_avg_sq: (b, r, stored columns).
        measures: (b, 6), what a measured step tells of the matrices (`measures.MEASURES`); None before.
        grad_squares: (b,), of this process's gradients; None if that is not asked for, or they are in errors already.
        begin: is called before the first of errors and weights changes.
        moves: 1; or (b, 1, 1) of 1 or 0 that says on the device whether error and weight change in this step.
        decays: 1; or a tensor () with 1 or 0 that says so of the weight's decay.
    """

    accumulated: Tensor | Separate
    weight: Weights
    projector: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    moves: Factor = 1.0
    decays: Factor = 1.0
    measures: Tensor | None = None
    grad_squares: Tensor | None = None
    begin: Callable[[], None] = lambda: None


def ldadam_step(block: Block, layout: MatrixLayout, hyper: Hyper, t: int | Tensor) -> Exchange:
    """One LDAdam step, from t = 1.

    Args:
        block: local tensors; `accumulated` and `weight` are updated in place.
        layout: where the block lies.
        hyper: hyperparameters.
        t: number of this step; 1 chooses the first projector from A and ignores the old states. As a tensor (b, 1, 1),
            float64, those of steps after the first.
    Returns:
        (projector, exp_avg, exp_avg_sq), the new slices to be stored.
    """
    A, M, V, moves = block.accumulated, block.exp_avg, block.exp_avg_sq, block.moves
    (beta1, beta2), k = hyper.betas, hyper.betas[0] / (1 - hyper.betas[0])

    told = [squares(A) / layout.sync.count] if hyper.measured else None
    R = None

    if isinstance(t, int) and t == 1:
        assert isinstance(A, Tensor)
        U_new, kept = unmarked((yield from first_projector(A, layout, hyper)))
        own = yield ScatterSum(layout.over_m, U_new.mT @ A)
        told = told and [*told, squares(own) / layout.sync.count]
        g = yield from mean(own, layout)
        M, V = (1 - beta1) * g, (1 - beta2) * g.square()
        momentum = []
    else:
        b1, b2 = bias_corrections(hyper.betas, t - 1, A.dtype)
        U = yield Gather(layout.over_n, block.projector, -2, layout.m_local)
        M_summed, M_whole = yield from whole(M, layout)
        U_new, kept = unmarked((yield from next_projector(A, U, M, M_whole, b1, layout, hyper)))
        own = yield ScatterSum(layout.over_m, U_new.mT @ A)
        told = told and [*told, squares(own) / layout.sync.count]
        g = yield from mean(own, layout)
        R = yield Sum(layout.over_m, U_new.mT @ U)
        M_rotated = R @ M
        V = rotate_second_moment(V, M, R, M_rotated, bias1=b1, bias2=b2, decay=beta2)
        V = V.addcmul_(g, g, value=1 - beta2)  # β2 of the rotated one is in it
        M = g.lerp_(M_rotated, beta1)  # β1 R M + (1 − β1) g
        momentum = [(U, M_whole, moves * k)]

    block.begin()
    if hyper.error_feedback:  # E = A + k U M − U'(g + k R M), with this replica's own g
        if layout.sync.count == 1:
            lost, factor = M, moves / (1 - beta1)  # g + k R M = M'/(1 − β1)
        else:
            lost, factor = own if R is None else own.add_(R @ M_summed, alpha=k), moves
        lost = yield Gather(layout.over_m, lost, -1, layout.n_local)
        add_products_(A, [*momentum, (U_new, lost, -factor)])

    # W = (1 − lr·wd) W − lr·s U' D, with s D Adam's direction
    b1, b2 = bias_corrections(hyper.betas, t, A.dtype)
    D, s = adam_direction(M, V, bias1=b1, bias2=b2, eps=hyper.eps)
    if told:
        error = squares(A) * hyper.error_feedback / layout.sync.count
        told = [*told, error, squares(D) * (hyper.lr * s) ** 2]
        block.measures = yield from measure(torch.stack(told, dim=-1), U_new, R, layout)
    _, D = yield from whole(D, layout)
    D = yield Gather(layout.replicas, D, -1, layout.weight_columns)
    block.weight.add_product_(U_new, D, keep=hyper.kept(block.decays), factor=-moves * hyper.lr * s)

    return kept[:, slice(*layout.stored_rows)], M, V


def mean(own: Tensor, layout: MatrixLayout) -> Exchange:
    """This process's slice, (b, r, stored columns), of the mean over the replicas of `sync` of their contractions."""
    if layout.sync.count == 1:
        return own
    return (yield ScatterSum(layout.sync, averaged(own, layout)))


def whole(stored: Tensor, layout: MatrixLayout) -> Exchange:
    """What is stored in slices: gathered over `sync`, (b, r, summed columns), and of all the block's columns."""
    summed_columns = stored
    if layout.sync.count > 1:
        summed_columns = yield Gather(layout.sync, stored, -1, layout.summed_columns)
    return summed_columns, (yield Gather(layout.over_m, summed_columns, -1, layout.n_local))


def step_on_owner(block: Block, layout: MatrixLayout, hyper: Hyper, t: int) -> Exchange:
    """`ldadam_step` of the whole matrices on the ranks that own them; the same arguments, result and numbers.

    A and the states travel to the owner; the update, the states and the error travel back.
    """

    def step_whole(A: Tensor, U: Tensor, M: Tensor, V: Tensor) -> tuple[Tensor, ...]:
        update = torch.zeros_like(A)  # a zero weight becomes the update
        whole = Block(accumulated=A, weight=Weights(update), projector=U, exp_avg=M, exp_avg_sq=V)
        states = alone(ldadam_step(whole, MatrixLayout(layout.m, layout.n, layout.rank), hyper, t))
        told = () if whole.measures is None else (spread(whole.measures, layout.n),)
        return (update, *states, *told, *((A,) if hyper.error_feedback else ()))  # A has become the error

    matrix, projector = Part("block", layout.m, layout.n), Part("projector", layout.m, layout.rank)
    moments = Part("moments", layout.rank, layout.n)
    assert isinstance(block.accumulated, Tensor)
    tensors = (block.accumulated, block.projector, block.exp_avg, block.exp_avg_sq)
    told = (Part("moments", len(MEASURES), layout.n),) if hyper.measured else ()
    returns = (matrix, projector, moments, moments, *told, *((matrix,) if hyper.error_feedback else ()))
    update, U, M, V, *more = yield Delegate(tensors, (matrix, projector, moments, moments), step_whole, returns)
    if hyper.measured:
        block.measures = yield from summed(more.pop(0).sum(-1), layout)
    if hyper.error_feedback:
        block.accumulated = more[0]

    update = yield Gather(layout.replicas, update, -1, layout.weight_columns)
    block.weight.add_(update, keep=hyper.kept(1.0))
    return U, M, V


def next_projector(
    A: Tensor | Separate, U: Tensor, M: Tensor, M_whole: Tensor, b1: Factor, layout: MatrixLayout, hyper: Hyper
) -> Exchange:
    """The new projector from B = ρ U M/b1 + (1−ρ) A. Returns this process's rows of it, (b, m_local, r), marked."""
    rho = hyper.rho
    if hyper.proj_method == "power_iteration":
        # Orthonormal basis of Y = B Bᵀ U with B = A + c U M, c = ρ/((1−ρ) b1), as a factor 1−ρ changes no basis:
        # Y = A UtBᵀ + U (c M UtBᵀ), with UtB = UᵀB; B is never materialised.
        c = rho / (1 - rho) / b1
        own = yield ScatterSum(layout.over_m, U.mT @ A)
        UtA = yield from mean(own, layout)
        _, UtB = yield from whole(add_scaled_(UtA, M, c), layout)
        Y = (A @ UtB.mT).baddbmm_(U, c * (M_whole @ UtB.mT))
        basis = partial(basis_above_rounding, kept=layout.n)
        return (yield OnOwner(averaged(Y, layout), basis, layout.rank, sizes(A, UtB, c * M_whole, layout)))
    assert isinstance(A, Tensor)
    B = torch.baddbmm(A, U, (rho / b1) * M_whole, beta=1 - rho)
    if hyper.proj_method == "svd":
        return (yield from exact_directions(B, layout))
    return (yield from randomized_directions(B, layout, oversample=2, iterations=1))


def sizes(A: Tensor | Separate, UtB: Tensor, M: Tensor, layout: MatrixLayout) -> Tensor:
    """(b, r + 1), this process's summand of what `rounding_floor` judges Y by: ‖row‖² of UtB, and ‖A‖² + ‖M‖²."""
    rows = UtB.new_zeros(len(UtB), layout.rank + 1)
    if layout.over_m.index == 0:  # all processes over m have the same columns of UtB and M
        torch.sum(UtB.square(), dim=-1, out=rows[:, :-1])
        rows[:, -1] = M.square().sum((-2, -1))
    rows[:, -1] += squares(A)
    return averaged(rows, layout)


def basis_above_rounding(Y: Tensor, totals: Tensor, kept: int) -> Tensor:
    """`orthonormalize` with what `sizes` summed up."""
    return orthonormalize(Y, rounding_floor(totals, kept, Y.dtype))


def averaged(summand: Tensor, layout: MatrixLayout) -> Tensor:
    """A summand of the kept dimension as a summand of the mean, where sums of it run over replicas too."""
    return summand / layout.sync.count if layout.sync.count > 1 else summand


def first_projector(A: Tensor, layout: MatrixLayout, hyper: Hyper) -> Exchange:
    """Leading left singular vectors of the first gradient: this process's rows of them, (b, m_local, r), marked."""
    if hyper.exact_init:
        return (yield from exact_directions(A, layout))
    return (yield from randomized_directions(A, layout, oversample=16, iterations=2))


def nothing(A: Tensor | Separate) -> Tensor:
    """Totals of a request that asks for none, (b, 0)."""
    return torch.empty(len(A), 0, dtype=A.dtype, device=A.device)


def exact_directions(A: Tensor, layout: MatrixLayout) -> Exchange:
    """Leading left singular vectors of A, whole on its owner: m·n elements move."""
    directions = partial(leading_directions, rank=layout.rank)
    if layout.sync.count > 1:  # each at its place among zeros, so that the sum on the owner is whole, and the mean
        placed = A.new_zeros(*A.shape[:2], layout.n)
        placed[..., slice(*layout.n_range)] = averaged(A, layout)
        return (yield OnOwner(placed, lambda whole, _: directions(whole), layout.rank, nothing(A)))

    def solve(matrix: Tensor) -> tuple[Tensor]:
        return (directions(matrix),)

    A_part, U_part = Part("block", layout.m, layout.n), Part("rows", layout.m, layout.rank)
    (U,) = yield Delegate((A,), (A_part,), solve, (U_part,))
    return U


def randomized_directions(A: Tensor, layout: MatrixLayout, *, oversample: int, iterations: int) -> Exchange:
    """Leading left singular vectors of A by randomised subspace iteration (Halko, Martinsson, Tropp 2011, alg. 4.4).

    The test matrix is a function of global indices, so the result does not depend on the mesh. Each iteration
    multiplies by A Aᵀ and orthonormalises; the left singular vectors of the last product A AᵀQ are the answer.
    """
    columns = min(layout.rank + oversample, layout.m, layout.n)
    Q = A @ test_matrix(torch.arange(*layout.n_range, device=A.device), columns, A.dtype)
    for _ in range(iterations):
        Q = yield OnOwner(averaged(Q, layout), lambda whole, _: orthonormalize(whole), columns, nothing(A))
        Q, _ = unmarked(Q)
        QtA = yield Sum(layout.over_m, Q.mT @ A)
        if layout.sync.count > 1:
            QtA = yield Sum(layout.sync, averaged(QtA, layout))
        Q = A @ QtA.mT
    directions = partial(leading_directions, rank=layout.rank)
    return (yield OnOwner(averaged(Q, layout), lambda whole, _: directions(whole), layout.rank, nothing(A)))
