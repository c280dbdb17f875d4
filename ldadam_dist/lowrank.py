"""The rule for matrices that are projected: the LDAdam step of all of them, window by window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.buckets import Matrix, batches, load_block, store_block
from ldadam_dist.costs import choose_communication
from ldadam_dist.entries import MISSING, NONZERO, ZERO, Entry
from ldadam_dist.plan import Unit, make_plan
from ldadam_dist.rules import compute_dtype
from ldadam_dist.runtime import Job, run
from ldadam_dist.state import matrices_here
from ldadam_dist.step import Hyper, ldadam_step, step_on_owner

EXACT_INIT_SIZE = 256
"""With projector_init="auto", the first projector comes from an SVD if the smaller dimension of the matrix is at most
this, and from a randomised subspace iteration if it is larger."""


def plan_windows(entries: Sequence[Entry], window: int) -> list[list[Unit]]:
    """What is stepped together, by whom and how; from metadata alone, so the same on every rank.

    Args:
        entries: all parameters that are projected.
        window: elements in flight together.
    """
    matrices = []
    for entry in entries:
        layout, group = entry.layout(), entry.group
        how = choose_communication(
            layout, group["communication"], window, group["proj_method"], group["error_feedback"]
        )
        matrices.append((layout, entry.most_held, how))
    return make_plan(matrices, window)


def step_matrices(
    entries: Sequence[Entry], states: Mapping[Tensor, dict[str, Any]], windows: Sequence[Sequence[Unit]]
) -> None:
    """Step every matrix that has a gradient; collective.

    A matrix starts with its first gradient that is not zero everywhere; until then only its weight decays.

    Args:
        entries: all parameters that are projected, as in `plan_windows`.
        states: the state of each parameter.
        windows: from `plan_windows`.
    """
    steps = [states[entry.param]["step"].reshape(-1).tolist() for entry in entries]
    moves = [
        [status == NONZERO or (status == ZERO and step > 0) for status, step in zip(e.statuses, counts, strict=True)]
        for e, counts in zip(entries, steps, strict=True)
    ]
    for window in windows:
        here: dict[int, tuple[list[Matrix], Hyper]] = {}
        moving: list[tuple[Any, Unit, Matrix]] = []
        for unit in window:
            entry, (start, stop) = entries[unit.entry], entries[unit.entry].held
            number = start + unit.slot
            if number >= stop or entry.statuses[number] == MISSING:
                continue
            if unit.entry not in here:
                here[unit.entry] = matrices_here(entry, states[entry.param], unit.layout), _hyper(entry)
            matrices, hyper = here[unit.entry]
            if moves[unit.entry][number]:
                how = (unit.layout, unit.communication, hyper, int(steps[unit.entry][number]) + 1)
                where = (compute_dtype(entry.param.dtype), entry.adapter.device)
                moving.append(((*how, *where), unit, matrices[unit.slot]))
            else:  # there is no direction yet to project on
                matrices[unit.slot].weight.mul_(1 - hyper.lr * hyper.weight_decay)
        run(_jobs(moving))
    for entry, moved in zip(entries, moves, strict=True):
        step = states[entry.param]["step"]
        step += torch.tensor(moved, device=step.device) if len(moved) > 1 else moved[0]


def _jobs(moving: Sequence[tuple[Any, Unit, Matrix]]) -> Iterator[Job]:
    for batch in batches([(key, matrix.layout) for key, _, matrix in moving]):
        (layout, communication, hyper, t, dtype, device), _, _ = moving[batch[0]]
        step = step_on_owner if communication == "gather" else ldadam_step
        matrices, owners = [moving[i][2] for i in batch], tuple(moving[i][1].owner for i in batch)
        yield _job(
            matrices,
            owners,
            partial(load_block, matrices, dtype, device),
            partial(step, layout=layout, hyper=hyper, t=t),
        )


def _job(matrices: list[Matrix], owners: tuple[int, ...], load: Any, step: Any) -> Job:
    block = None

    def start() -> Any:
        nonlocal block
        block = load()
        return step(block)

    def finish(states: tuple[Tensor, Tensor, Tensor]) -> None:
        assert block is not None
        store_block(matrices, block, states)

    return Job(matrices[0].layout, owners, start, finish)


def _hyper(entry: Entry) -> Hyper:
    group = entry.group
    assert entry.matrices is not None
    init, method = group["projector_init"], group["proj_method"]
    small = min(entry.matrices[1:]) <= EXACT_INIT_SIZE
    exact = init == "svd" or (init == "auto" and (method == "svd" or (small and method != "svd_lowrank")))
    return Hyper(
        lr=float(group["lr"]),
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        rho=group["rho"],
        proj_method=method,
        error_feedback=group["error_feedback"],
        exact_init=exact,
    )
