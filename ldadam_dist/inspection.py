"""What a user may ask of an optimizer: where its states are, and what its steps are like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.capture import Capturable
from ldadam_dist.entries import Entry, groups_of
from ldadam_dist.lowrank import Measured
from ldadam_dist.measures import MEASURES
from ldadam_dist.placement import Placement, placement
from ldadam_dist.runtime import agree

_COLUMNS = ("grad", *MEASURES)
"""Of what is measured of a matrix."""


@dataclass(frozen=True)
class Metrics:
    """What the last measured steps of the projected matrices were like, over all ranks.

    Attributes:
        matrices: for each matrix, "name" or "name[3]" in a stack, a dict of

            grad_norm          ‖G‖, after clipping; not with error_in_grad
            update_norm        ‖lr U'D‖, without weight decay
            error_norm         ‖E‖, of what the projection has lost and will be given back
            captured_energy    ‖U'ᵀA‖² / ‖A‖², the part of the accumulated gradient that is in the subspace
            subspace_overlap   ‖U'ᵀU‖² / r, 1 where the subspace has not turned; not at the first step
            orthogonality      max |U'ᵀU' − I|

        total: the same of all of them together: norms of all, the mean overlap, the worst orthogonality; and
            `skipped_steps`, and `wire_bytes` that a step moves, per rank (`placement`). Without the former if nothing
            has been measured yet.
    """

    matrices: dict[str, dict[str, float]] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)


class Inspectable(Capturable):
    """What `LDAdamW` tells of itself."""

    def placement(self) -> Placement:
        """Where every parameter's states are, who owns its matrices, how it is stepped and what that moves.

        `print(optimizer.placement())` gives a table. It asks no other rank, before the first step and after.
        """
        self.attach_found()
        parts = self._stepped_together(list(self._entries(whole_engine=True)))
        windows = (self._windows([entry for entry in part if entry.matrices is not None]) for part in parts)
        return Placement(row for part, plan in zip(parts, windows, strict=True) for row in placement(part, plan))

    def metrics(self) -> Metrics:
        """What the last measured steps were like; see `metrics_every`. Collective, where the parameters are shared.

        A step is measured if its number is a multiple of `metrics_every`. Nothing is read from the device before this
        is called.
        """
        self.attach_found()
        entries = [entry for entry in self._entries(whole_engine=True) if entry.matrices is not None]
        values = torch.full((sum(entry.number for entry in entries), len(_COLUMNS)), -math.inf, dtype=torch.float64)
        for rows, entry in zip(values.split([entry.number for entry in entries]), entries, strict=True):
            for number, row in self._measures.get(entry.name, {}).items():
                rows[number] = row.cpu().double().nan_to_num(nan=-math.inf)
        for group in groups_of(entries):  # a matrix of a stack may lie on other ranks alone
            values = agree(values, *group)
        total = {"skipped_steps": float(self.skipped_steps)}
        total["wire_bytes"] = float(sum(row.wire_bytes for row in self.placement()))
        measured = values[:, 1] >= 0
        if bool(measured.any()):
            total = {**_metrics(values[measured]), **total}
        names = [f"{e.name}[{i}]" if e.stacked else e.name for e in entries for i in range(e.number)]
        found = zip(names, values, measured.tolist(), strict=True)
        return Metrics({name: _metrics(row[None]) for name, row, known in found if known}, total)

    def _keep_measures(self, entries: Sequence[Entry], measured: Sequence[Measured]) -> None:
        """Keep what was measured in a step, until `metrics` is called; it stays on the device."""
        for number, slot, row in measured:
            entry = entries[number]
            self._measures.setdefault(entry.name, {})[entry.held[0] + slot] = row

    @property
    def _measures(self) -> dict[str, dict[int, Tensor]]:
        kept: dict[str, dict[int, Tensor]] = self.__dict__.setdefault("_kept_measures", {})
        return kept


def _metrics(values: Tensor) -> dict[str, float]:
    """Metrics of matrices together, from a row of `_COLUMNS` for each; negative infinity where unknown."""
    columns: dict[str, Any] = dict(zip(_COLUMNS, values.mT, strict=True))
    found = {
        "grad_norm": columns["grad"].sum().sqrt(),
        "update_norm": columns["update"].sum().sqrt(),
        "error_norm": columns["error"].sum().sqrt(),
        "captured_energy": columns["low_rank_grad"].sum() / columns["accumulated"].sum(),
        "orthogonality": columns["orthogonality"].max(),
    }
    turned = columns["overlap"][columns["overlap"] >= 0]
    if len(turned):
        found["subspace_overlap"] = turned.mean()
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}
