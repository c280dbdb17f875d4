"""Finds what ranks understand differently; a mismatch would otherwise hang or corrupt a run.

At the first step they compare everything. Later each sends, along with the statuses of its gradients, a digest of its
parameters and settings. A rank whose parameters changed sends as many numbers as before, and that they changed; then
all ranks send again.
"""

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
    "enable_lowrank flatten communication metrics_every lr betas eps weight_decay rho"
).split()


CHANGED, DIFFERS = 3, 4
"""Places in what is told to everyone, after those of `gradients`."""

KEPT = 64
"""Sets of parameters of which is remembered what ranks have agreed on."""


class Agreement:
    """What one rank tells the others of its parameters and settings at a step.

    Args:
        entries: all trainable parameters, in the order in which they are stepped.
        settings: those that all parameters have in common.
        before: that of the last step of the same tensors, on which the ranks have agreed.
    """

    def __init__(self, entries: Sequence[Entry], settings: Mapping[str, Any], before: Agreement | None = None) -> None:
        self.entries, self.settings = entries, settings
        self.made_of = tuple((id(e.param), id(e.group), id(e.adapter), e.matrices, e.name) for e in entries)
        self.changed = before is not None and before.made_of != self.made_of
        self.groups: list[tuple[Any, torch.device]]
        self._digests: dict[Any, str]
        self._of: dict[Any, list[dict[str, Any]]]
        if before is not None and not self.changed:
            self.groups, self._digests, self._of = before.groups, before._digests, before._of
        else:
            self.groups = groups_of(entries)
            shared = {group: [e for e in entries if group in e.adapter.groups] for group in self.groups}
            self._digests = {group: "\n".join(map(_description, some)) for group, some in shared.items()}
            self._of = {group: list({id(e.group): e.group for e in some}.values()) for group, some in shared.items()}
        self.lengths: dict[Any, int] = {} if before is None else before.lengths
        self.told_before = before.groups if before is not None and self.changed else []

    def settle(self) -> None:
        """All ranks have changed alike: from now on it is as one of a first step."""
        self.changed, self.told_before, self.lengths = False, [], {}

    def digest(self, group: Any) -> list[int]:
        """Two numbers and their negatives: under a maximum all ranks see whether they are the same."""
        settings = [_settings(group) for group in self._of.get(group, [])]
        text = f"{self._digests.get(group)} {settings} {self.settings}"
        found = hashlib.sha256(text.encode()).digest()
        one, other = (int.from_bytes(found[i : i + 3], "big") for i in (0, 3))
        return [one, other, -one, -other]

    def refuse(self, differing: Sequence[Any]) -> None:
        """Raise RuntimeError with what differs; collective over the groups in which something does.

        Args:
            differing: these groups; none where only ranks with which this one shares nothing differ.
        """
        found = []
        for group in differing:
            lines = [_line(e, self.settings) for e in self.entries if group in e.adapter.groups]
            found.append(_first_difference(lines, group[0]))
        _raise_difference(found)


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
    _raise_difference([_first_difference(lines[group], group[0]) for group in groups])


def _raise_difference(found: Sequence[str | None]) -> None:
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


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: group[key] for key in _SETTINGS}
    settings["lr"] = float(settings["lr"])
    settings["lr_scale"] = float(group.get("lr_scale", 1.0))
    settings["betas"] = tuple(float(beta) for beta in settings["betas"])
    return settings


def _description(entry: Entry) -> str:
    placements = getattr(entry.param, "placements", "replicas")
    return f"{entry.name} of shape {entry.shape}, {entry.param.dtype}, {placements}"


def _line(entry: Entry, common: Mapping[str, Any]) -> str:
    told = ", ".join(f"{key}={value!r}" for key, value in _settings(entry.group).items())
    shared = ", ".join(f"{key}={value!r}" for key, value in common.items())
    if not isinstance(entry.adapter, FlatAdapter):  # only the ranks that have some of its elements know its step
        step = entry.state.get("step")
        told += f", step={0 if step is None else step.tolist()}"
    return f"{_description(entry)}, {told}, {shared}"
