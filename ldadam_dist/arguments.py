"""Checks of hyperparameters and parameter groups. Every error says what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.rules import PROJ_METHODS, PROJ_TYPES, QUANTIZED, global_shape, low_rank_matrices, matrices_of

PROJECTOR_INITS = ("auto", "svd", "randomized")

STATE_DTYPES = ("float64", "float32", "bfloat16")

ERROR_DTYPES = (*STATE_DTYPES, *QUANTIZED)

COMMUNICATIONS = ("auto", "lowrank", "gather")

GROUP_KEYS = (
    "params param_names lr lr_scale betas eps weight_decay rank rho proj_type proj_method error_feedback "
    "projector_init error_dtype state_dtype stochastic_rounding flatten communication enable_lowrank capturable "
    "metrics_every"
).split()

FIXED = ("rank", "proj_type", "flatten", "enable_lowrank")
"""Settings that fix the shapes of states."""

_FOREIGN = {
    "update_proj_gap": "LDAdam refreshes its subspace at every step, so there is no gap between updates to set",
    "scale": "LDAdam's update needs no extra scale: its error feedback gives back what the projection lost",
    "scale_type": "LDAdam's update needs no extra scale",
    "scale_front": "LDAdam's update needs no extra scale",
    "proj": "the projection is chosen with proj_type and proj_method",
    "svd_gap": "LDAdam refreshes its subspace at every step, so there is no gap between updates to set",
}


_TORCH_OPTIONS = ("maximize", "amsgrad", "foreach", "fused", "differentiable")
_ALIASES = {
    "projection_type": "proj_type",
    "type": "proj_type",
    "lowrank": "enable_lowrank",
    "low_rank": "enable_lowrank",
}


_VOCABULARY = {"lm_head", "head", "wte", "wpe", "classifier", "embed_out", "output_projection"}
_WHOLE_MODEL = 8
"""So many matrices in one list are a model."""


def refuse_foreign(keys: Sequence[str]) -> None:
    """Raise ValueError for arguments of GaLore or APOLLO, with a hint how LDAdam differs."""
    for key in keys:
        if key in _FOREIGN:
            raise ValueError(f"{key!r} is an argument of GaLore or APOLLO, not of LDAdamW: {_FOREIGN[key]}. Remove it.")


def check_window(window_elements: object) -> None:
    """Raise ValueError if the window of matrices in flight is not a positive number of elements."""
    if isinstance(window_elements, bool) or not isinstance(window_elements, Integral) or window_elements < 1:
        raise ValueError(
            f"window_elements={window_elements!r}: expected a positive integer, the elements of matrices that may be "
            f"in flight together; 2**25 take 128 MiB in float32."
        )


def checked_interval(check_replicas_every: object, replicas: object | None) -> int:
    """The interval, or ValueError if it is not a number of steps, or there are no replicas to look at."""
    every = check_replicas_every
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 0 or (every and replicas is None):
        raise ValueError(
            f"check_replicas_every={every!r}: expected a number of steps, 0 for none, and replicas to compare, "
            f"those of process_group= or replicate_mesh=."
        )
    return int(every)


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a hyperparameter of a complete parameter group that is out of its range."""
    refuse_foreign(list(group))
    for key in group.keys() - set(GROUP_KEYS):  # any other key is the user's own, as in torch
        if key in _TORCH_OPTIONS and group[key]:
            raise ValueError(f"{key}={group[key]!r} in a parameter group: LDAdamW has no such option. Remove it.")
        near = [_ALIASES[key]] if key in _ALIASES else difflib.get_close_matches(key, GROUP_KEYS, n=1, cutoff=0.8)
        if near and near[0] not in ("params", "param_names") and not key.startswith(f"{near[0]}_"):
            raise ValueError(f"unknown key {key!r} in a parameter group; did you mean {near[0]!r}?")
    check_settings(group)


def check_settings(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a value of a complete parameter group that is out of its range."""
    _check_number("lr", group["lr"], 0.0, math.inf, tensor=True)
    for key, value in (("lr_scale", group.get("lr_scale", 1.0)), *((k, group[k]) for k in ("eps", "weight_decay"))):
        _check_number(key, value, 0.0, math.inf)
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas={betas!r}: expected two numbers in [0, 1), such as (0.908, 0.99).")
    for i, beta in enumerate(betas):
        _check_number(f"betas[{i}]", beta, 0.0, 1.0, tensor=True)
    _check_number("rho", group["rho"], 0.0, 1.0)
    every = group["metrics_every"]
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 0:
        raise ValueError(f"metrics_every={every!r}: expected after how many steps to measure one; 0 for none.")
    rank = group["rank"]
    if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
        raise ValueError(f"rank={rank!r}: expected a positive integer, the number of directions kept of each matrix.")
    _check_choice("proj_type", group["proj_type"], PROJ_TYPES)
    _check_choice("proj_method", group["proj_method"], PROJ_METHODS)
    _check_choice("projector_init", group["projector_init"], PROJECTOR_INITS)
    for key, choices in (("error_dtype", ERROR_DTYPES), ("state_dtype", STATE_DTYPES)):
        if group[key] is not None:
            _check_choice(key, group[key], choices)
    _check_choice("communication", group["communication"], COMMUNICATIONS)
    for key in ("error_feedback", "stochastic_rounding", "flatten", "enable_lowrank", "capturable"):
        if not isinstance(group[key], bool):
            raise ValueError(f"{key}={group[key]!r}: expected True or False.")


def check_params(named: Sequence[tuple[str, Tensor]], group: Mapping[str, Any], low_rank_required: bool) -> None:
    """Raise ValueError for a parameter that cannot be stepped.

    Args:
        named: (name, parameter) pairs of the group.
        group: its complete hyperparameters.
        low_rank_required: the caller set enable_lowrank=True on this group, so that a matrix must fit its rank.
    """
    for name, param in named:
        if is_fsdp1_flat(param):
            raise ValueError(
                f"parameter {name} is a flat parameter of FullyShardedDataParallel (FSDP1), which cuts matrices into "
                f"1-D pieces. Shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead."
            )
        if not param.requires_grad:
            continue
        if param.is_complex():
            raise ValueError(f"parameter {name} has dtype {param.dtype}: expected a real floating dtype.")
        shape = global_shape(param)
        matrices = matrices_of(shape, group["flatten"])
        if low_rank_required and matrices and group["rank"] >= min(matrices[1:]):
            raise ValueError(
                f"rank={group['rank']} does not fit parameter {name} of shape {shape}: a projection of "
                f"{matrices[1]} × {matrices[2]} keeps fewer than {min(matrices[1:])} directions. "
                f"Lower rank, or set enable_lowrank=False for its group."
            )


def warn_whole_model(named: Sequence[tuple[str, Tensor]], group: Mapping[str, Any]) -> None:
    """Warn if a group that says nothing of a projection seems to hold a model's embeddings or head, which suffer by it.

    Bare parameters do not tell what they are: a shape that is rare among many, or a very long one, is a vocabulary's.
    """
    shapes = {name: global_shape(param) for name, param in named if param.requires_grad}
    matrices = {name: low_rank_matrices(shape, group) for name, shape in shapes.items()}
    projected = {name: found for name, found in matrices.items() if found}
    suspects = [name for name in projected if set(name.lower().split(".")) & _VOCABULARY or "embed" in name.lower()]
    suspects += [name for name, (_, m, n) in projected.items() if max(m, n) >= max(1024, 16 * min(m, n))]
    if len(projected) >= _WHOLE_MODEL:  # layers repeat their shapes, an embedding and a head do not
        counts = Counter(shapes[name] for name in projected)
        suspects += [name for name in projected if counts[shapes[name]] <= 2]
    if not suspects:
        return
    example = suspects[0]
    warnings.warn(
        f"LDAdamW projects all {len(projected)} matrices of a group that says nothing of a projection, such as "
        f"{example} of shape {shapes[example]}: embeddings and heads among them train clearly worse so. "
        f"Give LDAdamW(build_param_groups(model)), which has AdamW step them, or say what you want: rank= or "
        f"enable_lowrank= in the group.",
        stacklevel=2,
    )


def check_grad(name: str, param: Tensor) -> None:
    """Raise ValueError for a parameter or a gradient that cannot be used."""
    if param.is_meta:
        raise ValueError(
            f"parameter {name} is on the meta device: expected one with values. to_empty() makes new parameters, so "
            f"build the optimizer after it."
        )
    if param.grad is not None and param.grad.layout is not torch.strided:
        raise ValueError(
            f"the gradient of parameter {name} has layout {param.grad.layout}: expected a dense gradient. "
            f"Use sparse=False in the embedding."
        )
    mesh, other = getattr(param, "device_mesh", None), getattr(param.grad, "device_mesh", None)
    if param.grad is not None and mesh != other:
        raise ValueError(
            f"the gradient of parameter {name} lies on {other or 'no mesh'}, the parameter on {mesh or 'no mesh'}: "
            f"expected one mesh. Redistribute the gradient before step()."
        )


def check_storage(name: str, local: Tensor, flatten: bool) -> None:
    """Raise ValueError if a parameter's storage on this process cannot be seen as a matrix.

    Args:
        name: how errors call the parameter.
        local: its storage.
        flatten: whether it is seen as one matrix (shape[0], rest).
    """
    if flatten and local.ndim > 2 and not local.is_contiguous():
        raise ValueError(
            f"parameter {name} of shape {tuple(local.shape)} has strides {local.stride()}: expected contiguous storage "
            f"to see it as a matrix (flatten=True). Convolutions in channels_last keep their weights so: use "
            f"memory_format=torch.contiguous_format for the model, or set enable_lowrank=False for its group."
        )


def check_unchanged(name: str, low_rank: bool, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise ValueError if a group's settings no longer fit the state that was made with them."""
    found = state["projector"].shape[-1] if "projector" in state else None
    expected = group["rank"] if low_rank else None
    if state and found != expected:
        raise ValueError(
            f"parameter {name} has a projector of rank {found}, its group now asks for {expected} (None: AdamW). "
            f"The rank is fixed by the first step: build a new optimizer."
        )


def check_projects(named: Sequence[tuple[str, Tensor, Mapping[str, Any]]]) -> None:
    """Raise ValueError if no parameter at all would be projected."""
    shapes = [global_shape(param) for _, param, _ in named]
    if any(low_rank_matrices(shape, group) for shape, (*_, group) in zip(shapes, named, strict=True)):
        return
    if not named:
        raise ValueError(
            "LDAdamW has nothing to train: none of its parameters requires a gradient, expected one that does. Call "
            "requires_grad_(True) on what is to be trained before the optimizer is built; others may be thawed later."
        )
    matrices = [(matrices_of(s, g["flatten"]), name, s, g) for s, (name, _, g) in zip(shapes, named, strict=True)]
    candidates = [(min(m[1:]), name, shape, group) for m, name, shape, group in matrices if m]
    if candidates:
        _, name, shape, group = max(candidates, key=lambda item: item[0])
        found = f"the largest matrix is {name} of shape {shape}, in a group with rank={group['rank']}"
        found += f" and enable_lowrank={group['enable_lowrank']}"
    else:
        found = f"none of its {len(named)} parameters is a matrix"
    raise ValueError(
        f"LDAdamW would project nothing: {found}; expected a matrix larger than its rank in both dimensions. "
        f"Lower rank or set enable_lowrank=True, or use torch.optim.AdamW. Parameters that an engine has flattened to "
        f"one dimension (FSDP1, DeepSpeed ZeRO) hide their matrices: build the optimizer before deepspeed.initialize "
        f"(docs/deepspeed.md), or shard with fully_shard."
    )


def check_state(
    name: str,
    group: Mapping[str, Any],
    saved_group: Mapping[str, Any],
    saved: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    sharded: bool,
) -> None:
    """Raise ValueError if a saved state does not belong to this parameter and group.

    Args:
        name, group: the parameter, and what this optimizer does with it.
        saved_group, saved: the saved group and state, empty if there is none.
        shapes: those of the states that this optimizer keeps here.
        sharded: whether it keeps them as DTensors.
    """
    check_saved_settings(name, group, saved_group)
    if not saved:
        return
    if "projector" in saved and hasattr(saved["projector"], "placements") != sharded:
        was, keeps = ("whole", "shards of it") if sharded else ("in shards", "it whole")
        raise ValueError(
            f"the state of parameter {name} was saved {was}, this optimizer keeps {keeps}. Load it with "
            f"torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which converts."
        )
    for key, shape in shapes.items():
        if key == "error" and key not in saved:
            continue
        is_tensor = isinstance(saved.get(key), Tensor)
        found = tuple(saved[key].shape) if is_tensor else repr(saved[key]) if key in saved else "nothing"
        if found != shape:
            raise ValueError(
                f"the saved {key!r} of parameter {name} is {found}: expected {shape}. "
                f"This state belongs to another model, to other settings or to another number of processes."
            )
    if "error" in saved and not saved["error"].is_floating_point():
        raise ValueError(
            f"the saved 'error' of parameter {name} has dtype {saved['error'].dtype}: expected floating numbers, as "
            f"state_dict() gives them; those that are stored in 8 or 4 bits it decodes. Save state_dict(), not state."
        )


def check_saved_settings(name: str, group: Mapping[str, Any], saved_group: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved group's settings are not those that fix the shape of a parameter's state."""
    for key in FIXED:
        if key in saved_group and saved_group[key] != group[key]:
            raise ValueError(
                f"the state of parameter {name} was saved with {key}={saved_group[key]!r}, this optimizer has "
                f"{key}={group[key]!r}. Build the optimizer with the saved value, or start without this state."
            )


def check_partition(saved: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError if the saved state of a flat tensor is not of the parameters that lie on this process.

    Args:
        saved: the state, by name of what is stepped; empty if there is none.
        names: of what this process takes part in.
    """
    if saved and set(saved) != set(names):
        differ = sorted(set(saved) ^ set(names))
        where = "is saved, and not" if differ[0] in saved else "is not saved, but"
        raise ValueError(
            f"the state of {differ[0]} {where} on this rank now ({len(differ)} such parameters). This checkpoint "
            f"belongs to another model, to other parameter groups or to another number of processes."
        )


def check_not_flattened(param: Tensor, same_shapes: bool) -> None:
    """Raise RuntimeError if an engine has put a flat tensor in the place of parameters, and did not say so.

    Args:
        param: what is to be stepped, and not what the optimizer was given.
        same_shapes: whether the parameters of its group have the shapes that they were given with.
    """
    if param.ndim == 1 and not same_shapes and not hasattr(param, "device_mesh"):  # DTensors are FSDP2's
        raise RuntimeError(
            f"LDAdamW was given a flat tensor of {param.numel()} elements to step in the place of its parameters, as "
            f"DeepSpeed's ZeRO makes them, and cannot see its matrices. Call "
            f"ldadam_dist.integrations.deepspeed.attach(engine) after deepspeed.initialize, or use "
            f"ldadam_dist.integrations.deepspeed.initialize, which does both."
        )


def is_fsdp1_flat(param: Tensor) -> bool:
    """Whether FSDP1 made this parameter: flat, or a view into one (use_orig_params=True)."""
    return hasattr(param, "_fsdp_flattened")


def _check_number(name: str, value: Any, low: float, high: float, tensor: bool = False) -> None:
    """Raise ValueError for what is no number in [low, high); with `tensor` it may be a tensor of one element."""
    known = isinstance(value, Real) and not isinstance(value, bool)
    if tensor and isinstance(value, Tensor):
        known = value.numel() == 1 and not (value.is_meta or value.is_complex() or value.dtype == torch.bool)
    if not known or not low <= float(value) < high:
        expected = "a number ≥ 0" if high == math.inf else f"a number in [{low:g}, {high:g})"
        if isinstance(value, Tensor):
            found = f"a tensor of shape {tuple(value.shape)}" if value.is_meta or value.numel() != 1 else repr(value)
            expected += ", or a tensor of one element" if tensor else ", not a tensor"
            raise ValueError(f"{name} is {found}: expected {expected}.")
        raise ValueError(f"{name}={value!r}: expected {expected}.")


def plain_numbers(group: dict[str, Any]) -> None:
    """Make what is a number of another library, such as numpy's, one of Python's, as checkpoints and kernels need."""
    for key in {"lr", "lr_scale", "eps", "weight_decay", "rho"} & group.keys():
        if not isinstance(group[key], (int, float, Tensor)):
            group[key] = float(group[key])
    if not all(isinstance(beta, (int, float, Tensor)) for beta in group["betas"]):
        group["betas"] = tuple(float(beta) for beta in group["betas"])
    group["rank"], group["metrics_every"] = int(group["rank"]), int(group["metrics_every"])


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.{hint}")
