"""One trainable parameter in a step: what it is, how it is stored, and what its gradient is like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.adapters import Adapter
from ldadam_dist.layout import Bounds, MatrixLayout
from ldadam_dist.rules import Side, projected_side
from ldadam_dist.runtime import ranks_of

MISSING, ZERO, NONZERO, UNUSABLE = -1, 0, 1, 2
"""Status of a gradient. The largest on any rank counts, on all of them."""


@dataclass
class Entry:
    """One trainable parameter in this step.

    Attributes:
        name: how messages call it.
        param: the tensor that is stepped; in a flat one there are several parameters.
        group: its parameter group.
        adapter: how it is stored.
        matrices: (number, rows, columns) of the matrices that are projected; None for AdamW.
        shape: its global shape.
        state: its state, empty if there is none yet.
        local_grad: its gradient on this process, if there is one; zeros where only another rank has one.
        statuses: of the gradient of each of its matrices (of the whole gradient for AdamW), on all ranks that share it.
        accumulated: whether the gradient, if there is one, is in the error already (error_in_grad).
        refusal: why nothing may be stepped, on any rank, if there is a reason here.
    """

    name: str
    param: Tensor
    group: dict[str, Any]
    adapter: Adapter
    matrices: tuple[int, int, int] | None
    shape: tuple[int, ...]
    state: dict[str, Any] = field(default_factory=dict, repr=False)
    local_grad: Tensor | None = field(default=None, repr=False)
    statuses: list[int] = field(default_factory=list)
    accumulated: bool = False
    refusal: Exception | None = None

    @property
    def status(self) -> int:
        """Status of the whole gradient."""
        return max(self.statuses, default=MISSING)

    @property
    def grad(self) -> Tensor:
        """The local gradient of a parameter that is stepped."""
        return torch.zeros_like(self.adapter.local(self.param)) if self.local_grad is None else self.local_grad

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of matrices, whose states have a leading dimension, `step` too."""
        return self.matrices is not None and len(self.shape) > 2 and not self.group["flatten"]

    @property
    def present(self) -> bool:
        """Whether this process takes part in its steps."""
        return self.adapter.present

    @property
    def number(self) -> int:
        """How many matrices, and so statuses, it has."""
        return self.matrices[0] if self.matrices else 1

    @property
    def held(self) -> Bounds:
        """(start, stop) of the matrices that lie on this process."""
        if not self.present:
            return 0, 0
        return self.adapter.held(self.number)[0] if self.stacked else (0, 1)

    @property
    def most_held(self) -> int:
        """Matrices that lie on any process, at most."""
        return self.adapter.held(self.number)[1] if self.stacked else 1

    @property
    def side(self) -> Side:
        """The side of its matrices that is projected."""
        assert self.matrices is not None
        return projected_side(self.matrices[1:], self.group["proj_type"])

    def layout(self) -> MatrixLayout:
        """How each of its matrices is cut."""
        assert self.matrices is not None
        return self.adapter.layout(*self.matrices[1:], self.side, self.group["rank"])


def names_of(group: Mapping[str, Any], number: int) -> list[str]:
    """Names of a group's parameters for messages: their own, or their place."""
    names: list[str] = group.get("param_names") or []
    count = len(group["params"])
    return names if len(names) == count else [f"#{i} of group {number}" for i in range(count)]


def first_matrix(entries: Iterable[Entry]) -> str:
    """Name of the first parameter that is projected."""
    return next((entry.name for entry in entries if entry.matrices is not None), "of which there is none here")


def groups_of(entries: Iterable[Entry]) -> list[tuple[Any, torch.device]]:
    """The process groups of all parameters with their devices, in an order that does not depend on the parameters.

    All slices of one mesh dimension have the same stride. Sorted by that, one pass over the groups, each telling what
    it has heard so far, reaches every rank of a mesh; and it is the same order on all ranks.
    """

    def key(group: tuple[Any, torch.device]) -> tuple[int, list[int], str]:
        ranks = ranks_of(group[0])
        return ranks[-1] - ranks[-2] if len(ranks) > 1 else 0, ranks, group[0].group_name

    return sorted({group for entry in entries for group in entry.adapter.groups}, key=key)
