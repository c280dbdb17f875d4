"""What is relied on of DeepSpeed's safe_get_* and safe_set_*: the master weights are theirs, the states are not.

DeepSpeed looks for states as long as the weights on the ranks that have some of a parameter, and has the others wait.
LDAdamW's have shapes of their own: all ranks put them together where the whole is asked for, and else refuse.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.entries import Entry
from ldadam_dist.runtime import gather_objects
from ldadam_dist.state import decoded

_MOMENTS = ("exp_avg", "exp_avg_sq")
_OF_ENGINE = ("get_full_hp_param", "set_full_hp_param", "get_local_fp32_param", "set_local_hp_param")
_OF_PARAMETER = ("get_full_hp_param", "set_full_hp_param")
_SET = "ldadam_master_was_set"


def noted(setter: Callable[..., Any]) -> Callable[..., Any]:
    """One of DeepSpeed's functions that set master weights, which notes that it did; see `was_set`."""
    signature = inspect.signature(setter)

    @functools.wraps(setter)
    def note(*args: Any, **kwargs: Any) -> None:
        setter(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if given.get("optim_state_key") is None:
            setattr(given["param"] if "param" in given else given["self"], _SET, True)

    return note


def was_set(param: Any) -> bool:
    """Whether the master weights of a parameter were set, and so may be others than the engine's weights."""
    return hasattr(param, _SET)


def is_where_the_engine_writes(param: Any, start: int, master: Tensor) -> bool:
    """Whether DeepSpeed has the master weights of a parameter where they are said to be.

    Args:
        param: the engine's parameter.
        start: the first of its elements that this process has.
        master: (length,), those elements where they are said to be.
    """
    if hasattr(param, "ds_tensor"):
        found = param._z3_optimizer.get_local_fp32_param(param)[: len(master)]
        return torch.equal(found.to(master.device), master)
    mapping = param._hp_mapping
    if mapping is None or not len(master):
        return mapping is None and not len(master)
    fragment, address = mapping.get_hp_fragment(), mapping.lp_fragment_address
    return (fragment.data_ptr(), address.start, address.numel) == (master.data_ptr(), start, len(master))


def answer_for_states(zero: Any, params: Mapping[Any, str], entries: Callable[[], Iterable[Entry]]) -> None:
    """Have safe_get_full_optimizer_state give LDAdamW's states, and its kin raise RuntimeError, on all ranks.

    Args:
        zero: the engine's optimizer.
        params: the engine's parameters, with their names.
        entries: gives what the optimizer steps.
    """

    def gathered(param: Any, key: str) -> Tensor | None:
        return gathered_state(entries(), params[param], key)

    for owner, names in ((zero, _OF_ENGINE), *((param, _OF_PARAMETER) for param in params)):
        for name in names:
            method = getattr(owner, name, None)
            if method is not None and not hasattr(method, "of_ldadam"):
                setattr(owner, name, _answering(owner, method, gathered if name == "get_full_hp_param" else None))


def gathered_state(entries: Iterable[Entry], name: str, key: str) -> Tensor | None:
    """A state of a parameter, put together from the parts of all ranks; collective. None before its first step.

    Args:
        entries: what the optimizer steps.
        name: of the parameter; of a stack the matrices are `name[0]`, `name[1]` …
        key: "step", "exp_avg" or "exp_avg_sq"; of a matrix that is projected "projector" and "error" too.
    Returns:
        on each rank, of a matrix (r, n), of its projector (m, r), of its error and of other parameters their own shape.
    Raises:
        RuntimeError: there is no such state; on all ranks.
    """
    whole, stacked = [], False
    for entry in entries:
        if entry.name != name and not re.fullmatch(re.escape(name) + r"\[\d+\]", entry.name):
            continue
        keys = ("step", *_MOMENTS, *(("projector", "error") if entry.matrices else ()))
        if key not in keys:
            raise RuntimeError(
                f"DeepSpeed was asked for the optimizer state {key!r} of {name}: LDAdamW has {', '.join(keys)} of it."
            )
        (group, device), stacked = entry.adapter.groups[0], entry.name != name
        mine = decoded(entry, entry.state).get(key) if entry.state else None
        found = gather_objects(None if mine is None else mine.cpu(), group)
        parts = [part for part in found if part is not None and part.numel()]
        if not parts:
            return None
        made = parts[0] if key == "step" else torch.cat(parts, dim=int(entry.matrices is not None and key in _MOMENTS))
        whole.append((made if entry.matrices or key == "step" else made.view(entry.shape)).to(device))
    return torch.stack(whole) if stacked else whole[0]


def _answering(owner: Any, method: Callable[..., Any], answer: Callable[[Any, str], Tensor | None] | None) -> Any:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def answering(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        key = given.get("optim_state_key")
        if key is None:
            return method(*args, **kwargs)
        if answer is not None:
            return answer(given.get("param", owner), key)
        raise RuntimeError(
            f"DeepSpeed was asked to set the optimizer state {key!r} of a parameter, or for a rank's part of it: "
            f"LDAdamW keeps moments in a subspace, so no part of them is as long as that of the weight. Use "
            f"safe_get_full_optimizer_state, or engine.basic_optimizer.state, which has this rank's part under the "
            f"flat tensor and the parameter's name. Master weights and gradients are found as ever."
        )

    answering.of_ldadam = True  # type: ignore[attr-defined]
    return answering
