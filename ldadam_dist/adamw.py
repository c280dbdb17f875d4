"""The rule for every parameter that is not a low-rank matrix: AdamW, by torch's own functional implementation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch.optim.adamw import adamw

from ldadam_dist.entries import MISSING, ZERO, Entry


def step_vectors(entries: Iterable[Entry]) -> None:
    """Step every parameter that has a gradient, in place. It is element-wise, so shards need no communication.

    Args:
        entries: all parameters that are not projected, group by group.
    """
    for _, members in itertools.groupby(filter(_moves, entries), key=lambda entry: id(entry.group)):
        stepped = list(members)
        group = stepped[0].group
        adamw(
            [entry.adapter.local(entry.param) for entry in stepped],
            [entry.grad for entry in stepped],
            [entry.adapter.local(entry.state["exp_avg"]) for entry in stepped],
            [entry.adapter.local(entry.state["exp_avg_sq"]) for entry in stepped],
            [],
            [entry.state["step"] for entry in stepped],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _moves(entry: Entry) -> bool:
    if not entry.present or entry.status == MISSING:
        return False
    # Checkpoint libraries take a step with zero gradients and lr = 0 to learn the state's shape.
    return not (entry.status == ZERO and entry.group["lr"] == 0 and entry.state["step"] == 0)
