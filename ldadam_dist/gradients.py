"""Looks at all gradients before anything changes, so that every rank decides alike what to step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.consistency import CHANGED, DIFFERS, Agreement
from ldadam_dist.entries import MISSING, NONZERO, UNUSABLE, ZERO, Entry, groups_of
from ldadam_dist.runtime import agree, collective, ranks_of
from ldadam_dist.separate import is_fake


def largest_gradient(dtype: torch.dtype) -> float:
    """What every element of a matrix's gradient must stay below: the power iteration multiplies by it twice."""
    return 1e150 if dtype == torch.float64 else 1e15


def inspect_gradients(entries: Sequence[Entry], agreement: Agreement | None = None, read: bool = True) -> bool:
    """Find all local gradients, read them, and set each entry's statuses. Returns whether any rank has an unusable one.

    Unusable is what is not finite and, in a matrix that is projected, what overflows when it is squared. A gradient
    that only some ranks have is zero on the others. Of fake tensors nothing is read or asked: gradients are usable.

    Args:
        entries: all trainable parameters.
        agreement: what to tell other ranks of them, if that has been compared before.
        read: False to only find them; all are usable then.
    Raises:
        RuntimeError: a gradient must be redistributed, and a rank does not have it so; or ranks differ in parameters or
            settings.
        ValueError, RuntimeError: the refusal of an entry, and on other ranks a RuntimeError that one has it.
    """
    if any(is_fake(entry.adapter.local(entry.param)) for entry in entries):
        for entry in entries:
            entry.local_grad = entry.adapter.grad(entry.param)
            entry.statuses = [MISSING if entry.local_grad is None else NONZERO] * entry.number
        return False
    # A gradient that is laid out otherwise than its parameter is redistributed by all ranks together. Whether there is
    # one, and whether all have it, is told along with the statuses; usually there is none, and that is all.
    moved = [entry.refusal is None and entry.adapter.must_redistribute(entry.param) for entry in entries]
    for entry, differs in zip(entries, moved, strict=True):
        entry.local_grad = None if differs or entry.refusal else entry.adapter.grad(entry.param)
    _read(entries, read)
    present = [entry.param.grad is not None for entry in entries]
    agreement = agreement or Agreement(entries, {})
    flags = [present, moved, [not differs for differs in moved]]
    (present, moved, kept), any_moved, unusable, refused = _agree(entries, flags, agreement)
    if refused:
        why = next((entry.refusal for entry in entries if entry.refusal), None)
        raise why or RuntimeError(
            "another rank refuses this step, as of an error or a gradient that cannot be stepped, and says why. "
            "Nothing has changed here."
        )
    if any_moved:
        mixed = [entry for entry, *both in zip(entries, moved, kept, strict=True) if all(both)]
        failed = torch.tensor([len(mixed)], dtype=torch.int32, device="cpu")
        for group in groups_of(entries):
            failed = agree(failed, *group)
        if failed:
            raise RuntimeError(
                f"parameter {mixed[0].name if mixed else 'on other ranks'} has a gradient of other placements than its "
                f"own on one rank, and on another none or one of its own placements: expected the same on all, as they "
                f"must redistribute it together. Give every rank a gradient (zeros will do), or freeze the parameter."
            )
        redistributed = [entry for entry, differs in zip(entries, moved, strict=True) if differs]
        for entry in redistributed:
            with collective(f"redistribute (of the gradient of {entry.name})", partial(_sharing, entry)):
                entry.local_grad = entry.adapter.grad(entry.param)
        _read(redistributed, read)
        (present, *_), _, unusable, _ = _agree(entries, [present, moved, kept], agreement)
    for entry, has_gradient in zip(entries, present, strict=True):
        if has_gradient:
            entry.statuses = [max(status, ZERO) for status in entry.statuses]
    return unusable


def warn_skipped(bad: Sequence[str], changed: str, count: int) -> None:
    """Warn the caller of `step` that it was skipped.

    Args:
        bad: names of the parameters whose gradients are unusable, as far as this rank knows.
        changed: what has changed all the same, in a sentence.
        count: steps skipped so far.
    """
    others = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
    which = f"the gradient of {bad[0]}{others}" if bad else "a gradient, seen by the engine or on another rank,"
    warnings.warn(
        f"LDAdamW skipped this step: {which} is not finite, or too large to be squared. "
        f"{changed} Steps skipped so far: {count}.",
        stacklevel=6,  # beyond the two halves of step and torch's two wrappers of it
    )


def _sharing(entry: Entry) -> set[int]:
    return {rank for group, _ in entry.adapter.groups for rank in ranks_of(group)}


def _agree(
    entries: Sequence[Entry], flags: Sequence[Sequence[bool]], agreement: Agreement
) -> tuple[list[list[bool]], bool, bool, bool]:
    """Make the statuses those on which the ranks agree.

    Only what a group shares is told to it: another process may have parameters of its own. Some things go along to
    everyone: every process must redistribute, skip the step, or refuse it, if one must; and whether the parameters of
    any are others than before, or its parameters and settings others than those of the rest.

    Args:
        entries: all parameters.
        flags: (present, moved, kept) of each gradient.
        agreement: of this step.
    Returns:
        the flags that any rank has set, whether any gradient is moved anywhere, whether any is unusable, and whether
        any is refused.
    Raises:
        RuntimeError: ranks differ in their parameters or settings.
    """
    numbers = [entry.number for entry in entries]
    status = torch.tensor([s for entry in entries for s in entry.statuses], dtype=torch.int32, device="cpu")
    flagged = torch.tensor(flags, dtype=torch.int32, device="cpu")
    refused = any(entry.refusal is not None for entry in entries)
    told_all = any(flags[1]), UNUSABLE in status.tolist(), refused, agreement.changed, False
    everyone = torch.tensor(told_all, dtype=torch.int32, device="cpu")
    differing = []
    for group in agreement.told_before if agreement.changed else agreement.groups:
        digest = torch.tensor(agreement.digest(group), dtype=torch.int32, device="cpu")
        if agreement.changed:
            mine = (torch.zeros(agreement.lengths[group], dtype=torch.int32, device="cpu"), everyone, digest)
            _, everyone, digest = _heard(mine, group)
        else:
            has = torch.tensor([group in entry.adapter.groups for entry in entries], device="cpu")
            shared = has.repeat_interleave(torch.tensor(numbers, device="cpu"))
            mine = (torch.cat([status[shared], flagged[:, has].flatten()]), everyone, digest)
            told, everyone, digest = _heard(mine, group)
            agreement.lengths[group] = len(told)
            status[shared], flags_told = told.split([int(shared.sum()), len(told) - int(shared.sum())])
            flagged[:, has] = flags_told.view(len(flags), -1)
        if not torch.equal(digest[:2], -digest[2:]):
            differing.append(group)
            everyone[DIFFERS] = 1
    if everyone[DIFFERS]:
        agreement.refuse(differing)
    if everyone[CHANGED]:  # on all ranks alike
        agreement.settle()
        return _agree(entries, flags, agreement)
    for entry, statuses in zip(entries, status.split(numbers), strict=True):
        entry.statuses = statuses.tolist()
    any_moved, unusable, refused = everyone[:CHANGED].bool().tolist()
    return flagged.bool().tolist(), any_moved, unusable, refused


def _heard(mine: Sequence[Tensor], group: tuple[Any, torch.device]) -> list[Tensor]:
    """What the ranks of a group say, element by element the largest."""
    return list(agree(torch.cat(list(mine)), *group).split([len(part) for part in mine]))


def _read(entries: Sequence[Entry], look: bool) -> None:
    """Set the statuses that this process sees; MISSING for what only other ranks hold, ZERO without a look."""
    present: dict[tuple[torch.device, torch.dtype], list[tuple[Entry, int, Tensor]]] = {}
    for entry in entries:
        entry.statuses = [MISSING] * entry.number
        if entry.local_grad is None:
            continue
        start, stop = entry.held
        grads = list(entry.local_grad) if entry.stacked else [entry.local_grad]
        for slot, grad in zip(range(start, stop), grads, strict=True):
            entry.statuses[slot] = ZERO
            if grad.numel() and look:
                present.setdefault((grad.device, grad.dtype), []).append((entry, slot, grad))
    for (device, dtype), some in present.items():
        grads = [grad for *_, grad in some]
        on_host = device.type == "cpu"
        largest = _largest_on_host(grads, dtype) if on_host else _tolist(torch._foreach_norm(grads, math.inf))
        for (entry, slot, _), value in zip(some, largest, strict=True):
            usable = value < (largest_gradient(entry.param.dtype) if entry.matrices else math.inf)  # false for NaN
            entry.statuses[slot] = UNUSABLE if not usable else NONZERO if value else ZERO


def _largest_on_host(grads: Sequence[Tensor], dtype: torch.dtype) -> list[float]:
    """The largest |element| of each, or where that is neither zero nor large, an upper bound of it.

    The root of a product with itself is such a bound, and takes half the time of looking for the largest, and a tenth
    of the infinity norm's, which is not vectorised.
    """
    bounds = [math.nan] * len(grads)
    if dtype in (torch.float32, torch.float64):
        fast = [i for i, grad in enumerate(grads) if grad.is_contiguous()]
        squares = _tolist([torch.dot(g, g) for g in (grads[i].view(-1) for i in fast)])
        for i, square in zip(fast, squares, strict=True):
            bounds[i] = math.sqrt(square) if square >= 0 else math.nan
    unclear = [i for i, bound in enumerate(bounds) if not 0 < bound < largest_gradient(dtype)]
    pairs = [torch.aminmax(grads[i]) for i in unclear]
    lows, highs = _tolist([low for low, _ in pairs]), _tolist([high for _, high in pairs])
    for i, low, high in zip(unclear, lows, highs, strict=True):
        bounds[i] = max(high, -low)  # both are NaN if there is one
    return bounds


def _tolist(values: Sequence[Tensor]) -> list[float]:
    """Tensors () of one dtype as numbers, all at once."""
    return torch.stack(list(values)).tolist() if values else []
