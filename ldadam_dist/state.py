"""The state of a parameter, and the matrices that a step sees in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    local, columns = entry.adapter.local, slice(*layout.slice_in_weight)

    def each(tensor: Tensor) -> Sequence[Tensor]:
        if entry.stacked:
            return tensor.unbind()
        return [tensor if tensor.ndim == 2 else tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))]

    def oriented(tensor: Tensor) -> list[Tensor]:
        return [matrix if entry.side == "left" else matrix.mT for matrix in each(tensor)]

    grads, weights = oriented(entry.grad), oriented(local(entry.param))
    errors = oriented(local(state["error"])) if entry.group["error_feedback"] else [None] * len(grads)
    states = (each(local(state[key])) for key in ("projector", "exp_avg", "exp_avg_sq"))
    return [
        Matrix(layout, grad[:, columns], *rest) for grad, *rest in zip(grads, weights, errors, *states, strict=True)
    ]
