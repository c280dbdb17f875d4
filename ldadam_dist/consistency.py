"""Finds, at the first step, what ranks understand differently; a mismatch would otherwise hang or corrupt a run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from ldadam_dist.adapters import FlatAdapter
from ldadam_dist.entries import Entry, groups_of
from ldadam_dist.runtime import agree, gather_objects, ranks_of

_SETTINGS = (
    "rank proj_type proj_method projector_init error_feedback error_dtype state_dtype stochastic_rounding "
    "enable_lowrank flatten communication metrics_every lr lr_scale betas eps weight_decay rho"
).split()


def check_ranks_agree(entries: Sequence[Entry], settings: Mapping[str, Any]) -> None:
    """Compare parameters, settings and step counts over every group that shares them; collective.

    Args:
        entries: all trainable parameters, in the order in which they are stepped.
        settings: those that all parameters have in common.
    Raises:
        RuntimeError: ranks differ; raised on all of them, with the first difference.
    """
    groups = groups_of(entries)
    ranks = {group: tuple(ranks_of(group[0])) for group in groups}  # several groups may have the same ranks
    lines = {
        group: [_line(e, settings) for e in entries if any(ranks[g] == ranks[group] for g in e.adapter.groups)]
        for group in groups
    }
    differs = torch.zeros(1, dtype=torch.int64, device="cpu")
    for group in groups:
        digest = int.from_bytes(hashlib.sha256("\n".join(lines[group]).encode()).digest()[:7], "big")
        largest, smallest = agree(torch.tensor([digest, -digest], device="cpu"), *group).tolist()
        differs |= largest != -smallest
    for group in groups:  # who shares nothing with the ranks that differ must stop as well
        differs = agree(differs, *group)
    if not differs:
        return
    found = [_first_difference(lines[group], group[0]) for group in groups]
    raise RuntimeError(
        next(filter(None, found), "ranks with which this one shares no mesh dimension differ in their parameters.")
        + " Every rank must build the same model and the same parameter groups, in the same order, and load the same "
        "state."
    )


def _first_difference(lines: list[str], group: Any) -> str | None:
    ranks, everyone = ranks_of(group), gather_objects(lines, group)
    for other, theirs in zip(ranks, everyone, strict=True):
        for number, (first, second) in enumerate(zip_longest(everyone[0], theirs, fillvalue="nothing")):
            if first != second:
                return (
                    f"ranks {ranks[0]} and {other} differ in parameter {number} that they share: "
                    f"rank {ranks[0]} has {first}; rank {other} has {second}."
                )
    return None


def _line(entry: Entry, common: Mapping[str, Any]) -> str:
    settings = {key: entry.group[key] for key in _SETTINGS}
    settings["lr"] = float(settings["lr"])
    settings["betas"] = tuple(float(beta) for beta in settings["betas"])
    told = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    shared = ", ".join(f"{key}={value!r}" for key, value in common.items())
    placements = getattr(entry.param, "placements", "replicas")
    if not isinstance(entry.adapter, FlatAdapter):  # only the ranks that have some of its elements know its step
        step = entry.state.get("step")
        told += f", step={0 if step is None else step.tolist()}"
    return f"{entry.name} of shape {entry.shape}, {entry.param.dtype}, {placements}, {told}, {shared}"
