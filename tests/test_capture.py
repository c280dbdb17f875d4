"""capturable: the numbers of other steps when operators are replayed, without the host; on a CPU, see `replay`."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from reference import Reference
from replay import Recording, clones, on_device_only
from torch import Tensor, nn

from ldadam_dist import LDAdamW

# Two large ones of a shape are one batch, two small ones are copied into one; a stack of matrices; AdamW's.
SHAPES = [(190, 210), (190, 210), (24, 40), (24, 40), (40, 24), (3, 24, 40), (30, 4), (31,)]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[nn.Parameter], LDAdamW]:
    params = [nn.Parameter((0.1 * normal(shape, i)).to(dtype)) for i, shape in enumerate(SHAPES)]
    return params, LDAdamW(params, **{"lr": 1e-2, "rank": 6, **options})


def give(params: list[nn.Parameter], step: int) -> None:
    """New values in the same gradients, as a graph wants them."""
    for i, param in enumerate(params):
        grad = normal(tuple(param.shape), 1000 * step + i).to(param.dtype)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


def captured(params: list[nn.Parameter], optimizer: LDAdamW, step: int) -> Recording:
    give(params, step)
    with Recording() as recording:
        optimizer.step()
    return recording


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device_only(monkeypatch)


OPTIONS = [
    {},
    {"weight_decay": 0.2},
    {"error_feedback": False, "proj_type": "reverse_std"},
    {"error_dtype": "int8", "stochastic_rounding": True},
    {"state_dtype": "bfloat16", "stochastic_rounding": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replays_equal_other_steps_after_each_one(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Both start each replay from the same weights and states: in bfloat16 a tie may be rounded otherwise."""
    params, optimizer = make(dtype, capturable=True, **options)
    others, plain = make(dtype, **options)
    for step in range(2):
        for some, steps in ((params, optimizer), (others, plain)):
            give(some, step)
            steps.step()
    recording = captured(params, optimizer, 2)
    give(others, 2)
    plain.step()
    unit = torch.finfo(dtype).eps
    for step in range(3, 10):
        for mine, other in zip(params, others, strict=True):
            with torch.no_grad():
                mine.copy_(other)
            for key, value in plain.state[other].items():
                optimizer.state[mine][key].copy_(value)
        give(params, step)
        recording.replay()
        give(others, step)
        plain.step()
        for mine, other in zip(params, others, strict=True):
            torch.testing.assert_close(mine.detach(), other.detach(), rtol=4 * unit, atol=1e-5 + 0.02 * unit)
            assert torch.equal(optimizer.state[mine]["step"], plain.state[other]["step"])


def test_replays_equal_the_oracle() -> None:
    weights = [normal((30, 50), seed) for seed in range(3)]
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = LDAdamW(params, lr=1e-2, rank=4, weight_decay=0.1, capturable=True)
    oracles = [Reference(w, 4, True, lr=1e-2, weight_decay=0.1) for w in weights]
    recording = None
    for step in range(12):
        give(params, step)
        for i, oracle in enumerate(oracles):
            oracle.step(normal((30, 50), 1000 * step + i))
        if recording is not None:
            recording.replay()
        elif step == 3:
            with Recording() as recording:
                optimizer.step()
        else:
            optimizer.step()
        for param, oracle in zip(params, oracles, strict=True):
            torch.testing.assert_close(
                param.detach(), oracle.weight, rtol=0, atol=1e-6
            )  # B Bᵀ U in float64 by Cholesky


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("which", [0, 2, 5, 7], ids=["large", "small", "stack", "vector"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
def test_an_unusable_gradient_changes_nothing(options: dict[str, Any], which: int, value: float) -> None:
    params, optimizer = make(capturable=True, **options)
    for step in range(2):
        give(params, step)
        optimizer.step()
    recording = captured(params, optimizer, 2)
    if value == 1e20 and which == 7:
        return  # AdamW takes it
    before = clones([[*params], [dict(optimizer.state[p]) for p in params]])
    give(params, 3)
    params[which].grad.view(-1)[5] = value
    recording.replay()
    after = clones([[*params], [dict(optimizer.state[p]) for p in params]])
    for old, new in zip(torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True):
        assert torch.equal(old, new)
    recording.replay()
    assert optimizer.skipped_steps == 2
    give(params, 4)
    recording.replay()
    assert optimizer.skipped_steps == 2
    assert not torch.equal(params[0], before[0][0])


def test_a_learning_rate_on_the_device_changes_between_replays() -> None:
    lr = torch.tensor(1e-2)
    params, optimizer = make(lr=lr, weight_decay=0.1, capturable=True)
    others, plain = make(lr=1e-2, weight_decay=0.1)
    recording = None
    for step in range(8):
        rate = 1e-2 * 0.7**step
        lr.fill_(rate)
        for group in plain.param_groups:
            group["lr"] = rate
        give(others, step)
        plain.step()
        if step == 2:
            recording = captured(params, optimizer, step)
        else:
            give(params, step)
            optimizer.step() if recording is None else recording.replay()
    for mine, other in zip(params, others, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-4, atol=1e-5)


def test_the_step_is_on_the_device_and_checkpoints_load_either_way() -> None:
    params, optimizer = make(capturable=True)
    others, plain = make()
    for step in range(3):
        give(params, step)
        optimizer.step()
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    plain.load_state_dict(torch.load(saved, weights_only=True))
    assert plain.param_groups[0]["capturable"] is False
    with torch.no_grad():
        for mine, other in zip(params, others, strict=True):
            other.copy_(mine)
    back = copy.deepcopy(optimizer)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))  # torch would share the tensors
    assert optimizer.param_groups[0]["capturable"] is True
    for some, steps in ((params, optimizer), (others, plain), (back.param_groups[0]["params"], back)):
        give(some, 3)
        steps.step()
    for mine, other, third in zip(params, others, back.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(mine, third)


def test_parameters_without_a_gradient_rest() -> None:
    params, optimizer = make(capturable=True)
    give(params, 0)
    params[1].grad = params[7].grad = None
    optimizer.step()
    with Recording() as recording:
        optimizer.step()
    before = clones([params[1], params[7]])
    recording.replay()
    assert torch.equal(params[1], before[0])
    assert torch.equal(params[7], before[1])
    assert optimizer.state[params[1]]["step"] == 0
    assert optimizer.state[params[0]]["step"] == 3


def test_the_first_step_is_seen_by_the_host() -> None:
    params, optimizer = make(capturable=True)
    give(params, 0)
    with pytest.raises(AssertionError, match="the host reads"), Recording():
        optimizer.step()


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ([nn.Parameter(torch.zeros(8, 8))], {"error_in_grad": True}, "error_in_grad=True"),
        ([nn.Parameter(torch.zeros(8, 8))], {"proj_method": "svd"}, "proj_method='svd'"),
        ([nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(8, device="meta"))], {}, "is on meta"),
        ([{"params": [nn.Parameter(torch.zeros(8, 8))], "capturable": False}], {}, "in the group of parameter"),
        ([nn.Parameter(torch.zeros(8, 8))], {"capturable": 1}, "capturable=1: expected True or False"),
    ],
)
def test_what_cannot_be_captured_is_refused(params: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LDAdamW(params, rank=2, **{"capturable": True, **options})
