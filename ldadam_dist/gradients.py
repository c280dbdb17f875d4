"""Looks at all gradients before anything changes, so that every rank decides alike what to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldadam_dist.entries import MISSING, NONZERO, UNUSABLE, ZERO, Entry
from ldadam_dist.runtime import agree


def inspect_gradients(entries: Sequence[Entry]) -> bool:
    """Read all gradients and set each entry's statuses. Returns whether any rank has an unusable one.

    Unusable is what is not finite and, in a matrix that is projected, what overflows when it is squared: the power
    iteration multiplies by the gradient twice.

    Raises:
        RuntimeError: a gradient must be redistributed, and a rank does not have it; raised on all that share it.
    """
    # A gradient that is laid out otherwise than its parameter is redistributed by all ranks together. Whether there is
    # one, and whether all have it, is told along with the statuses; usually there is none, and that is all.
    moved = [entry.adapter.must_redistribute(entry.param) for entry in entries]
    absent = [entry.param.grad is None for entry in entries]
    for entry, differs in zip(entries, moved, strict=True):
        entry.local_grad = None if differs else entry.adapter.grad(entry.param)
    _read(entries)
    worst, moved, absent = _agree(entries, moved, absent)
    if any(moved):
        redistributed = [entry for entry, differs in zip(entries, moved, strict=True) if differs]
        for entry, differs, lacking in zip(entries, moved, absent, strict=True):
            if differs and lacking:
                raise RuntimeError(
                    f"parameter {entry.name} has a gradient of other placements than its own on one rank and none on "
                    f"another: expected it on all, as they must redistribute it together. Give every rank a gradient "
                    f"(zeros will do), or freeze the parameter."
                )
        for entry in redistributed:
            entry.local_grad = entry.adapter.grad(entry.param)
        _read(redistributed)
        worst, *_ = _agree(entries, moved, absent)
    return worst == UNUSABLE


def _agree(
    entries: Sequence[Entry], moved: Sequence[bool], absent: Sequence[bool]
) -> tuple[int, list[bool], list[bool]]:
    """Make the statuses those on which the ranks agree. Returns the worst anywhere, and the flags that any rank set.

    Only what a group shares is told to it: another process may have parameters of its own. The worst status of all
    goes along, as every process skips the step if one must.
    """
    numbers = [entry.number for entry in entries]
    status = torch.tensor([s for entry in entries for s in entry.statuses], dtype=torch.int32, device="cpu")
    flags = torch.tensor([moved, absent], dtype=torch.int32, device="cpu")
    worst = torch.tensor([max(status.tolist(), default=MISSING)], dtype=torch.int32, device="cpu")
    for group in dict.fromkeys(group for entry in entries for group in entry.adapter.groups):
        has = torch.tensor([group in entry.adapter.groups for entry in entries], device="cpu")
        shared = has.repeat_interleave(torch.tensor(numbers, device="cpu"))
        mine = (status[shared], flags[:, has].flatten(), worst)
        status[shared], told, worst = agree(torch.cat(mine), *group).split([len(part) for part in mine])
        flags[:, has] = told.view(2, -1)
    for entry, statuses in zip(entries, status.split(numbers), strict=True):
        entry.statuses = statuses.tolist()
    return int(worst), flags[0].bool().tolist(), flags[1].bool().tolist()


def _read(entries: Sequence[Entry]) -> None:
    """Set the statuses that this process sees; MISSING for what only other ranks hold."""
    present: dict[torch.device, list[tuple[Entry, int, Tensor]]] = {}
    for entry in entries:
        entry.statuses = [MISSING] * entry.number
        if entry.local_grad is None:
            continue
        start, stop = entry.held
        grads = list(entry.local_grad) if entry.stacked else [entry.local_grad]
        for slot, grad in zip(range(start, stop), grads, strict=True):
            entry.statuses[slot] = ZERO
            if grad.numel():
                present.setdefault(grad.device, []).append((entry, slot, grad))
    for device, some in present.items():
        grads = [grad for *_, grad in some]
        if device.type == "cpu":  # the infinity norm is not vectorised there: 40 ms against 3 for Llama-60M's matrices
            largest = [torch.maximum(high, -low) for low, high in map(torch.aminmax, grads)]
        else:
            largest = list(torch._foreach_norm(grads, float("inf")))
        values = torch.stack([value.double() for value in largest]).tolist()
        for (entry, slot, _), value in zip(some, values, strict=True):
            usable = value < _limit(entry)  # false for NaN
            entry.statuses[slot] = UNUSABLE if not usable else NONZERO if value else ZERO


def _limit(entry: Entry) -> float:
    if entry.matrices is None:
        return float("inf")
    return 1e150 if entry.param.dtype == torch.float64 else 1e15
