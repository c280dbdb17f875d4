"""Gradients and modes that are not as usual: zero, of low rank, in autocast, of another dtype, fake."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_traps import matrix, one_matrix
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldadam_dist import LDAdamW


def test_a_zero_gradient_rests_its_matrix() -> None:
    """Of a stack each matrix by itself, and a whole parameter; only weight decay goes on, and the next step as if
    nothing had been in between."""
    weights = [matrix(3, 12, 20), matrix(12, 20, seed=1)]
    runs = [[nn.Parameter(w.clone()) for w in weights] for _ in range(2)]
    resting, straight = (LDAdamW(params, rank=4, weight_decay=0.0) for params in runs)
    for step in range(6):
        grads = [matrix(3, 12, 20, seed=step), matrix(12, 20, seed=50 + step)]
        for params, optimizer in zip(runs, (resting, straight), strict=True):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
        before = copy.deepcopy(resting.state_dict()["state"]), [p.detach().clone() for p in runs[0]]
        for param in runs[0]:
            param.grad.zero_()
        runs[0][0].grad[1] = 1.0 if step == 5 else 0.0
        resting.step()
        if step < 5:
            torch.testing.assert_close(resting.state_dict()["state"], before[0], rtol=0, atol=0)
            assert all(map(torch.equal, runs[0], before[1]))
            assert all(map(torch.equal, *runs))
    stack, old = resting.state[runs[0][0]], before[0][0]
    assert stack["step"].tolist() == [6, 7, 6]
    for name in ("projector", "exp_avg", "exp_avg_sq", "error"):
        assert [torch.equal(a, b) for a, b in zip(stack[name], old[name], strict=True)] == [True, False, True]
    assert torch.equal(runs[0][1], runs[1][1])


def test_null_directions_neither_project_nor_move() -> None:
    """A repeated input: a gradient of rank 1 moves the weight in one direction, and nothing is divided by eps."""
    param, optimizer = one_matrix()
    before = param.detach().clone()
    for step in range(20):
        param.grad = matrix(12, 1) @ matrix(1, 20, seed=1) * (1 + step)
        optimizer.step()
        state = optimizer.state[param]
        moving = state["exp_avg"].norm(dim=-1) > 0
        assert moving.sum() == 1
        assert not state["exp_avg_sq"][~moving].any()
        values = torch.linalg.svdvals(param - before)
        assert values[1] < 1e-12 * values[0]


def test_autocast_changes_nothing() -> None:
    found = []
    for enabled in (False, True):
        params = [nn.Parameter(matrix(12, 20, dtype=torch.float32)), nn.Parameter(torch.ones(7))]
        optimizer = LDAdamW(params, rank=4)
        for step in range(3):
            params[0].grad, params[1].grad = matrix(12, 20, seed=step, dtype=torch.float32), torch.ones(7)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                optimizer.step()
        found.append(params)
    assert all(map(torch.equal, *found))


@pytest.mark.skipif(not hasattr(torch.zeros(1), "grad_dtype"), reason="this torch has no Parameter.grad_dtype")
@pytest.mark.parametrize(("dtype", "grad_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_gradients_of_another_dtype(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Matrices and vectors are stepped as with the same numbers in the parameter's dtype; error_in_grad refuses."""
    found = []
    for used in (grad_dtype, dtype):
        params = [nn.Parameter(matrix(12, 20).to(dtype)), nn.Parameter(torch.zeros(12, dtype=dtype))]
        optimizer = LDAdamW(params, rank=3, lr=1e-1)
        for step in range(3):
            for param in params:
                param.grad_dtype = used
                param.grad = matrix(*param.shape, seed=step).to(torch.bfloat16).to(used)
            optimizer.step()
        found.append(params)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0 if dtype == torch.float32 else 2e-2)

    params[0].grad = None
    params[0].grad_dtype = grad_dtype
    with pytest.raises(ValueError, match="has grad_dtype="):
        LDAdamW(params, rank=3, error_in_grad=True)


@pytest.mark.parametrize(
    "options",
    [
        {"error_dtype": "int4", "state_dtype": "bfloat16", "stochastic_rounding": True},
        {"proj_method": "svd", "metrics_every": 1},
        {"error_in_grad": True},
        {"capturable": True},
    ],
    ids=str,
)
def test_steps_of_fake_tensors_make_states(options: dict[str, Any]) -> None:
    """As an estimate of memory takes them: nothing is read, and later steps of real tensors are as ever."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.randn(shape)) for shape in ((40, 60), (3, 12, 20), (7,))]
        optimizer = LDAdamW(params, rank=4, **options)
        for _ in range(2):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        assert all("exp_avg" in optimizer.state[param] for param in params)
    param, optimizer = one_matrix()
    param.grad = matrix(12, 20)
    optimizer.step()
    assert param.isfinite().all()
