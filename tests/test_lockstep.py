"""The step on any cut of a matrix equals the oracle on the whole matrix, after every step."""

from __future__ import annotations

import pytest
import torch
from lockstep import Lockstep
from reference import Reference
from torch import Tensor

from ldadam_dist.step import Hyper

STEPS = 22

CUTS = {
    "whole": ((12, 20), (1, 1)),
    "rows": ((12, 20), (3, 1)),
    "columns": ((12, 20), (1, 4)),
    "both": ((12, 20), (2, 2)),
    "uneven": ((13, 19), (3, 2)),  # 5, 5, 3 rows; 10, 9 columns
    "tall": ((20, 12), (2, 3)),  # more rows than columns: the larger dimension is projected
    "empty rows": ((5, 14), (4, 1)),  # 2, 2, 1, 0 rows
    "empty columns": ((14, 5), (1, 4)),  # 2, 2, 1, 0 columns
    "empty both": ((5, 5), (4, 4)),  # most shards hold a single entry or none
    "one row each": ((6, 9), (6, 1)),  # 1×n pieces
    "one column each": ((9, 6), (1, 6)),  # m×1 pieces
}


def hyper(**changes: object) -> Hyper:
    settings = {
        "lr": 1e-2,
        "betas": (0.908, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "rho": 0.908,
        "proj_method": "power_iteration",
        "error_feedback": True,
        "exact_init": True,
    }
    return Hyper(**{**settings, **changes})  # type: ignore[arg-type]


def gradients(shape: tuple[int, ...]) -> list[Tensor]:
    """Gradients whose spectrum falls by about an order of magnitude, as real ones do."""
    generator = torch.Generator().manual_seed(7)
    scale = torch.logspace(0, -1, shape[-1], dtype=torch.float64)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) * scale for _ in range(STEPS)]


@pytest.mark.parametrize("gather", [False, True], ids=["lowrank", "gather"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"error_feedback": False}, {"proj_method": "svd"}, {"rho": 0.3, "betas": (0.5, 0.9)}, {"betas": (0.0, 0.95)}],
    ids=str,
)
def test_any_cut_equals_the_oracle(cut: str, changes: dict[str, object], gather: bool) -> None:
    (m, n), cuts = CUTS[cut]
    settings = hyper(**changes)
    grads = gradients((2, m, n))
    weight = torch.randn(2, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sharded = Lockstep(weight, 3, cuts, gather=gather)
    oracles = [
        Reference(
            w,
            3,
            left=True,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            rho=settings.rho,
            proj_method=settings.proj_method,
            error_feedback=settings.error_feedback,
        )
        for w in weight
    ]
    for grad in grads:
        sharded.step(grad, settings)
        for oracle, g in zip(oracles, grad, strict=True):
            oracle.step(g)
        torch.testing.assert_close(
            sharded.whole(sharded.weights), torch.stack([o.weight for o in oracles]), rtol=0, atol=1e-10
        )
        torch.testing.assert_close(
            sharded.whole(sharded.errors), torch.stack([o.error for o in oracles]), rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    "changes", [{"exact_init": False}, {"proj_method": "svd_lowrank", "exact_init": False}], ids=str
)
def test_randomised_projectors_do_not_depend_on_the_cut(cut: str, changes: dict[str, object]) -> None:
    (m, n), cuts = CUTS[cut]
    weight = torch.randn(2, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sharded, whole = Lockstep(weight, 3, cuts), Lockstep(weight, 3, (1, 1))
    for grad in gradients((2, m, n)):
        sharded.step(grad, hyper(**changes))
        whole.step(grad, hyper(**changes))
        torch.testing.assert_close(sharded.whole(sharded.weights), whole.whole(whole.weights), rtol=0, atol=1e-10)
        torch.testing.assert_close(sharded.whole(sharded.errors), whole.whole(whole.errors), rtol=0, atol=1e-10)


@pytest.mark.parametrize("gather", [False, True], ids=["lowrank", "gather"])
@pytest.mark.parametrize("cuts", [(1, 1), (3, 1), (1, 2), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_replicas_step_slices_and_share_the_update(cuts: tuple[int, int], replicas: int, gather: bool) -> None:
    """DDP, and the same inside shards of either dimension or both. 7 columns: 2, 2, 2, 1, and 1, 1, 0, 0 of them."""
    weight = torch.randn(2, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    split, whole = Lockstep(weight, 3, cuts, replicas, gather), Lockstep(weight, 3, (1, 1))
    for grad in gradients((2, 9, 7)):
        split.step(grad, hyper())
        whole.step(grad, hyper())
        for place, replica in split.weights.items():  # every replica ends with its whole shard
            layout = split.layouts[place]
            expected = whole.whole(whole.weights)[:, slice(*layout.m_range), slice(*layout.weight_range)]
            torch.testing.assert_close(replica, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(split.whole(split.errors), whole.whole(whole.errors), rtol=0, atol=1e-10)


@pytest.mark.parametrize("cut", ["uneven", "empty rows", "empty columns"])
def test_rank_deficient_gradients_do_not_depend_on_the_cut(cut: str) -> None:
    """One direction in the gradient, three in the projector: the other two are not rounding noise of this mesh.

    The gradient has rounding noise along them, which Adam divides by eps = 1e-8 at first: hence the small lr.
    """
    (m, n), cuts = CUTS[cut]
    weight = torch.zeros(1, m, n, dtype=torch.float64)
    sharded, whole = Lockstep(weight, 3, cuts), Lockstep(weight, 3, (1, 1))
    generator = torch.Generator().manual_seed(11)
    for _ in range(STEPS):
        column, row = (torch.randn(1, k, 1, dtype=torch.float64, generator=generator) for k in (m, n))
        sharded.step(column @ row.mT, hyper(lr=1e-3))
        whole.step(column @ row.mT, hyper(lr=1e-3))
        torch.testing.assert_close(sharded.whole(sharded.weights), whole.whole(whole.weights), rtol=0, atol=1e-10)
        projector = whole.states[0, 0][0][0]
        torch.testing.assert_close(projector.mT @ projector, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changes", [{}, {"error_feedback": False}, {"proj_method": "svd_lowrank"}, {"exact_init": False}], ids=str
)
@pytest.mark.parametrize("cuts", [(1, 1), (3, 1), (1, 2), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_replicas_with_gradients_of_their_own_step_the_mean(
    cuts: tuple[int, int], replicas: int, changes: dict[str, object]
) -> None:
    """7 columns are cut into 2, 2, 2, 1 over four shards; their states again, into pieces of one and of none."""
    weight = torch.randn(2, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    split, whole = Lockstep(weight, 3, cuts, replicas, own=True), Lockstep(weight, 3, (1, 1))
    generator = torch.Generator().manual_seed(8)
    for grad in gradients((2, 9, 7)):
        apart = torch.randn(replicas, 2, 9, 7, dtype=torch.float64, generator=generator)  # as large as what they share
        own = grad + apart - apart.mean(0)
        split.step(own, hyper(**changes))
        whole.step(grad, hyper(**changes))
        for place, replica in split.weights.items():
            layout = split.layouts[place]
            expected = whole.whole(whole.weights)[:, slice(*layout.m_range), slice(*layout.n_range)]
            torch.testing.assert_close(replica, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(split.whole(split.errors), whole.whole(whole.errors), rtol=0, atol=1e-10)
        first = {(i, j - j % replicas): replica for (i, j), replica in split.weights.items() if j % replicas == 0}
        assert all(torch.equal(first[i, j - j % replicas], replica) for (i, j), replica in split.weights.items())


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def few_rows(step: int, m: int, n: int) -> Tensor:
    grad = torch.zeros(m, n, dtype=torch.float64)
    grad[1:3] = normal(2, n, seed=step)
    return grad


DEFICIENT = {
    "one direction": lambda t, m, n: normal(m, 1, seed=0) @ normal(1, n, seed=1) * (1 + t),
    "one new direction": lambda t, m, n: normal(m, 1, seed=t) @ normal(1, n, seed=99 - t),
    "one input": lambda t, m, n: normal(m, 1, seed=t) @ normal(1, n, seed=1),
    "three tokens": lambda t, m, n: normal(m, 3, seed=0) @ normal(3, 3, seed=t) @ normal(3, n, seed=1),
    "two rows": few_rows,
    "all, then one direction": lambda t, m, n: (
        normal(m, n, seed=t) if t < 6 else normal(m, 1, seed=0) @ normal(1, n, seed=1)
    ),
    "all, then next to nothing": lambda t, m, n: normal(m, n, seed=t) * (1 if t < 6 else 1e-25),
}
"""Gradients of which less than r directions are above rounding."""


@pytest.mark.parametrize("kind", DEFICIENT)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
def test_gradients_of_low_rank_are_stepped_alike_on_any_cut(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """What is left of null directions is rounding, which differs from cut to cut: they neither project nor move."""
    m, n, rank = 24, 40, 8
    start = normal(1, m, n, seed=5).to(dtype)
    one, *others = (Lockstep(start, rank, cuts) for cuts in ((1, 1), (2, 1), (1, 3), (2, 2)))
    for t in range(STEPS):
        grad = DEFICIENT[kind](t, m, n).to(dtype)[None]
        one.step(grad.clone(), hyper())
        expected = one.whole(one.weights)
        for other in others:
            other.step(grad.clone(), hyper())
            torch.testing.assert_close(other.whole(other.weights), expected, rtol=0, atol=tolerance)


QUANTIZED_CUTS = [(3, 1), (1, 2), (2, 2), (1, 5), (3, 7)]  # of 70 columns 35, 14 and 10: inside a block, and narrower


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("error_dtype", ["int8", "int4"])
@pytest.mark.parametrize("cuts", [*QUANTIZED_CUTS, (1, 40)], ids=str)  # 40: 35 pieces of 2, and 5 of none
def test_blocks_of_an_error_do_not_depend_on_the_cut(cuts: tuple[int, int], error_dtype: str, right: bool) -> None:
    m, n = (70, 9) if right else (9, 70)
    cuts = cuts[::-1] if right else cuts
    weight = torch.randn(2, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sharded, whole, gathered = (
        Lockstep(weight, 3, c, gather=gather, error_dtype=error_dtype, right=right)
        for c, gather in ((cuts, False), ((1, 1), False), (cuts, True))
    )
    for grad in gradients((2, m, n))[:8]:
        for each in (sharded, whole, gathered):
            each.step(grad, hyper())
        for each in (sharded, gathered):
            torch.testing.assert_close(each.whole(each.weights), whole.whole(whole.weights), rtol=0, atol=1e-10)
            torch.testing.assert_close(each.whole(each.errors), whole.whole(whole.errors), rtol=0, atol=1e-10)


@pytest.mark.parametrize("own", [False, True], ids=["slices", "own gradients"])
@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("cuts", [(1, 1), *QUANTIZED_CUTS], ids=str)
def test_blocks_of_replicas_do_not_depend_on_the_cut(cuts: tuple[int, int], right: bool, own: bool) -> None:
    """Replicas cut the kept dimension once more, or have errors of their own, each with blocks of its own."""
    m, n = (70, 9) if right else (9, 70)
    weight = torch.randn(2, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    split = Lockstep(weight, 3, cuts[::-1] if right else cuts, 3, own=own, error_dtype="int4", right=right)
    whole = Lockstep(weight, 3, (1, 1), 3 if own else 1, own=own, error_dtype="int4", right=right)
    generator = torch.Generator().manual_seed(8)
    for grad in gradients((2, m, n))[:8]:
        if own:
            grad = grad + torch.randn(3, 2, m, n, dtype=torch.float64, generator=generator)
        split.step(grad, hyper())
        whole.step(grad, hyper())
        torch.testing.assert_close(split.whole(split.weights), whole.whole(whole.weights), rtol=0, atol=1e-10)
        torch.testing.assert_close(split.whole(split.errors), whole.whole(whole.errors), rtol=0, atol=1e-10)
