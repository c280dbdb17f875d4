"""error_in_grad: the numbers of a separate gradient, its memory saved, and everything that would spoil it refused."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from test_sharded import BUILD, shard
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ldadam_dist import LDAdamW, clip_grad_norm_

STEPS = 6
MATRICES = ("wide.weight", "square.weight", "tall.weight", "short.weight")


def make(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, LDAdamW]:
    model = models.odd_net(dtype)
    options = {"lr": 1e-2, "rank": 2, "weight_decay": 0.1, "error_in_grad": True, **options}
    return model, LDAdamW(model.named_parameters(), **options)


def backward(model: nn.Module, step: int, micro_batches: int = 1) -> None:
    for part in models.odd_inputs(step).to(next(model.parameters()).dtype).chunk(micro_batches):
        (models.odd_loss(model, part) / micro_batches).backward()


def train(
    model: nn.Module, optimizer: LDAdamW, steps: range = range(STEPS), clip: float | None = None, **options: Any
) -> None:
    for step in steps:
        backward(model, step, **options)
        if clip is not None:
            clip_grad_norm_(optimizer, clip)
        optimizer.step()
        optimizer.zero_grad()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def seen(model: nn.Module, optimizer: LDAdamW) -> dict[str, Tensor]:
    """Weights and errors on this process."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = local(param).detach().clone()
        if "error" in optimizer.state[param]:
            found[f"error of {name}"] = local(optimizer.state[param]["error"]).clone()
    return found


def in_place(optimizer: LDAdamW) -> list[bool]:
    """Of each parameter with an error, whether it is the gradient."""
    return [
        param.grad is not None and local(param.grad).data_ptr() == local(state["error"]).data_ptr()
        for param, state in optimizer.state.items()
        if "error" in state and local(state["error"]).numel()
    ]


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


ZERO: dict[str, Callable[[nn.Module, LDAdamW], None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, to zero": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "first one, then the other": lambda model, optimizer: [model.zero_grad(), optimizer.zero_grad()][0],
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("zero", ZERO)
def test_the_numbers_are_those_of_a_separate_gradient(zero: str, micro_batches: int) -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    for step in range(STEPS):
        for m, o in ((model, optimizer), (other, plain)):
            ZERO[zero](m, o)
            backward(m, step, micro_batches)
            o.step()
        close(seen(model, optimizer), seen(other, plain))
        assert in_place(optimizer) == [True] * 4 + [False]  # `unused` has no error yet


def test_the_error_is_the_gradient_and_backward_makes_no_other() -> None:
    model, optimizer = make()
    train(model, optimizer, range(1))
    params = [model.get_parameter(name) for name in MATRICES]
    errors = [optimizer.state[param]["error"] for param in params]
    before = [error.clone() for error in errors]
    backward(model, 1)
    gradients = {name: param.grad.clone() for name, param in models_gradients(model, 1).items()}
    for name, param, error, old in zip(MATRICES, params, errors, before, strict=True):
        assert param.grad is error
        torch.testing.assert_close(error, old + gradients[name], rtol=0, atol=1e-14)


def models_gradients(model: nn.Module, step: int) -> dict[str, nn.Parameter]:
    """Parameters of a copy, with the gradients of a step."""
    other = models.odd_net()
    other.load_state_dict(model.state_dict())
    backward(other, step)
    return dict(other.named_parameters())


class Allocations(TorchDispatchMode):
    """Counts new storages of a size."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count, self.known = elements, 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = {id(a.untyped_storage()._cdata) for a in args if isinstance(a, Tensor)}
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)} | taken
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.count += tensor.numel() >= self.elements
        return out


def test_a_step_allocates_nothing_as_large_as_the_matrix() -> None:
    """400 × 300 with rank 4: factors are at most 1,600 elements."""
    param = nn.Parameter(torch.randn(400, 300))
    x = torch.randn(300, generator=torch.Generator().manual_seed(0))
    optimizer = LDAdamW([param], rank=4, error_in_grad=True)
    for step in range(3):
        (param @ x).square().sum().backward()
        with Allocations(param.numel()) as allocated:
            optimizer.step()
            optimizer.zero_grad()
        assert step == 0 or allocated.count == 0
