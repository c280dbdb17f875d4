"""LDAdamW under DeepSpeed's ZeRO stages 1, 2 and 3; docs/deepspeed.md has the recipes.

Importing this module makes "LDAdamW" an optimizer that DeepSpeed's JSON may name, and one that ZeRO accepts.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import fragment_address, mixed_precision_linkage
from torch import nn

from ldadam_dist.integrations.zero import ZeroLayout, refuse_unsupported, unknown_layout
from ldadam_dist.integrations.zero_access import noted
from ldadam_dist.integrations.zero_checkpoints import ZeroCheckpoints
from ldadam_dist.optimizer import LDAdamW
from ldadam_dist.param_groups import build_param_groups
from ldadam_dist.universal import FlatForm

_GROUP_OPTIONS = (
    "rank lr lr_other lr_scale_other weight_decay include exclude rank_pattern convolutions proj_type".split()
)
"""Arguments of `build_param_groups` among the JSON's optimizer.params; the others are LDAdamW's."""

_LAYOUTS = {
    DeepSpeedZeroOptimizer: ZeroLayout.of_stage_1_and_2,
    BF16_Optimizer: ZeroLayout.of_bf16_optimizer,
    DeepSpeedZeroOptimizer_Stage3: ZeroLayout.of_stage_3,
}
"""How each of the engine's optimizers lays out the parameters; subclasses lay them out otherwise."""


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, and `attach`: the same arguments and results.

    LDAdamW is given as `optimizer=`, as an instance or a callable that makes one from the parameters, or named in the
    JSON: `"optimizer": {"type": "LDAdamW", "params": {"lr": 1e-3, "rank": 128}}`.

    Raises:
        ValueError: the engine's optimizer is not LDAdamW, or a setting that is not supported.
    """
    engine, *rest = deepspeed.initialize(*args, **kwargs)
    attach(engine)
    return (engine, *rest)


initialize.__signature__ = inspect.signature(deepspeed.initialize)  # type: ignore[attr-defined]


def attach(engine: Any) -> LDAdamW:
    """Tell the engine's LDAdamW which matrices lie in the flat tensors that it is given to step; collective.

    Needed once, after `deepspeed.initialize(optimizer=LDAdamW(...))`. An optimizer that the JSON names is attached by
    itself, and calling this again does no harm.

    Args:
        engine: from `deepspeed.initialize`.
    Returns:
        the engine's LDAdamW, which has `placement()` and `skipped_steps`.
    Raises:
        ValueError: the engine's optimizer is not LDAdamW, or a setting that is not supported.
        RuntimeError: the engine does not lay out the parameters as the known versions of DeepSpeed do.
    """
    layout = _attach(engine)
    layout.verify()
    optimizer: LDAdamW = engine.basic_optimizer
    return optimizer


def attach_in_use(optimizer: LDAdamW, model: nn.Module) -> None:
    """Attach an optimizer by itself, where a library makes the engine and keeps it, as Hugging Face's Trainer does.

    The engine is found on the call stack as soon as it runs the model, steps, saves or loads.

    Args:
        optimizer: that will be given to `deepspeed.initialize`.
        model: that will be given to it too.
    """

    def attach_found_engine() -> None:
        _attach(
            _engine_on_stack(
                "no DeepSpeed engine is at work yet: ask again after the first step, or call attach(engine)."
            )
        )

    _attach_in_use(optimizer, model, attach_found_engine)


def _attach(engine: Any) -> ZeroLayout:
    if not isinstance(engine, DeepSpeedEngine):
        raise ValueError(f"expected the engine that deepspeed.initialize returns first, found {type(engine).__name__}.")
    optimizer = getattr(engine, "basic_optimizer", None)
    if not isinstance(optimizer, LDAdamW):
        raise ValueError(
            f"the engine's optimizer is {type(optimizer).__name__}: expected LDAdamW, given to deepspeed.initialize as "
            f'optimizer=, or named in its configuration as "optimizer": {{"type": "LDAdamW"}}.'
        )
    refuse_unsupported(engine)
    read = _LAYOUTS.get(type(engine.optimizer))
    if read is None:
        raise ValueError(
            f"the engine steps with {type(engine.optimizer).__name__}, which LDAdamW does not know: expected one of "
            f"{', '.join(known.__name__ for known in _LAYOUTS)}, that is ZeRO stage 1, 2 or 3 without variants."
        )
    device = torch.device(get_accelerator().current_device_name())
    try:
        layout = read(engine.optimizer, engine.param_names, device)
    except (AttributeError, KeyError, TypeError) as error:
        raise unknown_layout(f"{type(error).__name__}: {error}") from error
    found = optimizer.attach_partitions(layout.partitions, layout.overflowed)
    layout.answer_for_states(partial(optimizer._entries, whole_engine=True))
    _checkpoints(engine, optimizer).attached(layout, FlatForm(layout.partitions, found))
    return layout


def _checkpoints(engine: Any, optimizer: LDAdamW) -> ZeroCheckpoints:
    """What saves and loads the engine's states; made once."""
    if not hasattr(engine, "ldadam_checkpoints"):
        engine.ldadam_checkpoints = ZeroCheckpoints(engine, optimizer, fragment_address)
        if not hasattr(engine.module, UNIVERSAL_CHECKPOINT_INFO):  # without it ds_to_universal does nothing
            info = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
            setattr(engine.module, UNIVERSAL_CHECKPOINT_INFO, info)
    checkpoints: ZeroCheckpoints = engine.ldadam_checkpoints
    return checkpoints


def _from_json(model_parameters: Sequence[Any], **params: Any) -> LDAdamW:
    """LDAdamW as DeepSpeed makes an optimizer that its JSON names: from parameters and `optimizer.params`.

    DeepSpeed looks such a name up in torch.optim and hands over nothing but parameters. So the engine that asks, and
    with it the model, are found on the call stack.
    """
    engine = _engine_on_stack(
        "torch.optim.LDAdamW is what DeepSpeed's JSON names; no engine is asking for it. Use ldadam_dist.LDAdamW."
    )
    refuse_unsupported(engine)
    known = [*_GROUP_OPTIONS, *inspect.signature(LDAdamW).parameters]
    for key in params.keys() - set(known) | params.keys() & {"params", "process_group", "unknown"}:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near and near[0] != key else "."
        raise ValueError(f"optimizer.params of DeepSpeed's configuration has the unknown key {key!r}{hint}")
    options = {key: params.pop(key) for key in _GROUP_OPTIONS if key in params}
    groups = _build_groups(engine.module, model_parameters, options)
    shared = {key: options[key] for key in ("rank", "lr", "weight_decay", "proj_type") if key in options}
    optimizer = LDAdamW(groups, **shared, **params)

    found = weakref.ref(engine)
    _attach_in_use(optimizer, engine.module, lambda: _attach(found()))
    _checkpoints(engine, optimizer)
    return optimizer


def _attach_in_use(optimizer: LDAdamW, module: nn.Module, attach: Callable[[], Any]) -> None:
    """Attach when the flat tensors are there: at the first forward, or the first use of the optimizer."""
    optimizer.attach_when_needed(attach)

    def before_forward(*_: Any) -> None:
        hook.remove()
        optimizer.attach_found()

    hook: Any = module.register_forward_pre_hook(before_forward)


def _engine_on_stack(otherwise: str) -> DeepSpeedEngine:
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, DeepSpeedEngine):
            return candidate
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError(otherwise)


def _build_groups(model: nn.Module, given: Sequence[Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of the parameters that the engine was given: bare ones, or groups with settings of their own."""
    given_groups: list[Any] = list(given) if given and isinstance(given[0], Mapping) else [{"params": list(given)}]
    if any("enable_lowrank" in group for group in given_groups):
        return given_groups  # from build_param_groups
    built = build_param_groups(model, **options)
    groups = []
    for group in given_groups:
        kept = {key: value for key, value in group.items() if key != "params"}
        wanted = {id(param) for param in group["params"]}
        for whole in built:
            pairs = [(name, param) for name, param in whole["params"] if id(param) in wanted]
            wanted -= {id(param) for _, param in pairs}
            if pairs:
                groups.append({**whole, **kept, "params": pairs})
        strange = [param for param in group["params"] if id(param) in wanted and param.requires_grad]
        if strange:
            raise ValueError(
                f"{len(strange)} of the parameters given to deepspeed.initialize are not the model's, the first of "
                f"shape {tuple(strange[0].shape)}: expected its own, or build_param_groups(model)."
            )
    return groups


mixed_precision_linkage.set_full_hp_param = noted(mixed_precision_linkage.set_full_hp_param)
for _name in ("set_full_hp_param", "set_local_hp_param"):
    setattr(DeepSpeedZeroOptimizer_Stage3, _name, noted(getattr(DeepSpeedZeroOptimizer_Stage3, _name)))
torch.optim.LDAdamW = _from_json  # type: ignore[attr-defined]
if LDAdamW not in ZERO_SUPPORTED_OPTIMIZERS:
    ZERO_SUPPORTED_OPTIMIZERS.append(LDAdamW)
