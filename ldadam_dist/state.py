"""The state of a parameter, and the matrices that a step sees in it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.buckets import Matrix
from ldadam_dist.entries import Entry
from ldadam_dist.layout import MatrixLayout
from ldadam_dist.rules import compute_dtype, state_shapes, stored_error_dtype


def init_state(entry: Entry, state: dict[str, Any]) -> None:
    """Create what is missing of a parameter's state, without a gradient too: checkpoints want it for every one."""
    param, group = entry.param, entry.group
    shapes = state_shapes(param.shape, group)
    if not state:
        state["step"] = torch.zeros(shapes["step"], dtype=torch.float32, device="cpu")  # whatever the defaults
        if entry.matrices is None:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        else:
            for key, part in (("exp_avg", "moments"), ("exp_avg_sq", "moments"), ("projector", "projector")):
                dtype = compute_dtype(param.dtype)
                state[key] = entry.adapter.new_state(param, shapes[key], part, entry.side, dtype)
    if entry.matrices is not None and group["error_feedback"] and "error" not in state:
        dtype = stored_error_dtype(param.dtype, group["error_dtype"])
        state["error"] = entry.adapter.new_state(param, shapes["error"], "error", entry.side, dtype)


def matrices_here(entry: Entry, state: dict[str, Any], layout: MatrixLayout) -> list[Matrix]:
    """Views of the matrices of a parameter that lie on this process, transposed for a right projection."""
    local = entry.adapter.local

    def stack(tensor: Tensor) -> Tensor:
        if tensor.ndim == 2:
            return tensor.unsqueeze(0)
        return tensor if entry.stacked else tensor.reshape(1, len(tensor), math.prod(tensor.shape[1:]))

    def oriented(tensor: Tensor) -> Tensor:
        return stack(tensor) if entry.side == "left" else stack(tensor).mT

    grads = oriented(entry.grad)[..., slice(*layout.slice_in_weight)]
    weights = oriented(local(entry.param))
    errors = oriented(local(state["error"])) if entry.group["error_feedback"] else None
    projectors, moments, squares = (stack(local(state[key])) for key in ("projector", "exp_avg", "exp_avg_sq"))
    return [
        Matrix(
            layout=layout,
            grad=grads[i],
            weight=weights[i],
            error=errors[i] if errors is not None else None,
            projector=projectors[i],
            exp_avg=moments[i],
            exp_avg_sq=squares[i],
        )
        for i in range(entry.held[1] - entry.held[0])
    ]
