"""Clipping by the norm of all gradients, whichever of them are missing on some ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldadam_dist.adapters import on_mesh
from ldadam_dist.entries import Entry, groups_of
from ldadam_dist.in_grad import ErrorInGrad
from ldadam_dist.runtime import all_reduce, finish, maxima, ranks_of


def clip_grad_norm_(optimizer: Optimizer, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` of all parameters of an optimizer; call it between backward and step.

    Collective over the meshes of the parameters. As in the step, a gradient that is missing on some ranks is zero
    there: the norm is that of the rest, the same on all ranks. Torch's function waits for ranks without a gradient, or
    returns other norms there.

    With gradient_sync="lowrank" the norm of the mean gradient is not known. All replicas are clipped alike by their own
    norms, (mean ‖Gᵢ‖ᵖ)^(1/p), which is at least that, and larger the more their gradients differ.

    With error_in_grad gradients are clipped and not the errors: from the first call on they are accumulated apart, as
    without error_in_grad, and added to the errors at the step. So call it from the first step on.

    Args:
        optimizer: an `LDAdamW`; any other has its parameters clipped by torch's function.
        max_norm: largest norm; gradients of a larger one are scaled in place.
        norm_type: p of the norm, positive, may be infinity.
    Returns:
        the norm before, a scalar; a DTensor if parameters are, but for gradient_sync="lowrank". If it is not finite, so
        are some gradients then, and `LDAdamW.step` is skipped.
    Raises:
        ValueError: norm_type is not positive.
        RuntimeError: gradients have been accumulated into errors already, ranks have different parameters or settings,
            or DeepSpeed, which clips by itself, steps the parameters; nothing has changed then.
    """
    wrapped = getattr(optimizer, "optimizer", None)  # by accelerate
    optimizer = wrapped if isinstance(wrapped, Optimizer) else optimizer
    if not isinstance(optimizer, ErrorInGrad):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type!r}: expected a positive number, or infinity for the largest element.")
    if optimizer._partitions:
        raise RuntimeError(
            "DeepSpeed's engine steps these parameters: expected it to clip too. Set gradient_clipping in its JSON."
        )
    optimizer.keep_gradients_apart()
    entries = list(optimizer._entries())
    if not groups_of(entries):
        return torch.nn.utils.clip_grad_norm_([entry.param for entry in entries], max_norm, norm_type)
    optimizer._inspect(entries, read=False)
    norm = _total_norm(entries, float(norm_type))
    if max_norm != math.inf:
        _scale(entries, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    sharded = [a for a in (e.adapter for e in entries if hasattr(e.param, "device_mesh")) if on_mesh(a)]
    return sharded[0].replicated(norm) if sharded and optimizer.replicas.averaged else norm


def _total_norm(entries: Sequence[Entry], p: float) -> Tensor:
    """(), float32 or, of float64 gradients, float64. Parameters that are cut alike are summed together."""
    alike: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        alike.setdefault((entry.adapter.groups, entry.adapter.reductions()), []).append(entry)
    device = entries[0].adapter.device
    sums = {key: _local_power(some, p).to(device) for key, some in alike.items()}
    for kind in ("max", "mean", "sum"):  # copies first: what is missing of one is there in another
        for group, where in groups_of(entries):
            keys = [key for key in sums if kind in _kinds(key, (group, where), p)]
            if not keys:
                continue
            told = torch.stack([sums[key] for key in keys]).to(where)
            if kind == "max":
                maxima(told, group)
            else:
                finish(all_reduce(told.div_(len(ranks_of(group))) if kind == "mean" else told, group))
            sums.update(zip(keys, told.to(device).unbind(), strict=True))
    power, not_a_number = torch.stack(list(sums.values())).unbind(1)
    norm = power.max() if math.isinf(p) else power.sum() ** (1 / p)
    norm = torch.where(not_a_number.any(), math.nan, norm)
    double = any(entry.local_grad is not None and entry.local_grad.dtype == torch.float64 for entry in entries)
    return norm if double else norm.float()


def _kinds(key: tuple[Any, ...], group: tuple[Any, Any], p: float) -> list[str]:
    """What becomes over a group of the sums of parameters that are cut alike."""
    groups, reductions = key
    return ["max" if math.isinf(p) else kind for own, kind in zip(groups, reductions, strict=True) if own == group]


def _local_power(entries: Sequence[Entry], p: float) -> Tensor:
    """(2,): Σ |g|ᵖ, or the largest |g|, of the gradients on this process, and whether that is not a number.

    A maximum over ranks may lose NaN, so there it is infinity.
    """
    grads = [entry.local_grad for entry in entries if entry.local_grad is not None and entry.local_grad.numel()]
    device = grads[0].device if grads else entries[0].adapter.local(entries[0].param).device
    wide = torch.float32 if device.type == "mps" else torch.float64
    norms = torch.zeros(1, dtype=wide, device=device)
    if grads:
        each = [torch.linalg.vector_norm(g, p, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
        norms = torch.stack([norm.to(device, wide) for norm in each])
    power = norms.max() if math.isinf(p) else (norms**p).sum()
    return torch.stack([power.nan_to_num(math.inf, math.inf), power.isnan().to(wide)])


def _scale(entries: Sequence[Entry], factor: Tensor) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for entry in entries:
        if entry.param.grad is not None:
            grad = getattr(entry.param.grad, "to_local", lambda grad=entry.param.grad: grad)()
            by_device.setdefault(grad.device, []).append(grad)
    for device, grads in by_device.items():
        torch._foreach_mul_(grads, factor.to(device))
