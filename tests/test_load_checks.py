"""What `load_state_dict` refuses, and that nothing has been loaded then; what else loads goes on as if it had not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldadam_dist import LDAdamW

NAMES = ("matrix", "stack", "vector")  # what rank 2 projects, a stack of 3, and what AdamW steps


def build(**options: Any) -> tuple[list[nn.Parameter], LDAdamW]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 8), (3, 5, 7), (4,)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    named = list(zip(NAMES, params, strict=True))
    groups = [{"params": named[:2]}, {"params": named[2:], "weight_decay": 0.1}]
    return params, LDAdamW(groups, lr=1e-2, rank=2, **options)


def train(params: list[nn.Parameter], optimizer: LDAdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def everything(value: Any) -> Any:
    """All that an optimizer has, comparable bit by bit."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {(id(key) if isinstance(key, Tensor) else key): everything(part) for key, part in value.items()}
    return [everything(part) for part in value] if isinstance(value, (list, tuple)) else value


def put(*where: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets an item, or what a function makes of it."""

    def change(saved: Any) -> None:
        *path, last = where
        for key in path:
            saved = saved[key]
        saved[last] = value(saved[last]) if callable(value) else value

    return change


def drop(*where: Any) -> Callable[[dict[str, Any]], None]:
    *path, last = where

    def change(saved: Any) -> None:
        for key in path:
            saved = saved[key]
        del saved[last]

    return change


def spoilt(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


def swap(saved: dict[str, Any]) -> None:
    saved["state"][0], saved["state"][2] = saved["state"][2], saved["state"][0]


REFUSED = {
    # what is changed in a state dict: the change, and what the error says
    "step of -1": (put("state", 2, "step", value=-1), "'step' of parameter vector.* is -1"),
    "step NaN": (put("state", 0, "step", value=math.nan), "'step' of parameter matrix.* is nan"),
    "step of a half": (put("state", 0, "step", value=torch.tensor(0.5)), "'step' of parameter matrix.* is 0.5"),
    "one step infinite": (put("state", 1, "step", value=spoilt(math.inf)), "'step' of parameter stack.* is inf"),
    "step True": (put("state", 0, "step", value=True), "'step' of parameter matrix.* is True"),
    "step text": (put("state", 0, "step", value="3"), "'step' of parameter matrix.* is '3'"),
    "one step for a stack": (put("state", 1, "step", value=3), r"'step' of parameter stack.* is \(\): expected \(3,\)"),
    "no step": (drop("state", 0, "step"), "'step' of parameter matrix.* is nothing"),
    "no projector": (drop("state", 0, "projector"), "'projector' of parameter matrix.* is nothing"),
    "no moment": (drop("state", 2, "exp_avg_sq"), "'exp_avg_sq' of parameter vector.* is nothing"),
    "other shape": (put("state", 0, "projector", value=torch.ones(6, 3)), r"matrix.* is \(6, 3\): expected \(6, 2\)"),
    "transposed": (put("state", 0, "exp_avg", value=lambda t: t.mT), "'exp_avg' of parameter matrix"),
    "a float": (put("state", 0, "exp_avg", value=0.5), "'exp_avg' of parameter matrix.* is 0.5"),
    "a list": (put("state", 0, "exp_avg", value=lambda t: t.tolist()), "'exp_avg' of parameter matrix"),
    "integers": (put("state", 0, "exp_avg", value=lambda t: t.long()), "matrix.* has dtype torch.int64"),
    "complex": (put("state", 2, "exp_avg", value=lambda t: t + 0j), "vector.* has dtype torch.complex64"),
    "sparse": (put("state", 0, "exp_avg", value=lambda t: t.to_sparse()), "layout torch.sparse_coo"),
    "meta": (put("state", 0, "error", value=lambda t: t.to("meta")), "'error' of parameter matrix.* meta device"),
    "projector NaN": (put("state", 0, "projector", value=spoilt(math.nan)), "'projector' of parameter matrix"),
    "error infinite": (put("state", 1, "error", value=spoilt(-math.inf)), "'error' of parameter stack.* from -inf"),
    "moment NaN": (put("state", 2, "exp_avg", value=spoilt(math.nan)), "'exp_avg' of parameter vector"),
    "variance < 0": (put("state", 2, "exp_avg_sq", value=spoilt(-1.0)), "vector.* from -1.0 .*: expected numbers ≥ 0"),
    "scales": (put("state", 0, "error_scale", value=torch.ones(6)), "matrix.* has 'error_scale'"),
    "error of codes": (put("state", 0, "error", value=lambda t: t.char()), "'error' of parameter matrix.* torch.int8"),
    "error of a vector": (put("state", 2, "error", value=torch.zeros(4)), "vector.* has 'error', which only"),
    "states swapped": (swap, "of parameter (matrix|vector)"),
    "no dict": (put("state", 1, value=[1, 2]), "state of parameter stack.* is a list"),
    "parameter twice": (put("param_groups", 0, "params", value=[0, 0]), "group 0 .* has 0 in 'params'"),
    "names too few": (put("param_groups", 0, "param_names", value=["a"]), "group 0 .* has 1 'param_names' for 2"),
    "no params": (drop("param_groups", 0, "params"), "group 0 of the saved state has no list 'params'"),
    "params too few": (put("param_groups", 1, value={"params": []}), "size of optimizer's group"),
    "one group": (drop("param_groups", 1), "different number of parameter groups"),
    "no groups": (drop("param_groups"), "expected 'state' and 'param_groups'"),
    "no states": (drop("state"), "expected 'state' and 'param_groups'"),
    "rho": (put("param_groups", 0, "rho", value=2), "group 0 of the saved state has rho=2: expected"),
    "betas": (put("param_groups", 1, "betas", value=(1, 1)), r"group 1 .* has betas\[0\]=1: expected"),
    "one beta": (put("param_groups", 0, "betas", value=[0.9]), r"group 0 .* has betas=\[0.9\]"),
    "lr NaN": (put("param_groups", 0, "lr", value=math.nan), "group 0 .* has lr=nan: expected"),
    "lr None": (put("param_groups", 0, "lr", value=None), "group 0 .* has lr=None: expected"),
    "eps": (put("param_groups", 0, "eps", value=-1e-8), "group 0 .* has eps=-1e-08: expected"),
    "weight_decay": (put("param_groups", 1, "weight_decay", value="0.1"), "group 1 .* has weight_decay='0.1'"),
    "proj_method": (put("param_groups", 0, "proj_method", value="power"), "group 0 .* has proj_method='power'"),
    "proj_type": (put("param_groups", 0, "proj_type", value="left"), "matrix.* was saved with proj_type='left'"),
    "rank": (put("param_groups", 0, "rank", value=3), "matrix.* was saved with rank=3"),
    "rank 0": (put("param_groups", 0, "rank", value=0), "group 0 .* has rank=0"),
    "feedback": (put("param_groups", 0, "error_feedback", value=1), "group 0 .* has error_feedback=1"),
    "maximize": (put("param_groups", 1, "maximize", value=True), "group 1 .* has maximize=True"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_has_loaded_nothing(what: str) -> None:
    change, message = REFUSED[what]
    params, optimizer = build()
    train(params, optimizer, range(2))
    other, source = build()
    train(other, source, range(3))
    saved = copy.deepcopy(source.state_dict())
    change(saved)
    before = everything({"state": optimizer.state, "groups": optimizer.param_groups})
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert everything({"state": optimizer.state, "groups": optimizer.param_groups}) == before
    train(params, optimizer, range(2, 3))
    assert all(torch.equal(p, q) for p, q in zip(params, other, strict=True))


def all_steps_as_numbers(saved: dict[str, Any]) -> None:
    for number in (0, 2):
        saved["state"][number]["step"] = saved["state"][number]["step"].item()


def only_params(saved: dict[str, Any]) -> None:
    for group in saved["param_groups"]:
        for key in ("rho", "projector_init", "communication", "metrics_every", "state_dtype", "flatten"):
            del group[key]


LOADED = {
    "steps as numbers": all_steps_as_numbers,
    "steps as integers": put("state", 1, "step", value=lambda t: t.long()),
    "keys that came later": only_params,
    "betas as a list": put("param_groups", 0, "betas", value=list),
    "a key of the user": put("param_groups", 0, "mine", value="kept"),
    "a state that is no parameter's": put("state", "seen", value=7),
    "float64": put("state", 0, "projector", value=lambda t: t.double()),
}


@pytest.mark.parametrize("what", LOADED)
def test_what_loads_goes_on_exactly(what: str) -> None:
    params, optimizer = build()
    train(params, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    LOADED[what](saved)
    other, fresh = build()
    for param, trained in zip(other, params, strict=True):
        param.data.copy_(trained)
    fresh.load_state_dict(saved)
    assert fresh.state.get("seen", 7) == 7
    train(params, optimizer, range(3, 5))
    train(other, fresh, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(params, other, strict=True))
    assert {str(fresh.state[p]["step"].dtype) for p in other} == {"torch.float32"}


@pytest.mark.parametrize("options", [{}, {"error_dtype": "int8"}, {"error_in_grad": True}])
def test_a_key_that_is_no_parameter_stays(options: dict[str, Any]) -> None:
    params, optimizer = build(**options)
    optimizer.state["tokens"] = 5
    train(params, optimizer, range(2))
    saved = optimizer.state_dict()
    _, fresh = build(**options)
    fresh.load_state_dict(saved)
    assert fresh.state["tokens"] == 5
    assert copy.deepcopy(fresh).state["tokens"] == 5


def test_a_hook_that_raises_after_the_load_undoes_it() -> None:
    params, optimizer = build()
    train(params, optimizer, range(2))
    _, source = build()
    before = everything({"state": optimizer.state, "groups": optimizer.param_groups})

    def refuse(_: Any) -> None:
        raise RuntimeError("not this one")

    optimizer.register_load_state_dict_post_hook(refuse)
    with pytest.raises(RuntimeError, match="not this one"):
        optimizer.load_state_dict(source.state_dict())
    assert everything({"state": optimizer.state, "groups": optimizer.param_groups}) == before
