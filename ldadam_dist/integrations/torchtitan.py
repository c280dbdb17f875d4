"""LDAdamW in torchtitan 0.3: its container of optimizers and its metrics; docs/torchtitan.md has a recipe.

def llama3_8b_ldadamw():
    config = llama3_8b()
    config.optimizer = LDAdamWContainer.Config(rank=512, lr=6e-4, lr_other=3e-4, weight_decay=0.1)
    return config
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.tools.logging import logger

from ldadam_dist.optimizer import LDAdamW
from ldadam_dist.param_groups import build_param_groups
from ldadam_dist.plan import WINDOW_ELEMENTS

_GROUP_SETTINGS = inspect.signature(build_param_groups).parameters.keys() - {"model", "named"}
_SETTINGS = inspect.signature(LDAdamW).parameters.keys() - {"params", "unknown"}


class LDAdamWContainer(OptimizersContainer):  # type: ignore[misc]
    """One LDAdamW for each part of the model that this process holds: one, or one for each of its pipeline stages.

    Stepping, learning rate schedules and checkpoints are torchtitan's own; what is saved is flat, by the names of
    parameters, so that it loads on another mesh and with other pipeline stages.

    Args:
        config: the settings.
        model_parts: as torchtitan has sharded them.

    Raises:
        ValueError: settings of torchtitan's own optimizers, settings out of range, or a part in which nothing is to
            be projected.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """Settings of `build_param_groups` and of `LDAdamW`, by the names and with the defaults that they have there.

        `error_in_grad`, `capturable`, `process_group` and `gradient_sync` are not among them. torchtitan clips and
        averages gradients, and may keep their buffers for CUDA graphs, in which errors would not survive; its learning
        rates are numbers, which a graph of the step would hold for ever; and its parameters tell their mesh themselves.
        """

        rank: int = 128
        lr: float = 1e-3
        lr_other: float | None = None
        lr_scale_other: float | None = None
        weight_decay: float = 0.0
        betas: tuple[float, float] = (0.908, 0.99)
        eps: float = 1e-8
        rho: float = 0.908
        include: list[str] = field(default_factory=list)
        exclude: list[str] = field(default_factory=list)
        rank_pattern: dict[str, int] = field(default_factory=dict)
        convolutions: bool = False
        proj_type: str = "std"
        proj_method: str = "power_iteration"
        projector_init: str = "auto"
        error_feedback: bool = True
        error_dtype: str | None = None
        state_dtype: str | None = None
        stochastic_rounding: bool = False
        communication: str = "auto"
        window_elements: int = WINDOW_ELEMENTS
        metrics_every: int = 0

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        _refuse_settings_of_others(config)
        self.model_parts = model_parts
        self.optimizers = [_build(config, part) for part in model_parts]
        for number, optimizer in enumerate(self.optimizers):
            counts = {True: 0, False: 0}
            for group in optimizer.param_groups:
                counts[group["enable_lowrank"]] += len(group["params"])
            logger.info(
                f"LDAdamW of part {number}: {counts[True]} parameters are projected, {counts[False]} get AdamW."
            )
        params = [
            param for optimizer in self.optimizers for group in optimizer.param_groups for param in group["params"]
        ]
        self._validate_params(params)
        self._post_init(params)


class LDAdamWMetrics(MetricsProcessor):  # type: ignore[misc]
    """torchtitan's metrics, and what `optimizer.metrics()` tells, as "ldadamw/error_norm" and so on.

    They are those of the last measured step: give the optimizer's configuration `metrics_every=log_freq`. With several
    parts on a process they are "ldadamw/0/error_norm"; under pipeline parallelism those of the stages of the process
    that logs.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):  # type: ignore[misc]
        """As of torchtitan's."""

    def log(self, *args: Any, extra_metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Log one step; collective, as all processes log.

        Raises:
            ValueError: the optimizers are others.
        """
        optimizers = list(self.optimizers or ())
        values = dict(extra_metrics or {})
        for number, optimizer in enumerate(optimizers):
            if not isinstance(optimizer, LDAdamW):
                raise ValueError(
                    f"LDAdamWMetrics has nothing to log of {type(optimizer).__name__}: expected LDAdamW. Take "
                    "torchtitan's MetricsProcessor.Config as config.metrics, or LDAdamWContainer.Config as "
                    "config.optimizer."
                )
            prefix = f"ldadamw/{number}" if len(optimizers) > 1 else "ldadamw"
            if any(group["metrics_every"] for group in optimizer.param_groups):
                values |= {f"{prefix}/{name}": value for name, value in optimizer.metrics().total.items()}
            values[f"{prefix}/skipped_steps"] = float(optimizer.skipped_steps)
        super().log(*args, extra_metrics=values, **kwargs)


def _build(config: LDAdamWContainer.Config, model: nn.Module) -> LDAdamW:
    given = {setting.name: getattr(config, setting.name) for setting in fields(config)}
    for name in ("include", "exclude"):
        given[name] = given[name] or None  # nothing said
    groups = build_param_groups(model, **{name: value for name, value in given.items() if name in _GROUP_SETTINGS})
    return LDAdamW(groups, **{name: value for name, value in given.items() if name in _SETTINGS})


def _refuse_settings_of_others(config: LDAdamWContainer.Config) -> None:
    """What torchtitan's own container reads would otherwise be passed over in silence."""
    if config.param_groups:
        patterns = [group.pattern for group in config.param_groups]
        raise ValueError(
            f"param_groups has the patterns {patterns} of torchtitan's own optimizers, expected none: say with include "
            "and exclude what LDAdamW projects, with lr_other what the rest learns with, and leave param_groups out."
        )
    if config.optimizer_factory_kwargs_by_name:
        raise ValueError(
            f"optimizer_factory_kwargs_by_name is for {sorted(config.optimizer_factory_kwargs_by_name)}, expected "
            "nothing: settings of LDAdamW are fields of LDAdamWContainer.Config."
        )
    if config.implementation != "fused":
        bfloat16 = config.implementation == "fused_opt_states_bf16"
        raise ValueError(
            f"implementation={config.implementation!r} is for torchtitan's own optimizers; the default is 'fused':"
            + (" leave it out, and give state_dtype='bfloat16'." if bfloat16 else " leave it out.")
        )
