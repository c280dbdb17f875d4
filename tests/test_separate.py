"""Large matrices in one batch, each where it is: what a GPU does, on a CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from reference import Reference
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldadam_dist import LDAdamW
from ldadam_dist.buckets import STACK_ELEMENTS
from ldadam_dist.separate import Separate

SHAPE = (190, 210)
"""Too large to be copied into a batch."""


@pytest.fixture(autouse=True)
def batched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SHAPE[0] * SHAPE[1] > STACK_ELEMENTS
    monkeypatch.setattr("ldadam_dist.lowrank.CACHED_ELEMENTS", 2**40)


def gradient(seed: int, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"error_feedback": False, "weight_decay": 0.2},
        {"proj_type": "right"},
        {"proj_method": "svd"},  # brings matrices together, one by one
        {"window_elements": 1},  # a window has one matrix
    ],
    ids=str,
)
def test_equals_the_oracle_after_every_step(options: dict[str, Any]) -> None:
    """One of the matrices starts two steps later, so it is in no batch with the others; one lies transposed."""
    weights = [gradient(seed) for seed in range(5)]
    params = [nn.Parameter((w.mT.contiguous().mT if i == 2 else w).clone()) for i, w in enumerate(weights)]
    optimizer = LDAdamW(params, lr=1e-2, rank=5, **options)
    left = options.get("proj_type") != "right"
    kept = {key: value for key, value in options.items() if key not in ("proj_type", "window_elements")}
    oracles = [Reference(w, 5, left, lr=1e-2, **kept) for w in weights]
    for step in range(8):
        for i, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
            param.grad = None
            if i == 4 and step < 2:
                continue
            param.grad = gradient(100 * step + i)
            oracle.step(gradient(100 * step + i))
        optimizer.step()
        for i, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
            torch.testing.assert_close(param.detach(), oracle.weight, rtol=0, atol=1e-10, msg=f"{step}, matrix {i}")


@pytest.mark.parametrize(
    "options",
    [{}, {"stochastic_rounding": True}, {"error_dtype": "int4"}, {"error_dtype": "float32"}, {"error_in_grad": True}],
    ids=str,
)
def test_narrow_storage_is_as_one_by_one(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> list[Tensor]:
        params = [nn.Parameter(gradient(seed).bfloat16()) for seed in range(3)]
        optimizer = LDAdamW(params, lr=1e-2, rank=5, **options)
        for step in range(4):
            optimizer.zero_grad()
            torch.autograd.backward(params, [gradient(10 * step + i).bfloat16() for i in range(3)])
            optimizer.step()
        states = [optimizer.state_dict()["state"][i] for i in range(3)]
        return [*params, *(state["error"] for state in states), *(state["exp_avg"] for state in states)]

    together = train()
    monkeypatch.setattr("ldadam_dist.lowrank.CACHED_ELEMENTS", 1)
    for found, expected in zip(together, train(), strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


class Calls(TorchDispatchMode):
    """Counts operators that compute something; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_what_is_of_rank_size_is_called_once_for_all() -> None:
    """Of a matrix there are its six products (two in one for the error), A = G + E and the check of its gradient."""

    def calls(number: int) -> Counter[str]:
        params = [nn.Parameter(gradient(seed).float()) for seed in range(number)]
        optimizer = LDAdamW(params, lr=1e-2, rank=4)
        for step in range(2):
            for i, param in enumerate(params):
                param.grad = gradient(10 * step + i).float()
            with Calls() as counted:
                optimizer.step()
        return counted.count

    many, few = calls(12), calls(4)
    more = {name: (many[name] - few[name]) / 8 for name in many if many[name] != few[name]}
    assert (more["mm"], more["addmm_"]) == (3, 2)
    assert many["linalg_qr"] == 1
    assert sum(more.values()) <= 12, more


def test_looks_like_a_batch() -> None:
    whole = torch.stack([gradient(seed) for seed in range(3)])
    apart = Separate(list(whole.clone()))
    left, right = gradient(1, (4, 190)), gradient(2, (210, 4))
    lefts, rights = torch.stack([left, 2 * left, 3 * left]), torch.stack([right, 2 * right, 3 * right])
    assert (apart.shape, apart.dtype, len(apart)) == (whole.shape, whole.dtype, 3)
    torch.testing.assert_close(lefts @ apart, lefts @ whole)
    torch.testing.assert_close(apart @ rights, whole @ rights)
    torch.testing.assert_close(apart @ right, whole @ right)
    apart.baddbmm_(lefts.mT, rights.mT, beta=0.5, alpha=-2.0)
    torch.testing.assert_close(torch.stack(list(apart)), 0.5 * whole - 2.0 * lefts.mT @ rights.mT)
