"""What is relied on of DeepSpeed's safe_get_* and safe_set_*: the master weights are theirs, the states are not.

DeepSpeed looks for states as long as the weights on the ranks that have some of a parameter, and has the others wait.
LDAdamW has none such, so that all ranks are to refuse.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

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


def is_where_the_engine_writes(param: Any, start: int, master: torch.Tensor) -> bool:
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


def refuse_states(zero: Any, params: Iterable[Any]) -> None:
    """Have safe_get_full_optimizer_state and its kin raise RuntimeError, on all ranks, and wait for none.

    Args:
        zero: the engine's optimizer.
        params: the engine's parameters.
    """
    for owner, names in ((zero, _OF_ENGINE), *((param, _OF_PARAMETER) for param in params)):
        for name in names:
            method = getattr(owner, name, None)
            if method is not None and not hasattr(method, "without_states"):
                setattr(owner, name, _without_states(method))


def _without_states(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        key = signature.bind(*args, **kwargs).arguments.get("optim_state_key")
        if key is not None:
            raise RuntimeError(
                f"DeepSpeed was asked for the optimizer state {key!r} of a parameter, in the weight's shape: LDAdamW "
                f"has none such, as it keeps moments in a subspace, projectors and errors. Expected "
                f"engine.basic_optimizer.state, which has this rank's part under the flat tensor and the parameter's "
                f"name, or a checkpoint. Master weights and gradients are found as ever."
            )
        return method(*args, **kwargs)

    refusing.without_states = True  # type: ignore[attr-defined]
    return refusing
