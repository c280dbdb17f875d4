"""The rule for matrices that are projected: the LDAdam step of all of them, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch

from ldadam_dist.buckets import Matrix, batches, load_block, store_block
from ldadam_dist.costs import choose_communication
from ldadam_dist.entries import MISSING, NONZERO, ZERO, Entry
from ldadam_dist.fragments import CutMatrix, complete_rows, hand_back
from ldadam_dist.plan import Unit, make_plan
from ldadam_dist.requests import Exchange
from ldadam_dist.rules import compute_dtype
from ldadam_dist.runtime import Job, during, listed, run
from ldadam_dist.state import matrices_here
from ldadam_dist.step import Block, Hyper, ldadam_step, step_on_owner

EXACT_INIT_SIZE = 256
"""With projector_init="auto", the first projector comes from an SVD if the smaller dimension of the matrix is at most
this, and from a randomised subspace iteration if it is larger."""

ONE_BY_ONE = ("cpu",)
"""Types of devices on which large matrices are not batched."""

_Moving: TypeAlias = tuple[Any, Unit, Matrix]
"""A matrix that is stepped: what must be equal in a batch, its place in the plan, its storage."""


def plan_windows(entries: Sequence[Entry], window: int, turn: int = 0) -> list[list[list[Unit]]]:
    """What is stepped together, by whom and how; from metadata alone, so the same on every rank.

    Args:
        entries: all parameters that are projected.
        window: elements in flight together.
        turn: see `plan.assign_owners`.
    """
    matrices = []
    for entry in entries:
        layout, group = entry.layout(), entry.group
        how = choose_communication(
            layout, group["communication"], window, group["proj_method"], group["error_feedback"]
        )
        matrices.append((layout, entry.most_held, how))
    return make_plan(matrices, window, turn)


def step_matrices(entries: Sequence[Entry], plan: Sequence[Sequence[Sequence[Unit]]]) -> None:
    """Step every matrix that has a gradient; collective.

    A matrix starts with its first gradient that is not zero everywhere; until then only its weight decays.

    Args:
        entries: all parameters that are projected, as in `plan_windows`.
        plan: from `plan_windows`.
    """
    steps = [entry.state["step"].reshape(-1).tolist() if entry.present else [0.0] * entry.number for entry in entries]
    moves = [
        [status == NONZERO or (status == ZERO and step > 0) for status, step in zip(e.statuses, counts, strict=True)]
        for e, counts in zip(entries, steps, strict=True)
    ]

    def moving(window: Sequence[Unit]) -> list[_Moving]:
        here: dict[int, tuple[list[Matrix], Hyper]] = {}
        found: list[_Moving] = []
        for unit in window:
            entry, (start, stop) = entries[unit.entry], entries[unit.entry].held
            number = start + unit.slot
            if number >= stop or entry.statuses[number] == MISSING:
                continue
            if unit.entry not in here:
                here[unit.entry] = matrices_here(entry, unit.layout), _hyper(entry)
            matrices, hyper = here[unit.entry]
            if moves[unit.entry][number]:
                matrix = matrices[unit.slot]
                how = (type(matrix), unit.layout, unit.communication, hyper, int(steps[unit.entry][number]) + 1)
                where = (compute_dtype(entry.param.dtype), entry.adapter.device)
                found.append(((*how, *where), unit, matrix))
            else:  # there is no direction yet to project on
                matrices[unit.slot].weight.mul_(1 - hyper.lr * hyper.weight_decay)
        return found

    for windows in plan:
        together = [moving(window) for window in windows]
        with during(partial(_stepped, entries, list(chain(*together)))):
            run(map(_jobs, together))
    for entry, moved in zip(entries, moves, strict=True):
        if entry.present:
            step = entry.state["step"]
            step += torch.tensor(moved, device=step.device) if len(moved) > 1 else moved[0]


def _stepped(entries: Sequence[Entry], moving: Sequence[_Moving]) -> str:
    return f"stepped {listed(dict.fromkeys(entries[unit.entry].name for _, unit, _ in moving))}"


def _jobs(moving: Sequence[_Moving]) -> Iterator[Job]:
    for batch in batches([(key, matrix.layout, _separate(key)) for key, _, matrix in moving]):
        (_, layout, communication, hyper, t, dtype, device), _, _ = moving[batch[0]]
        step = partial(step_on_owner if communication == "gather" else ldadam_step, layout=layout, hyper=hyper, t=t)
        matrices, owners = [moving[i][2] for i in batch], tuple(moving[i][1].owner for i in batch)
        yield Job(layout, device, owners, partial(_exchange, matrices, step, dtype, device, t))


def _separate(key: Any) -> bool:
    """Whether large matrices are stepped in one batch too. A GPU then starts fewer kernels, and its small ones do more.

    On a CPU each stays by itself, and in the cache. What a step brings together whole must be a single tensor.
    """
    _, _, communication, hyper, t, _, device = key
    by_products = communication == "lowrank" and hyper.proj_method == "power_iteration" and t > 1
    return by_products and device.type not in ONE_BY_ONE


def _exchange(
    matrices: list[Matrix], step: Callable[[Block], Exchange], dtype: torch.dtype, device: torch.device, t: int
) -> Exchange:
    """The `t`-th step of equal matrices, from what is stored to what is stored."""
    cut = [matrix for matrix in matrices if isinstance(matrix, CutMatrix)]  # all or none
    if cut:
        yield from complete_rows(cut, device)
    block = load_block(matrices, dtype, device, t)
    states = yield from step(block)
    store_block(matrices, block, states, t)
    if cut:
        yield from hand_back(cut, device)


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
