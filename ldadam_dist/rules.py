"""Which parameters are low-rank matrices, and which of their sides is projected.

Every answer follows from the **global** shape and the group's settings alone, never from the shard a process holds:
ranks that disagree here would wait for each other forever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

PROJ_TYPES: tuple[str, ...] = ("std", "reverse_std", "left", "right")
"""Accepted values of `proj_type`; see `projected_side`."""

PROJ_METHODS: tuple[str, ...] = ("power_iteration", "svd", "svd_lowrank")
"""Accepted values of `proj_method`: how the projector of the next step is found."""

QUANTIZED = ("int8", "int4")
"""Values of `error_dtype` that store it in blocks; see `quantized`."""

DEFAULT_RANK = 16
"""Directions kept of a matrix where nobody says otherwise."""

Side = Literal["left", "right"]
"""The projected side of a matrix: "left" its rows, "right" its columns."""


def projected_side(shape: Sequence[int], proj_type: str) -> Side:
    """Side of a matrix that is projected.

        "std"          the smaller dimension: rows when rows ≤ columns
        "reverse_std"  the larger dimension:  rows when rows ≥ columns
        "left"         the rows
        "right"        the columns

    Args:
        shape: (rows, columns), the global shape.
        proj_type: one of `PROJ_TYPES`.
    Returns:
        "left" when the rows are projected (projector of rows × r), "right" when the columns are (columns × r).
    """
    if len(shape) != 2:
        raise ValueError(f"only a matrix has a projected side, found shape {tuple(shape)}. Give it to AdamW.")
    rows, columns = shape
    if proj_type == "std":
        return "left" if rows <= columns else "right"
    if proj_type == "reverse_std":
        return "left" if rows >= columns else "right"
    if proj_type == "left":
        return "left"
    if proj_type == "right":
        return "right"
    raise ValueError(f"proj_type={proj_type!r} is unknown. Choose one of {', '.join(map(repr, PROJ_TYPES))}.")


def oriented_shape(shape: Sequence[int], proj_type: str) -> tuple[int, int]:
    """(m, n) of a matrix: its projected and its kept dimension.

    Args:
        shape: (rows, columns), the global shape.
        proj_type: one of `PROJ_TYPES`.
    Returns:
        (rows, columns) when the rows are projected, (columns, rows) otherwise.
    """
    rows, columns = shape
    return (rows, columns) if projected_side(shape, proj_type) == "left" else (columns, rows)


def global_shape(param: torch.Tensor) -> tuple[int, ...]:
    """Shape of a parameter over all ranks; DeepSpeed's ZeRO-3 empties the parameter itself and keeps it aside."""
    return tuple(getattr(param, "ds_shape", param.shape))


def matrices_of(shape: Sequence[int], flatten: bool = False) -> tuple[int, int, int] | None:
    """The equal matrices that a parameter is made of.

        (rows, columns)             one matrix
        (number, rows, columns)     a stack of matrices, as of experts
        (rows, ...) with `flatten`  one matrix (rows, product of the rest), as of a convolution

    Args:
        shape: the global shape.
        flatten: the group's setting; it concerns parameters of three dimensions or more.
    Returns:
        (number, rows, columns), or None if the parameter is no matrix.
    """
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if len(shape) > 2 and flatten:
        return 1, shape[0], math.prod(shape[1:])
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return None


def is_low_rank(shape: Sequence[int], rank: int, enable_lowrank: bool = True, flatten: bool = False) -> bool:
    """Whether a parameter is stepped by LDAdam; every other one is stepped by AdamW.

    A projection onto `rank` directions saves something only for a matrix that is larger than that in both dimensions.

    Args:
        shape: the global shape.
        rank: r, the number of directions kept of each matrix.
        enable_lowrank, flatten: the group's settings.
    """
    matrices = matrices_of(shape, flatten)
    return enable_lowrank and matrices is not None and matrices[0] > 0 and 0 < rank < min(matrices[1:])


def low_rank_matrices(shape: Sequence[int], group: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """(number, rows, columns) of the matrices that LDAdam steps in a parameter; None if AdamW steps it.

    Args:
        shape: the global shape.
        group: its complete hyperparameters.
    """
    low_rank = is_low_rank(shape, group["rank"], group["enable_lowrank"], group["flatten"])
    return matrices_of(shape, group["flatten"]) if low_rank else None


def state_shapes(shape: Sequence[int], group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Global shapes of a parameter's state, of an error also where there is none.

        AdamW               step (); exp_avg and exp_avg_sq like the parameter
        matrix              step (); projector (m, r); exp_avg and exp_avg_sq (r, n); error (rows, columns)
        stack of matrices   the same, with their number in front, `step` too

    Args:
        shape: the parameter's global shape.
        group: its complete hyperparameters.
    """
    matrices, rank = low_rank_matrices(shape, group), group["rank"]
    if matrices is None:
        return {"step": (), "exp_avg": tuple(shape), "exp_avg_sq": tuple(shape)}
    number = matrices[:1] if len(shape) > 2 and not group["flatten"] else ()
    m, n = oriented_shape(matrices[1:], group["proj_type"])
    return {
        "step": number,
        "projector": (*number, m, rank),
        "exp_avg": (*number, rank, n),
        "exp_avg_sq": (*number, rank, n),
        "error": (*number, *matrices[1:]),
    }


def learning_rate(group: Mapping[str, Any]) -> float | Tensor:
    """What a step of a group takes: lr · lr_scale; a tensor, on its device, where `lr` is one.

    Only groups that were given an `lr_scale` have it: torch.distributed.checkpoint loads no group with a key more than
    was saved.
    """
    rate: float | Tensor = group["lr"] * group.get("lr_scale", 1.0)
    return rate


def unprojected(groups: Sequence[Mapping[str, Any]]) -> list[bool]:
    """For each group as the user wrote it, whether AdamW steps it because others alone ask for a projection.

    As in GaLore's groups, [{"params": rest}, {"params": matrices, "rank": 128}].
    """
    ranked = any("rank" in group for group in groups)
    return [ranked and not group.keys() & {"rank", "enable_lowrank", "flatten", "proj_type"} for group in groups]


def compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """dtype of the mathematics: float64 for float64 parameters, else float32."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


def stored_state_dtype(param_dtype: torch.dtype, state_dtype: str | None, low_rank: bool) -> torch.dtype:
    """dtype in which projector and moments are stored.

    Args:
        param_dtype: the parameter's.
        state_dtype: the setting; None for the dtype of the mathematics, or for AdamW the parameter's own.
        low_rank: whether the parameter is projected.
    """
    if state_dtype is None:
        return compute_dtype(param_dtype) if low_rank else param_dtype
    return _dtype_of(state_dtype)


def stored_error_dtype(param_dtype: torch.dtype, error_dtype: str | None) -> torch.dtype:
    """dtype of the error in a state dict, which is that in which it is stored; of one in 8 or 4 bits, bfloat16.

    Args:
        param_dtype: the parameter's.
        error_dtype: the setting; None for the parameter's own, but float32 for float16, which an accumulated error
            may overflow.
    """
    if error_dtype is None:
        return torch.float32 if param_dtype == torch.float16 else param_dtype
    return torch.bfloat16 if error_dtype in QUANTIZED else _dtype_of(error_dtype)


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """A dtype as text, which is how settings keep it: plain data for checkpoints."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
