"""Optimizer and schedule. LDAdamW and AdamW get the same groups, so a comparison differs in the rule alone."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from launch.config import ConfigError, OptimizerOptions


def build_optimizer(
    model: nn.Module, options: OptimizerOptions, saved_groups: int | None = None, **replicas: Any
) -> torch.optim.Optimizer:
    """The optimizer; `replicas` tells LDAdamW of those whose gradients it averages; the rest as in `build_groups`."""
    from ldadam_dist import LDAdamW

    try:
        groups = build_groups(model, options, saved_groups)
        if options.optimizer == "adamw":
            kept = ("params", "lr", "weight_decay")
            groups = [{key: group[key] for key in kept} for group in groups]
            return torch.optim.AdamW(groups, lr=options.lr, betas=options.resolved_betas, eps=options.eps)
        return LDAdamW(
            groups,
            lr=options.lr,
            betas=options.resolved_betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            rank=options.rank,
            rho=options.rho,
            proj_type=options.proj_type,
            proj_method=options.proj_method,
            error_feedback=options.error_feedback,
            error_dtype=options.error_dtype,
            state_dtype=options.state_dtype,
            stochastic_rounding=options.stochastic_rounding,
            error_in_grad=options.error_in_grad,
            metrics_every=options.metrics_every,
            gradient_sync=options.gradient_sync,
            **replicas,
        )
    except ValueError as error:
        raise ConfigError(f"optimizer={options.optimizer}: {error}") from error


def build_groups(model: nn.Module, options: OptimizerOptions, saved_groups: int | None) -> list[dict[str, Any]]:
    """The groups of a run.

    Args:
        model: to be trained.
        options: the run's.
        saved_groups: how many groups the checkpoint has that is resumed. Earlier versions had parameters that never
            decay in one group with others if the weight decay was 0.
    """
    from ldadam_dist import build_param_groups
    from ldadam_dist.grouping import merged

    module = model.module if isinstance(model, DistributedDataParallel) else model
    groups = build_param_groups(
        module, rank=options.rank, lr=options.lr, lr_other=options.lr_other, weight_decay=options.weight_decay
    )
    return merged(groups, saved_groups)


def lr_factor(step: int, *, steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Share of the peak learning rate that the update after ``step`` updates takes: linear warm-up, then cosine."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_scheduler(optimizer: torch.optim.Optimizer, options: OptimizerOptions, steps: int) -> LambdaLR:
    factor = functools.partial(
        lr_factor, steps=steps, warmup_steps=min(options.warmup_steps, steps), min_lr_ratio=options.min_lr_ratio
    )
    return LambdaLR(optimizer, factor)
