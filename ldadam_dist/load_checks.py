"""What is checked of a state dict before anything of it is loaded: its form, its groups, and what a step needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ldadam_dist import arguments
from ldadam_dist.entries import Entry
from ldadam_dist.state import SCALE

STORAGE = ("error_dtype", "state_dtype", "stochastic_rounding", "capturable", "metrics_every")
"""Settings of a group that say how its states are stored or looked at: a checkpoint has the states of any, and changes
none."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_form(state_dict: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if this is not {"state": {...}, "param_groups": [{"params": [...]}, ...]}.

    Args:
        state_dict: what is to be loaded.
        groups: the optimizer's. An engine may have put a flat tensor in the place of parameters, whose names stay.
    """
    kinds = (("state", Mapping), ("param_groups", Sequence))
    if not isinstance(state_dict, Mapping) or not all(isinstance(state_dict.get(key), kind) for key, kind in kinds):
        found = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(f"the state dict is {found}: expected 'state' and 'param_groups', as state_dict() gives them.")
    flattened = any(len(group.get("param_names", group["params"])) != len(group["params"]) for group in groups)
    seen: set[Any] = set()
    for number, group in enumerate(state_dict["param_groups"]):
        params = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(params, Sequence):
            raise ValueError(f"group {number} of the saved state has no list 'params': expected that of state_dict().")
        names = group.get("param_names", params)
        mine = groups[number] if number < len(groups) else {}
        if len(names) != len(params) and not flattened and not names_of_more(group, mine):
            raise ValueError(
                f"group {number} of the saved state has {len(names)} 'param_names' for {len(params)} 'params': "
                f"expected one for each. Save state_dict() again."
            )
        for param in params:
            if param in seen:
                raise ValueError(
                    f"group {number} of the saved state has {param!r} in 'params', which was there before: expected "
                    f"each parameter once. Save state_dict() again."
                )
            seen.add(param)


def names_of_more(saved: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether a saved group has the names of these parameters and of others that were in one group with them.

    torch's flattened state dicts keep a group's settings by parameter, so that it can be taken apart.
    """
    names = group.get("param_names")
    return (
        names is not None
        and len(names) == len(saved["params"]) == len(group["params"])
        and set(names) < set(saved.get("param_names", ()))
    )


def checked_group(
    number: int, saved: Mapping[str, Any], group: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """A saved group as it is loaded: complete, as one that was saved by an earlier version has not all keys.

    Args:
        number: of the group.
        saved: as it was saved.
        group: the optimizer's, which says what shapes states have, and how they are stored.
        defaults: of the optimizer.
    Raises:
        ValueError: a setting that the optimizer would not take.
    """
    made = {key: value for key, value in defaults.items() if key != "differentiable"}
    made |= {key: group[key] for key in arguments.FIXED}
    made |= saved
    made |= {key: group[key] for key in STORAGE}
    try:
        for key in ("maximize", "amsgrad"):
            if made.get(key):
                raise ValueError(f"{key}={made[key]!r}: LDAdamW has no such option.")
        arguments.check_settings(made)
    except ValueError as error:
        raise ValueError(f"group {number} of the saved state has {error} Nothing was loaded.") from None
    arguments.plain_numbers(made)
    if isinstance(made["lr"], Tensor) and isinstance(group["lr"], Tensor):
        made["lr"] = made["lr"].to(group["lr"].device)  # where a graph reads it
    return made


def with_step(name: str, state: Any) -> dict[str, Any]:
    """A saved state, whose step may be a plain number as with torch's optimizers, with a tensor of float32.

    Raises:
        ValueError: no state, or a step that is none.
    """
    if not isinstance(state, Mapping):
        raise ValueError(
            f"the saved state of parameter {name} is a {type(state).__name__}: expected a dict of tensors, as "
            f"state_dict() gives it."
        )
    if "step" not in state:
        return dict(state)
    step = state["step"]
    if type(step) is not bool and isinstance(step, Real):
        step = torch.tensor(float(step), device="cpu")
    if not isinstance(step, Tensor) or step.is_meta or step.is_complex() or step.dtype == torch.bool:
        raise ValueError(f"the saved 'step' of parameter {name} is {step!r}: expected a number ≥ 0, or a tensor of it.")
    step = getattr(step, "to_local", lambda: step)().float()
    values = step.reshape(-1).tolist()
    wrong = [value for value in values if not 0 <= value < math.inf or value != int(value)]
    if wrong:
        raise ValueError(
            f"the saved 'step' of parameter {name} is {wrong[0]}: expected how many steps it has taken, a whole number "
            f"≥ 0. Load another checkpoint."
        )
    return {**state, "step": step}


def check_values(name: str, entry: Entry, state: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise ValueError for saved tensors from which no step can go on.

    Args:
        name: how messages call the parameter.
        entry: the parameter.
        state: its saved state.
        keys: the states that it has here.
    """
    strange = [key for key in ("projector", "error") if key in state and key not in keys]
    if strange:
        raise ValueError(
            f"the state of parameter {name} has {strange[0]!r}, which only a matrix that is projected has: this "
            f"optimizer steps it by AdamW. Build the optimizer with the groups that the state was saved with."
        )
    if SCALE in state and state[SCALE] != {}:  # which torch puts for what a flattened state dict does not have
        raise ValueError(
            f"the state of parameter {name} has {SCALE!r}: expected floating errors and no scales, as state_dict() "
            f"gives them. Save state_dict(), not state."
        )
    for key in keys:
        if key == "step" or key not in state:
            continue
        tensor = state[key]
        if not tensor.is_floating_point() or tensor.is_meta or tensor.layout is not torch.strided:
            where = " on the meta device" if tensor.is_meta else ""
            raise ValueError(
                f"the saved {key!r} of parameter {name} has dtype {tensor.dtype} and layout {tensor.layout}{where}: "
                f"expected dense floating numbers, as state_dict() gives them."
            )
        if key in _MOMENTS and entry.matrices is None and hasattr(tensor, "placements") != _is_dtensor(entry.param):
            was, keeps = ("whole", "shards of it") if _is_dtensor(entry.param) else ("in shards", "it whole")
            raise ValueError(
                f"the saved {key!r} of parameter {name} was saved {was}, this optimizer keeps {keeps}. Load it with "
                f"torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which converts."
            )
        local = getattr(tensor, "to_local", lambda kept=tensor: kept)().detach()
        if not local.numel():
            continue
        low, high = (float(value) for value in torch.aminmax(local if local.element_size() > 1 else local.float()))
        least = 0.0 if key == "exp_avg_sq" else -math.inf
        if not (math.isfinite(low) and math.isfinite(high) and low >= least):
            bound = "numbers ≥ 0" if key == "exp_avg_sq" else "finite numbers"
            raise ValueError(
                f"the saved {key!r} of parameter {name} has values from {low} to {high}: expected {bound}. Load an "
                f"earlier checkpoint."
            )


def check_own_errors(errors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError if saved errors of replicas are not of the parameters and replicas that there are."""
    if errors and not expected:
        raise ValueError("there are no errors to replace yet: expected load_state_dict before load_own_errors.")
    for name in expected.keys() | errors.keys():
        found, mine = (tuple(some[name].shape) if name in some else "nothing" for some in (errors, expected))
        if found != mine:
            raise ValueError(
                f"the saved errors of replicas have {found} for parameter {name}: expected {mine}. Those of "
                f"another number of replicas cannot be loaded: load_state_dict alone goes on from their mean."
            )


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")
