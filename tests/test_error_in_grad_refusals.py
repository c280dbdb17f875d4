"""error_in_grad: what writes into the buffers of error and gradient besides backward, and settings that do not fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import models
import pytest
import torch
from test_error_in_grad import MATRICES, backward, close, make, seen, train
from torch import nn

from ldadam_dist import LDAdamW
from ldadam_dist.entries import Entry


def clip_torchs(model: nn.Module, optimizer: LDAdamW) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def unscale(model: nn.Module, optimizer: LDAdamW) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    scaler.unscale_(optimizer)


def average(model: nn.Module, optimizer: LDAdamW) -> None:
    for param in model.parameters():
        if param.grad is not None:
            param.grad /= 2


def write_behind_versions(model: nn.Module, optimizer: LDAdamW) -> None:
    for name in MATRICES:
        model.get_parameter(name).grad.data.mul_(0.5)


def replace(model: nn.Module, optimizer: LDAdamW) -> None:
    for name in MATRICES:
        model.get_parameter(name).grad = model.get_parameter(name).grad.clone()


def create_graph(model: nn.Module, optimizer: LDAdamW) -> None:
    grads = {p: p.grad for p in model.parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models.odd_loss(model, models.odd_inputs(9)).backward(create_graph=True)
    for param, grad in grads.items():  # as torch asks for, or the graph stays
        param.grad = grad


SPOILS: dict[str, tuple[Callable[[nn.Module, LDAdamW], None], str]] = {
    "torch's clipping": (clip_torchs, "was written to after backward"),
    "GradScaler.unscale_": (unscale, "has other values than after backward"),
    "averaging": (average, "was written to after backward"),
    "model.zero_grad to zero": (lambda m, _: m.zero_grad(set_to_none=False), "was written to after backward"),
    "data": (write_behind_versions, "has other values than after backward"),
    "another tensor": (replace, "was replaced by another tensor"),
    "create_graph": (create_graph, "create_graph"),
}
LEAVE_VERSIONS = ("GradScaler.unscale_", "data")
"""Seen after the last backward only."""


@pytest.mark.parametrize(
    ("how", "when"),
    [
        *((how, "after") for how in SPOILS),
        *((how, when) for how in SPOILS if how not in LEAVE_VERSIONS for when in ("before", "between")),
    ],
)
def test_what_else_writes_into_the_buffer_is_refused(how: str, when: str) -> None:
    """Before the backward, between two of them, and after: at the step, which changes nothing, and again."""
    model, optimizer = make()
    train(model, optimizer, range(2))
    spoil, message = SPOILS[how]
    if when != "before":
        backward(model, 2)
    spoil(model, optimizer)
    if when != "after":
        backward(model, 3)
        message = "the buffer of error and gradient of wide.weight"
    before = seen(model, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        close(seen(model, optimizer), before, 0.0)


def test_hooks_that_scale_gradients_in_the_backward_are_refused() -> None:
    model, optimizer = make()
    train(model, optimizer, range(1))
    model.tall.weight.register_post_accumulate_grad_hook(lambda p: [p.grad.mul_(0.5), None][1])
    backward(model, 1)
    with pytest.raises(RuntimeError, match=r"tall\.weight was written to 2 times while 1 gradients were accumulated"):
        optimizer.step()


def test_offloaded_parameters_are_refused() -> None:
    """With a stand-in for the adapter: an offloaded DTensor needs a mesh of GPUs."""
    _, optimizer = make()
    adapter = SimpleNamespace(copies=1, device=torch.device("cuda"))
    group, shape = optimizer.param_groups[0], (12, 20)
    entry = Entry("weight", nn.Parameter(torch.zeros(shape)), group, cast(Any, adapter), (1, *shape), shape)
    with pytest.raises(ValueError, match=r"weight is offloaded to cpu: .* expected it on cuda"):
        optimizer._check_fits(entry)


def test_loss_scaling_is_refused_at_the_first_step() -> None:
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(models.odd_loss(model, models.odd_inputs(0))).backward()
    with pytest.raises(RuntimeError, match="expected no scaled loss"):
        scaler.step(optimizer)
    assert not optimizer.state
    _, plain = make(error_in_grad=False)
    assert not plain._step_supports_amp_scaling


@pytest.mark.parametrize("error_dtype", ["bfloat16", "int8", "int4"])
def test_an_error_that_was_stored_otherwise_is_loaded_as_it_is_stored_here(error_dtype: str) -> None:
    saver, loader = (nn.Parameter(torch.ones(12, 20)) for _ in range(2))
    saved = LDAdamW([saver], rank=4, error_dtype=error_dtype)
    saver.grad = torch.randn(12, 20)
    saved.step()
    optimizer = LDAdamW([loader], rank=4, error_in_grad=True)
    optimizer.load_state_dict(saved.state_dict())
    error = optimizer.state[loader]["error"]
    assert torch.equal(error, saved.state_dict()["state"][0]["error"].float())
    loader.grad = torch.randn(12, 20)
    optimizer.step()
    assert loader.grad is optimizer.state[loader]["error"]


def test_settings_that_do_not_fit_are_refused() -> None:
    param = nn.Parameter(torch.zeros(12, 20))
    half = nn.Parameter(torch.zeros(12, 20, dtype=torch.float16))
    brief = nn.Parameter(torch.zeros(12, 20, dtype=torch.bfloat16))
    for params, options, message in (
        ([param], {"error_feedback": False}, "error_feedback=False"),
        ([param], {"error_dtype": "bfloat16"}, "error_dtype='bfloat16'"),
        ([half], {}, "float16"),
        ([brief], {"error_dtype": "int8"}, "error_dtype='int8'"),
        ([half], {"error_dtype": "float32"}, "float16"),
        ([param], {"process_group": object()}, "process_group="),
        ([param], {"error_in_grad": 1}, "expected True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            LDAdamW(params, rank=4, **{"error_in_grad": True, **options})
    LDAdamW([param], rank=4, error_in_grad=True, error_dtype="float32")
    optimizer = LDAdamW([param], rank=4, error_in_grad=True)
    with pytest.raises(ValueError, match="float16"):
        optimizer.add_param_group({"params": [half]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [half], "enable_lowrank": False})
    alone = LDAdamW([nn.Parameter(torch.zeros(12, 20))], rank=4, error_in_grad=True)
    without = LDAdamW([nn.Parameter(torch.zeros(12, 20))], rank=4, error_feedback=False)
    with pytest.raises(ValueError, match=r"of the saved state .* error_feedback=False"):
        alone.load_state_dict(without.state_dict())
    assert alone.param_groups[0]["error_feedback"]
    with pytest.raises(ValueError, match="without process_group=, replicate_mesh= and error_in_grad"):
        optimizer.attach_partitions([])
