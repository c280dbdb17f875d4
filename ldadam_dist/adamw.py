"""The rule for every parameter that is not a low-rank matrix: AdamW, by torch's own functional implementation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ldadam_dist.entries import MISSING, ZERO, Entry
from ldadam_dist.rounding import chunks, is_narrower, random_bits, rounded
from ldadam_dist.rules import compute_dtype, learning_rate
from ldadam_dist.separate import is_fake

_KINDS = ("weight", "exp_avg", "exp_avg_sq")


def step_vectors(entries: Iterable[Entry], usable: Tensor | None = None) -> None:
    """Step every parameter that has a gradient, in place. It is element-wise, so shards need no communication.

    Args:
        entries: all parameters that are not projected, group by group.
        usable: a tensor () that says on the device whether to step; then the host reads nothing.
    """
    for _, members in itertools.groupby(filter(_moves, entries), key=lambda entry: id(entry.group)):
        whole: list[Entry] = []
        for entry in members:
            if _is_copied(entry):
                _step_in_parts(entry, usable)
            else:
                whole.append(entry)
        if whole:
            stored = [_stored(entry) for entry in whole]
            tensors = [[each[kind] for each in stored] for kind in _KINDS]
            steps = [entry.state["step"] for entry in whole]
            _adamw(tensors, [entry.grad for entry in whole], steps, whole[0].group, usable)


def _stored(entry: Entry) -> dict[str, Tensor]:
    """What is stored of a parameter on this process, by the names that rounding has for it."""
    local = entry.adapter.local
    return {kind: local(entry.param if kind == "weight" else entry.state[kind]) for kind in _KINDS}


def _adamw(
    tensors: Sequence[list[Tensor]],
    grads: list[Tensor],
    steps: list[Tensor],
    group: Mapping[str, Any],
    usable: Tensor | None,
) -> None:
    """torch's AdamW of weights and moments, which `tensors` has in the order of `_KINDS`."""
    weights, exp_avgs, exp_avg_sqs = tensors
    fused, counts = _can_be_fused(*tensors, grads), steps
    if fused and steps[0].device != weights[0].device:  # where the fused one reads and counts them
        counts = list(torch.stack(steps).to(weights[0].device))
    adamw(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        counts,
        fused=fused or None,  # else torch takes what it prefers of the others
        found_inf=None if usable is None else usable.logical_not().float(),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(learning_rate(group)) if usable is None else learning_rate(group),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    if counts is not steps:
        torch._foreach_add_(steps, 1)


def _can_be_fused(*lists: Sequence[Tensor]) -> bool:
    """Whether torch's fused AdamW may step these: it goes through memory, so it must find equal elements there."""
    tensors = [tensor for some in lists for tensor in some]
    one_device = len({tensor.device for tensor in tensors}) == 1 and tensors[0].device.type in ("cpu", "cuda")
    return one_device and all(tensor.is_contiguous() for tensor in tensors)


def _is_copied(entry: Entry) -> bool:
    """Whether something is stored otherwise than it is to be computed with; torch would compute as it is stored, and
    takes no gradient of another dtype than the parameter's."""
    if entry.grad.dtype != entry.param.dtype:
        return True
    if entry.group["state_dtype"] is None and not entry.group["stochastic_rounding"]:
        return False
    return {tensor.dtype for tensor in _stored(entry).values()} != {compute_dtype(entry.param.dtype)}


def _step_in_parts(entry: Entry, usable: Tensor | None) -> None:
    """Step a parameter through copies of a part at a time, in the dtype of the computation."""
    stored, grad, step = _stored(entry), entry.grad, entry.state["step"]
    if grad.ndim == 0:
        stored, grad = {kind: tensor[None] for kind, tensor in stored.items()}, grad[None]
    dtype, t = compute_dtype(entry.param.dtype), int(step) + 1 if usable is None and not is_fake(step) else step + 1
    for start, stop in chunks(len(grad), math.prod(grad.shape[1:])):
        parts = {kind: tensor[start:stop] for kind, tensor in stored.items()}
        copies = {kind: part.to(dtype) for kind, part in parts.items()}
        _adamw([[copies[kind]] for kind in _KINDS], [grad[start:stop].to(dtype)], [step.clone()], entry.group, usable)
        for kind, part in parts.items():
            if entry.group["stochastic_rounding"] and is_narrower(part.dtype, dtype):
                bits = random_bits(kind, t, *entry.adapter.places(entry.param, entry.shape, start, stop))
                part.copy_(rounded(copies[kind], part.dtype, bits.view(part.shape)))
            elif part.dtype != dtype:
                part.copy_(copies[kind])
    step += 1 if usable is None else usable


def _moves(entry: Entry) -> bool:
    if not entry.present or entry.status == MISSING:
        return False
    # Checkpoint libraries take a step with zero gradients and lr = 0 to learn the state's shape.
    return not (entry.status == ZERO and entry.group["lr"] == 0 and entry.state["step"] == 0)
