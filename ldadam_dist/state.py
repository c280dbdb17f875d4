"""The state of a parameter, and the matrices that a step sees in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.adapters import on_mesh
from ldadam_dist.buckets import Matrix
from ldadam_dist.entries import Entry
from ldadam_dist.fragments import CutMatrix
from ldadam_dist.layout import MatrixLayout
from ldadam_dist.quantized import FORMATS, Quantized
from ldadam_dist.rules import compute_dtype, state_shapes, stored_error_dtype, stored_state_dtype
from ldadam_dist.runtime import joined, mean_slice

PARTS = {"projector": "projector", "exp_avg": "moments", "exp_avg_sq": "moments", "error": "error"}
"""How each state of a matrix is cut; see the adapters' `new_state`."""

SCALE = "error_scale"
"""Beside an "error" of codes, their scales; both are plain tensors, of this process's part. No state dict has it."""


def stored_shapes(entry: Entry) -> dict[str, tuple[int, ...]]:
    """Shapes that the states of a parameter have on this process, of an error also where there is none."""
    side = entry.side if entry.matrices else ""
    return {
        key: shape if key == "step" else entry.adapter.state_shape(shape, PARTS[key], side)
        for key, shape in state_shapes(entry.shape, entry.group).items()
    }


def check_places(entry: Entry, saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError if what is to be loaded was saved of another process or layout."""
    if on_mesh(entry.adapter):
        side = entry.side if entry.matrices else ""
        for key, state in saved.items():
            part = PARTS.get(key) if entry.matrices else None
            entry.adapter.check_stored(f"the saved {key!r} of parameter {entry.name}", state, entry.param, part, side)


def step_device(entry: Entry) -> torch.device:
    """Where `step` is kept: on the CPU, unless steps are captured, of which the host sees nothing."""
    return entry.param.device if entry.group["capturable"] else torch.device("cpu")


def init_state(entry: Entry) -> None:
    """Create what is missing of a parameter's state, without a gradient too: checkpoints want it for every one."""
    if not entry.present:
        return
    param, adapter, group, state = entry.param, entry.adapter, entry.group, entry.state
    shapes, dtype = state_shapes(entry.shape, group), _state_dtype(entry)
    made: dict[str, Tensor] = {}
    if not state:
        made["step"] = torch.zeros(
            shapes["step"], dtype=torch.float32, device=step_device(entry)
        )  # whatever the default
        if entry.matrices is None:
            made["exp_avg"], made["exp_avg_sq"] = adapter.new_moment(param, dtype), adapter.new_moment(param, dtype)
        else:
            for key in ("exp_avg", "exp_avg_sq", "projector"):
                made[key] = adapter.new_state(param, shapes[key], PARTS[key], entry.side, dtype)
    if entry.matrices is not None and group["error_feedback"] and "error" not in state:
        if group["error_dtype"] in FORMATS:
            made["error"], made[SCALE] = _new_codes(entry)
        else:
            error_dtype = stored_error_dtype(param.dtype, group["error_dtype"])
            if adapter.sync is not None:
                local = adapter.local_shape(shapes["error"], _error_part(entry), entry.side)
                made["error"] = torch.zeros(local, dtype=error_dtype, device=adapter.local(param).device)
            else:
                made["error"] = adapter.new_state(param, shapes["error"], "error", entry.side, error_dtype)
    state.update(made)  # at once: memory may have run out before


def decoded(entry: Entry, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state as a state dict has it: with an error of floating numbers, laid out like one that is stored so.

    Collective, if replicas have errors of their own: it is their mean, which is all that decides on the next steps.
    """
    axis = entry.adapter.sync
    if SCALE not in state and (axis is None or entry.matrices is None or "error" not in state):
        return dict(state)
    local = floating_error(entry, state)
    if axis is not None:
        dtype = compute_dtype(entry.param.dtype)
        local = _along_kept(entry, local, lambda rows: mean_slice(rows.to(dtype), axis).to(local.dtype))
    shape = state_shapes(entry.shape, entry.group)["error"]
    error = entry.adapter.as_state(local, entry.param, shape, "error", entry.side)
    return {key: error if key == "error" else value for key, value in state.items() if key != SCALE}


def floating_error(entry: Entry, state: Mapping[str, Any]) -> Tensor:
    """This process's part of an error, as floating numbers."""
    if SCALE not in state:
        return entry.adapter.local(state["error"])
    shape = local_error_shape(entry)
    codes = Quantized(state["error"].flatten(0, -2), state[SCALE].flatten(0, -2), shape[-1], first=first_column(entry))
    dtype = stored_error_dtype(entry.param.dtype, codes.format.name)
    return codes.to(device=state["error"].device, dtype=dtype).view(shape)


def own_error(entry: Entry) -> Tensor:
    """The errors of all replicas that have their own, as a DTensor (replicas, ...) of floating numbers."""
    assert on_mesh(entry.adapter)
    shape = state_shapes(entry.shape, entry.group)["error"]
    return entry.adapter.as_own(floating_error(entry, entry.state).contiguous(), shape, entry.side)


def check_own(entry: Entry, saved: Tensor) -> None:
    """Raise ValueError if the errors of replicas that are to be loaded are not as `own_error` gives them."""
    assert on_mesh(entry.adapter)
    entry.adapter.check_own(f"the saved own error of parameter {entry.name}", saved, entry.side)


def stored(entry: Entry, state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a state dict in the form in which this parameter's group keeps them, without `step`.

    Collective, if replicas have errors of their own: each starts with the mean.
    """
    kept = {key: v.to(device=entry.param.device) for key, v in state.items() if isinstance(v, Tensor) and key != "step"}
    for key in kept.keys() & {"exp_avg", "exp_avg_sq", "projector"}:
        kept[key] = kept[key].to(_state_dtype(entry))
    if "error" in kept:
        axis = entry.adapter.sync
        if axis is not None:
            local, length = entry.adapter.local(kept["error"]), entry.layout().n_local
            kept["error"] = _along_kept(entry, local, lambda rows: joined(rows, axis, length))
        kept.update(stored_error(entry, kept["error"]))
    return kept


def stored_error(entry: Entry, error: Tensor) -> dict[str, Tensor]:
    """An error of floating numbers in the form in which this parameter's group keeps it."""
    if entry.group["error_dtype"] not in FORMATS:
        return {"error": error.to(stored_error_dtype(entry.param.dtype, entry.group["error_dtype"]))}
    local, (codes, scales) = entry.adapter.local(error), _new_codes(entry)
    made = Quantized(codes.flatten(0, -2), scales.flatten(0, -2), local.shape[-1], first=first_column(entry))
    made.load(local.reshape(-1, local.shape[-1]))
    return {"error": codes, SCALE: scales}


def _along_kept(entry: Entry, error: Tensor, exchange: Callable[[Tensor], Tensor]) -> Tensor:
    """An error (..., rows, columns) after an exchange of (1, ., n), the kept dimension last; any may be empty."""
    oriented = error.mT if entry.side == "right" else error
    found = exchange(oriented.flatten(0, -2)[None].contiguous())
    found = found.view(*oriented.shape[:-1], found.shape[-1])
    return (found.mT if entry.side == "right" else found).contiguous()


def _error_part(entry: Entry) -> str:
    """How the error is cut, as the adapters call it."""
    return "error" if entry.adapter.sync is None else "own error"


def local_error_shape(entry: Entry) -> tuple[int, ...]:
    """Shape of what this process holds of the error."""
    shape = state_shapes(entry.shape, entry.group)["error"]
    return entry.adapter.local_shape(shape, _error_part(entry), entry.side)


def first_column(entry: Entry) -> int:
    """Where this process's part of the error begins in the rows of the parameter."""
    layout = entry.layout()
    return (layout.n_range if entry.side == "left" else layout.m_range)[0]


def _state_dtype(entry: Entry) -> torch.dtype:
    """dtype of projector and moments."""
    return stored_state_dtype(entry.param.dtype, entry.group["state_dtype"], entry.matrices is not None)


def _new_codes(entry: Entry) -> tuple[Tensor, Tensor]:
    """Codes and scales of an error of zeros, of this process's part."""
    form = FORMATS[entry.group["error_dtype"]]
    codes, scales = form.shapes(local_error_shape(entry), first_column(entry))
    device = entry.adapter.local(entry.param).device
    return torch.zeros(codes, dtype=form.dtype, device=device), torch.zeros(scales, dtype=torch.uint8, device=device)


def matrices_here(entry: Entry, layout: MatrixLayout) -> list[Matrix]:
    """Views of the matrices of a parameter that lie on this process, transposed for a right projection."""
    local, columns = entry.adapter.local, slice(*layout.slice_in_weight)
    weight, stochastic = local(entry.param), entry.group["stochastic_rounding"]

    def each(tensor: Tensor) -> Sequence[Tensor]:
        if entry.stacked:
            return tensor.unbind()
        return [tensor if tensor.ndim == 2 else tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))]

    def oriented(tensor: Tensor) -> list[Tensor]:
        return [matrix if entry.side == "left" else matrix.mT for matrix in each(tensor)]

    factors = [each(local(entry.state[key])) for key in ("projector", "exp_avg", "exp_avg_sq")]
    errors: Sequence[Tensor | Quantized | None] = [None] * len(factors[0])
    if entry.group["error_feedback"] and SCALE in entry.state:
        length, first = local_error_shape(entry)[-1], first_column(entry)
        pairs = zip(each(entry.state["error"]), each(entry.state[SCALE]), strict=True)
        errors = [Quantized(codes, scales, length, entry.side == "right", first) for codes, scales in pairs]
    elif entry.group["error_feedback"]:
        errors = oriented(local(entry.state["error"]))
    if entry.adapter.cut is not None:  # a single matrix, whose rows are completed in the step
        (projector,), (exp_avg,), (exp_avg_sq,) = factors
        stored = (entry.grad, weight, errors[0], projector, exp_avg, exp_avg_sq)
        cut, right = entry.adapter.cut, entry.side == "right"
        return [CutMatrix(layout, *stored, cut=cut, transposed=right, elements=weight, stochastic=stochastic)]
    weights = oriented(weight)
    grads = [None] * len(weights) if entry.accumulated else [grad[:, columns] for grad in oriented(entry.grad)]
    return [
        Matrix(layout, *tensors, stochastic=stochastic)
        for tensors in zip(grads, weights, errors, *factors, strict=True)
    ]
