"""What breaks naive implementations: degenerate bases, negative variance, NaN, dummy steps, precision."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from test_checkpoints import build
from test_sharded import BUILD
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ldadam_dist import LDAdamW
from ldadam_dist.algebra import (
    cholesky_basis,
    householder_basis,
    leading_directions,
    orthonormalize,
    rotate_second_moment,
    test_matrix,
    unmarked,
)


def matrix(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one_matrix(grad: Tensor | None = None, **options: Any) -> tuple[nn.Parameter, LDAdamW]:
    """A 12×20 weight with one gradient, and its optimizer of rank 4."""
    param = nn.Parameter(matrix(12, 20))
    param.grad = grad
    return param, LDAdamW([param], **{"lr": 1e-2, "rank": 4, **options})


DEGENERATE = {
    "zero": torch.zeros(3, 30, 6),
    "one direction": matrix(3, 30, 1) @ matrix(3, 1, 6),
    "repeated columns": matrix(3, 30, 3).repeat(1, 1, 2),
    "zero columns": matrix(3, 30, 6) * torch.tensor([1.0, 0, 1, 0, 0, 1]),
    "ill conditioned": matrix(3, 30, 6) * torch.logspace(0, -30, 6, dtype=torch.float64),
    "tiny": matrix(3, 30, 6) * 1e-30,
    "mixed batch": torch.stack([matrix(30, 6), torch.zeros(30, 6, dtype=torch.float64), matrix(30, 1).expand(30, 6)]),
    "square": matrix(3, 6, 2) @ matrix(3, 2, 6),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", [orthonormalize, lambda y: leading_directions(y, 6)], ids=["qr", "svd"])
def test_basis_is_orthonormal_whatever_the_rank(name: str, dtype: torch.dtype, function: Any) -> None:
    _, basis = unmarked(function(DEGENERATE[name].to(dtype)))
    identity = torch.eye(6, dtype=dtype).expand(3, 6, 6)
    torch.testing.assert_close(basis.mT @ basis, identity, rtol=0, atol=64 * torch.finfo(dtype).eps)


def with_condition(number: float, m: int, r: int) -> Tensor:
    """(1, m, r) of that condition number, singular values evenly spread, in general position."""
    left, right = torch.linalg.qr(matrix(m, r)).Q, torch.linalg.qr(matrix(r, r, seed=1)).Q
    return (left * torch.logspace(0, -torch.tensor(number).log10(), r, dtype=torch.float64) @ right)[None]


@pytest.mark.parametrize("name", [*DEGENERATE, *(f"condition 1e{k}" for k in range(0, 15, 2)), "wide", "huge"])
@pytest.mark.parametrize("function", [cholesky_basis, householder_basis])
def test_float32_basis_is_orthonormal_however_it_is_found(name: str, function: Any) -> None:
    hard = {"wide": matrix(2, 130, 128), "huge": 1e30 * matrix(2, 40, 6)}  # nearly square; its square overflows
    condition = name.removeprefix("condition ")
    y = with_condition(float(condition), 300, 32) if condition != name else {**DEGENERATE, **hard}[name]
    _, basis = unmarked(function(y.float()))
    identity = torch.eye(y.shape[-1]).expand(len(y), -1, -1)
    torch.testing.assert_close(basis.mT @ basis, identity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*DEGENERATE, "condition 1e3"])
def test_both_ways_find_the_same_basis(name: str) -> None:
    """Up to signs, and up to what rounding leaves of a direction; fixed directions stand in the same places."""
    y = (with_condition(1e3, 300, 32) if name == "condition 1e3" else DEGENERATE[name]).float()
    identity = torch.eye(y.shape[-1]).expand(len(y), -1, -1)
    both = [unmarked(find(y)) for find in (householder_basis, cholesky_basis)]
    (one, all_one), (other, all_other) = both
    torch.testing.assert_close((all_one.mT @ all_other).abs(), identity, rtol=0, atol=2e-4)
    null = (one == 0).all(dim=-2)
    assert torch.equal(null, (other == 0).all(dim=-2))
    assert null.any() == (name not in ("condition 1e3", "tiny"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_basis_spans_the_columns(dtype: torch.dtype, tolerance: float) -> None:
    y = matrix(2, 30, 6, dtype=dtype)
    for basis in (orthonormalize(y), cholesky_basis(y)):
        torch.testing.assert_close(basis @ (basis.mT @ y), y, rtol=0, atol=tolerance)


def test_leading_directions_are_singular_vectors() -> None:
    a = matrix(2, 12, 40)
    u = torch.linalg.svd(a)[0][..., :5]
    overlap = (leading_directions(a, 5).mT @ u).abs()
    torch.testing.assert_close(overlap, torch.eye(5, dtype=torch.float64).expand(2, 5, 5), rtol=0, atol=1e-10)


def test_a_slice_of_the_test_matrix_is_the_same_anywhere() -> None:
    rows = torch.arange(1000)
    whole = test_matrix(rows, 12, torch.float64)
    assert torch.equal(test_matrix(rows[300:450], 12, torch.float64), whole[300:450])
    assert whole.abs().max() <= 1
    assert whole.mean().abs() < 0.02
    assert (whole.square().mean() - 1 / 3).abs() < 0.02
    gram = whole.mT @ whole / 1000 * 3  # columns are as good as independent
    torch.testing.assert_close(gram, torch.eye(12, dtype=torch.float64), rtol=0, atol=0.12)


def test_second_moment_stays_non_negative() -> None:
    """A variance smaller than the squared mean, as rounding makes it, rotates into a negative difference."""
    exp_avg = matrix(1, 4, 9)
    rotation = torch.linalg.qr(matrix(4, 4, seed=1))[0][None]
    rotated = rotate_second_moment(0.5 * exp_avg.square(), exp_avg, rotation, rotation @ exp_avg, bias1=0.5, bias2=0.9)
    assert (rotated >= 0).all()


def test_low_rank_gradients_keep_everything_finite_and_orthonormal() -> None:
    """Rank 1 gradients, then none at all, then full ones: as for an expert with few tokens."""
    param, optimizer = one_matrix()
    for step in range(30):
        param.grad = matrix(12, 1, seed=step) @ matrix(1, 20, seed=step + 100)
        if 10 <= step < 20:
            param.grad.zero_()
        if step >= 20:
            param.grad = matrix(12, 20, seed=step)
        optimizer.step()
        state = optimizer.state[param]
        torch.testing.assert_close(
            state["projector"].mT @ state["projector"], torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12
        )
        assert (state["exp_avg_sq"] >= 0).all()
        assert state["error"].norm() < 1e3
        assert param.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradient_changes_nothing(value: float) -> None:
    model = models.odd_net()
    optimizer = LDAdamW(model.named_parameters(), rank=2)
    models.odd_loss(model, models.odd_inputs(0)).backward()
    optimizer.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    model.wide.bias.grad[0] = value  # in a vector: the matrices wait too
    with pytest.warns(UserWarning, match=r"wide\.bias is not finite"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    models.odd_loss(model, models.odd_inputs(1)).backward()
    optimizer.zero_grad()
    models.odd_loss(model, models.odd_inputs(1)).backward()
    optimizer.step()  # and the run goes on
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [1e20, 1e16])
@pytest.mark.parametrize("projector_init", ["svd", "randomized"])
def test_gradient_that_overflows_when_squared_changes_nothing(size: float, projector_init: str) -> None:
    param = nn.Parameter(matrix(12, 20, dtype=torch.float32))
    optimizer = LDAdamW([param], rank=4, projector_init=projector_init)
    for seed in range(2):  # at the first step, and after it
        before = param.detach().clone()
        param.grad = matrix(12, 20, dtype=torch.float32, seed=seed) * size
        with pytest.warns(UserWarning, match="too large to be squared"):
            optimizer.step()
        assert torch.equal(param, before)
        param.grad = matrix(12, 20, dtype=torch.float32, seed=seed)
        optimizer.step()
        assert param.isfinite().all()


@pytest.mark.parametrize("size", [1e-18, 1e-14, 1e8, 1e13])
def test_small_and_large_gradients_find_their_subspace_in_float32(size: float) -> None:
    """What is orthonormalised is quadratic in the gradient: a norm of it would leave float32's range."""
    found = []
    for dtype in (torch.float32, torch.float64):
        param = nn.Parameter(torch.zeros(40, 60, dtype=dtype))
        optimizer = LDAdamW([param], rank=4)
        for seed in range(3):
            param.grad = (matrix(40, 60, seed=seed) * torch.logspace(0, -2, 60) * size).to(dtype)
            optimizer.step()
        found.append(optimizer.state[param]["projector"].double())
    assert torch.linalg.svdvals(found[0].mT @ found[1]).min() > 0.999


def test_steps_are_counted_exactly_whatever_the_default_dtype() -> None:
    """bfloat16 cannot count beyond 256."""
    param, optimizer = one_matrix(matrix(12, 20, seed=1))
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[param]["step"].dtype == torch.float32


def step_with_a_parameter_of_ones_own() -> tuple[bool, float, int]:
    """FSDP2 weights on both ranks, and a plain matrix that rank 1 alone has."""
    model = models.odd_net()
    fully_shard(model)
    own = [nn.Parameter(matrix(6, 7))] if dist.get_rank() == 1 else []
    optimizer = LDAdamW([*model.parameters(), *own], rank=2)
    for step in range(3):
        optimizer.zero_grad()
        models.odd_loss(model, models.odd_inputs(step)).backward()
        for p in own:
            p.grad = matrix(6, 7, seed=step) * (float("nan") if step == 2 else 1.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
    text = str(caught[-1].message)
    named = "another rank" in text if dist.get_rank() == 0 else "#6 of group 0" in text
    return named, float(optimizer.state[model.tall.weight]["step"]), optimizer.skipped_steps


def test_ranks_may_have_parameters_of_their_own() -> None:
    """No rank waits for a status that the other does not have; and all of them skip a step if one must."""
    assert run_ranks(2, step_with_a_parameter_of_ones_own) == [(True, 2.0, 1)] * 2


def step_with_one_bad_rank(model_name: str, layout: str, where: str) -> tuple[bool, int, float]:
    """Whether a step changed nothing in which rank 1 alone had a NaN: in a shard of a gradient, or in its loss."""
    model, optimizer, parts, part = build(model_name, layout, torch.float64)
    _, loss_of, data, _ = BUILD[model_name]
    params = [p for p in model.parameters() if p.requires_grad]

    def seen() -> list[Tensor]:
        states = [optimizer.state[p][key] for p in params for key in optimizer.state[p]]
        return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in [*params, *states]]

    for step in range(2):
        optimizer.zero_grad()
        loss = loss_of(model, data(step).chunk(parts)[part])
        bad = step == 1 and dist.get_rank() == 1
        (loss * float("nan") if bad and where == "loss" else loss).backward()
        if bad and where == "shard":
            own = [p.grad for p in params if p.grad is not None and laid_out(p.grad) == laid_out(p)]
            grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in own]
            next(grad for grad in grads if grad.numel()).view(-1)[0] = float("nan")
        if step == 1:
            before = seen()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    same = all(torch.equal(a, b) for a, b in zip(before, seen(), strict=True))
    most = max(float(state["step"].max()) for state in optimizer.state.values())
    return same, optimizer.skipped_steps, most


def laid_out(tensor: Tensor) -> Any:
    return getattr(tensor, "placements", None)


@pytest.mark.parametrize(
    ("ranks", "model_name", "layout", "where"),
    [
        (2, "odd", "rows", "shard"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (2, "odd", "rows", "loss"),
                (2, "odd", "replicas", "shard"),
                (2, "odd", "replicas", "loss"),
                (2, "odd", "ddp", "loss"),
                (4, "odd", "hsdp", "shard"),
                (4, "odd", "hsdp", "loss"),
                (2, "blocks", "tp", "shard"),
                (2, "blocks", "sp", "shard"),
                (4, "blocks", "fsdp-tp", "shard"),
                (8, "blocks", "hsdp-tp", "shard"),
            )
        ),
    ],
)
def test_one_bad_rank_skips_the_step_on_every_rank(ranks: int, model_name: str, layout: str, where: str) -> None:
    assert run_ranks(ranks, step_with_one_bad_rank, model_name, layout, where) == [(True, 1, 1.0)] * ranks


def test_zero_gradient_dummy_step_only_allocates() -> None:
    """Checkpoint libraries take a step with zero gradients and lr = 0 to learn the state's shape."""
    model, fresh = models.odd_net(), models.odd_net()
    optimizer = LDAdamW(model.named_parameters(), lr=1e-2, rank=2)
    plain = LDAdamW(fresh.named_parameters(), lr=1e-2, rank=2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-2
    assert all(state["step"] == 0 for state in optimizer.state.values())
    assert len(optimizer.state) == len(list(model.parameters()))  # unused parameters too
    for step in range(3):
        for m, o in ((model, optimizer), (fresh, plain)):
            o.zero_grad()
            models.odd_loss(m, models.odd_inputs(step)).backward()
            o.step()
    torch.testing.assert_close(model.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_zero_gradients_before_the_first_real_one_choose_no_projector() -> None:
    """With lr > 0: the weight decays as under AdamW, and the matrix starts with its first real gradient."""
    param, optimizer = one_matrix(torch.zeros(12, 20, dtype=torch.float64), weight_decay=0.1)
    before = param.detach().clone()
    optimizer.step()
    assert optimizer.state[param]["step"] == 0
    assert not optimizer.state[param]["projector"].any()
    torch.testing.assert_close(param.detach(), before * (1 - 1e-2 * 0.1), rtol=0, atol=0)
    param.grad = matrix(12, 20, seed=5)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_bfloat16_weights_keep_float32_states_and_maths() -> None:
    """Rounding happens once a step, at the write-back: the update itself is that of float32."""
    weight, grads = matrix(12, 20), [matrix(12, 20, dtype=torch.bfloat16, seed=s) for s in range(1, 6)]
    low = nn.Parameter(weight.bfloat16())
    high = nn.Parameter(weight.bfloat16().float())
    options = {"lr": 1e-2, "rank": 4, "error_dtype": torch.float32}
    optimizers = LDAdamW([low], **options), LDAdamW([high], **options)
    for grad in grads:
        low.grad, high.grad = grad.clone(), grad.float()
        with torch.no_grad():
            high.copy_(low.float())
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(low.detach(), high.detach().bfloat16(), rtol=0, atol=0)
    state = optimizers[0].state[low]
    assert {k: v.dtype for k, v in state.items()} == dict.fromkeys(state, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "error_dtype", "stored"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float32),  # an accumulated error may overflow float16
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float64, None, torch.float64),
    ],
)
def test_error_dtype(dtype: torch.dtype, error_dtype: str | None, stored: torch.dtype) -> None:
    param = nn.Parameter(matrix(12, 20).to(dtype))
    optimizer = LDAdamW([param], rank=4, error_dtype=error_dtype)
    param.grad = matrix(12, 20, seed=1).to(dtype)
    optimizer.step()
    assert optimizer.state[param]["error"].dtype == stored
    assert optimizer.state[param]["error"].any()
