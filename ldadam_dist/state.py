"""The state of a parameter, and the matrices that a step sees in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldadam_dist.adapters import MeshAdapter
from ldadam_dist.buckets import Matrix
from ldadam_dist.entries import Entry
from ldadam_dist.fragments import CutMatrix
from ldadam_dist.layout import MatrixLayout
from ldadam_dist.rules import compute_dtype, state_shapes, stored_error_dtype

PARTS = {"projector": "projector", "exp_avg": "moments", "exp_avg_sq": "moments", "error": "error"}
"""How each state of a matrix is cut; see the adapters' `new_state`."""


def stored_shapes(entry: Entry) -> dict[str, tuple[int, ...]]:
    """Shapes that the states of a parameter have on this process, of an error also where there is none."""
    side = entry.side if entry.matrices else ""
    return {
        key: shape if key == "step" else entry.adapter.state_shape(shape, PARTS[key], side)
        for key, shape in state_shapes(entry.shape, entry.group).items()
    }


def check_places(entry: Entry, saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError if what is to be loaded was saved of another process or layout."""
    if isinstance(entry.adapter, MeshAdapter):
        side = entry.side if entry.matrices else ""
        for key, state in saved.items():
            part = PARTS.get(key) if entry.matrices else None
            entry.adapter.check_stored(f"the saved {key!r} of parameter {entry.name}", state, entry.param, part, side)


def init_state(entry: Entry) -> None:
    """Create what is missing of a parameter's state, without a gradient too: checkpoints want it for every one."""
    if not entry.present:
        return
    param, group, state = entry.param, entry.group, entry.state
    shapes = state_shapes(entry.shape, group)
    if not state:
        state["step"] = torch.zeros(shapes["step"], dtype=torch.float32, device="cpu")  # whatever the defaults
        if entry.matrices is None:
            state["exp_avg"], state["exp_avg_sq"] = entry.adapter.new_moment(param), entry.adapter.new_moment(param)
        else:
            for key in ("exp_avg", "exp_avg_sq", "projector"):
                dtype = compute_dtype(param.dtype)
                state[key] = entry.adapter.new_state(param, shapes[key], PARTS[key], entry.side, dtype)
    if entry.matrices is not None and group["error_feedback"] and "error" not in state:
        dtype = stored_error_dtype(param.dtype, group["error_dtype"])
        state["error"] = entry.adapter.new_state(param, shapes["error"], "error", entry.side, dtype)


def matrices_here(entry: Entry, layout: MatrixLayout) -> list[Matrix]:
    """Views of the matrices of a parameter that lie on this process, transposed for a right projection."""
    local, columns = entry.adapter.local, slice(*layout.slice_in_weight)
    grad, weight = entry.grad, local(entry.param)

    def each(tensor: Tensor) -> Sequence[Tensor]:
        if entry.stacked:
            return tensor.unbind()
        return [tensor if tensor.ndim == 2 else tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))]

    def oriented(tensor: Tensor) -> list[Tensor]:
        return [matrix if entry.side == "left" else matrix.mT for matrix in each(tensor)]

    factors = [each(local(entry.state[key])) for key in ("projector", "exp_avg", "exp_avg_sq")]
    errors = oriented(local(entry.state["error"])) if entry.group["error_feedback"] else [None] * len(factors[0])
    if entry.adapter.cut is not None:  # a single matrix, whose rows are completed in the step
        (projector,), (exp_avg,), (exp_avg_sq,) = factors
        stored = (grad, weight, errors[0], projector, exp_avg, exp_avg_sq)
        return [CutMatrix(layout, *stored, cut=entry.adapter.cut, transposed=entry.side == "right", elements=weight)]
    grads, weights = oriented(grad), oriented(weight)
    return [Matrix(layout, g[:, columns], *rest) for g, *rest in zip(grads, weights, errors, *factors, strict=True)]
