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
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
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


def test_backward_accumulates_into_the_error() -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    for m, o in ((model, optimizer), (other, plain)):
        train(m, o, range(1))
        backward(m, 1)
    for name in MATRICES:
        param, apart = model.get_parameter(name), other.get_parameter(name)
        assert param.grad is optimizer.state[param]["error"]
        torch.testing.assert_close(param.grad, plain.state[apart]["error"] + apart.grad, rtol=0, atol=1e-13)


class Allocations(TorchDispatchMode):
    """Counts new storages of a size."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
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


def test_bfloat16_is_as_close_as_it_rounds() -> None:
    (model, optimizer), (other, plain) = make(torch.bfloat16), make(torch.bfloat16, error_in_grad=False)
    for m, o in ((model, optimizer), (other, plain)):
        train(m, o)
    close(seen(model, optimizer), seen(other, plain), 3e-2)


def test_stacks_and_convolutions() -> None:
    found = []
    for error_in_grad in (True, False):
        model = models.expert_net()
        groups = [
            {"params": [p for n, p in model.named_parameters() if "conv" in n], "flatten": True},
            {"params": [p for n, p in model.named_parameters() if "conv" not in n]},
        ]
        optimizer = LDAdamW(groups, lr=1e-2, rank=2, error_in_grad=error_in_grad)
        for step in range(3):
            models.odd_loss(model, models.odd_inputs(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(seen(model, optimizer))
        assert all(in_place(optimizer)) == error_in_grad
    close(*found)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_clipping_is_that_of_a_separate_gradient(micro_batches: int) -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    for step in range(STEPS):
        norms = []
        for m, o in ((model, optimizer), (other, plain)):
            backward(m, step, micro_batches)
            norms.append(
                clip_grad_norm_(o, 0.05) if m is model else nn.utils.clip_grad_norm_(list(m.parameters()), 0.05)
            )
            o.step()
        assert norms[0] == norms[1] > 0.05
        assert all(model.get_parameter(name).grad is None for name in MATRICES)
        optimizer.zero_grad()
        plain.zero_grad()
        close(seen(model, optimizer), seen(other, plain), 0.0)


def test_clipping_works_for_other_optimizers_too() -> None:
    for error_in_grad in (False, True):
        model, optimizer = make(error_in_grad=error_in_grad)
        backward(model, 0)
        adamw = torch.optim.AdamW(model.parameters())
        assert clip_grad_norm_(optimizer, 0.05) > 0.05
        assert clip_grad_norm_(adamw, 1.0, norm_type=torch.inf) <= 0.05


def test_clipping_that_begins_too_late_is_refused_and_can_begin_at_the_next_backward() -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    for m, o in ((model, optimizer), (other, plain)):
        train(m, o, range(2))
        backward(m, 2)
    before = seen(model, optimizer)
    with pytest.raises(RuntimeError, match=r"wide\.weight has already been accumulated into its error"):
        clip_grad_norm_(optimizer, 1e-3)
    close(seen(model, optimizer), before, 0.0)
    for o in (optimizer, plain):
        o.step()
        o.zero_grad()
    optimizer.keep_gradients_apart()
    for m, o in ((model, optimizer), (other, plain)):
        train(m, o, range(3, 5), clip=1e-3)
    close(seen(model, optimizer), seen(other, plain))


def test_a_missing_gradient_is_missing() -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    for m, o in ((model, optimizer), (other, plain)):
        train(m, o, range(2))
        m.square.weight.requires_grad_(False)
        backward(m, 2)
        m.square.weight.requires_grad_(True)
        o.step()
        o.zero_grad()
    close(seen(model, optimizer), seen(other, plain))
    assert optimizer.state[model.square.weight]["step"] == 2
    assert all(in_place(optimizer)[:4])


def test_a_gradient_that_was_given_by_hand_is_added() -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    for m, o in ((model, optimizer), (other, plain)):
        train(m, o, range(2))
        for param in m.parameters():
            param.grad = torch.ones_like(param)
        o.step()
    close(seen(model, optimizer), seen(other, plain))


@pytest.mark.parametrize("value", [float("nan"), 1e200])
def test_a_gradient_that_is_not_usable_costs_its_matrix_the_error(value: float) -> None:
    model, optimizer = make()
    train(model, optimizer, range(2))
    weights = copy.deepcopy(model.state_dict())
    backward(model, 2)
    kept = seen(model, optimizer)
    model.tall.register_forward_pre_hook(lambda _, inputs: (inputs[0] * value,))
    model.tall.weight.register_hook(lambda grad: torch.full_like(grad, value))
    for name in ("wide", "square", "short"):
        model.get_parameter(f"{name}.weight").requires_grad_(False)
    (model.tall.weight.sum() * 1.0).backward()
    for name in ("wide", "square", "short"):
        model.get_parameter(f"{name}.weight").requires_grad_(True)
    with pytest.warns(UserWarning, match=r"Errors that start again from zero: tall\.weight; the other gradients stay"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    found = seen(model, optimizer)
    assert not found.pop("error of tall.weight").any()
    kept.pop("error of tall.weight")
    close(found, kept, 0.0)


def test_one_expert_that_is_not_usable_costs_no_other_its_error() -> None:
    experts = nn.Parameter(torch.randn(3, 5, 6, dtype=torch.float64))
    optimizer = LDAdamW([experts], rank=2, error_in_grad=True)
    inputs = torch.randn(3, 6, dtype=torch.float64)
    for step in range(2):
        scale = torch.tensor([1.0, float("nan") if step else 1.0, 1.0], dtype=torch.float64)
        (torch.einsum("eij,ej->ei", experts, inputs) * scale[:, None]).square().sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        optimizer.zero_grad()
    error = optimizer.state[experts]["error"]
    assert [bool(matrix.any()) for matrix in error] == [True, False, True]
    assert error.isfinite().all()


def test_a_gradient_that_is_dropped_stays_in_the_error_and_says_so() -> None:
    model, optimizer = make()
    train(model, optimizer, range(1))
    backward(model, 1)
    before = seen(model, optimizer)
    with pytest.warns(UserWarning, match=r"stay in the errors of wide\.weight, square\.weight"):
        optimizer.zero_grad()
    close(seen(model, optimizer), before, 0.0)
    optimizer.step()  # of nothing
    close(seen(model, optimizer), before, 0.0)
    backward(model, 2)
    model.zero_grad()
    backward(model, 3)
    with pytest.warns(UserWarning, match=r"stay in the errors of wide\.weight"):
        optimizer.step()


def resumed(model: nn.Module, optimizer: LDAdamW) -> tuple[nn.Module, LDAdamW]:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, fresh = make()
    train(other, fresh, range(20, 22))  # it has errors of its own
    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    return other, fresh


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("how", [resumed, lambda *both: copy.deepcopy(both)], ids=["file", "copy"])
def test_a_run_goes_on_exactly(how: Any, clip: float | None) -> None:
    model, optimizer = make()
    train(model, optimizer, range(3), clip=clip)
    other, fresh = how(model, optimizer)
    assert not any(in_place(fresh))
    train(model, optimizer, range(3, 6), clip=clip)
    train(other, fresh, range(3, 6), clip=clip)
    close(seen(other, fresh), seen(model, optimizer))


def test_a_state_of_a_separate_gradient_loads_and_a_pending_gradient_is_dropped_with_its_buffer() -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    train(model, optimizer, range(5))
    backward(model, 5)
    train(other, plain, range(2))
    model.load_state_dict(other.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    for m, o in ((model, optimizer), (other, plain)):
        m.wide.bias.grad = None  # a gradient that lies apart stays, as with any optimizer
        train(m, o, range(2, 4))
    close(seen(model, optimizer), seen(other, plain))
