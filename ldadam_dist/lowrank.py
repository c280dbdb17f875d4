"""The rule for matrices that are projected: the LDAdam step of all of them, window by window."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ldadam_dist.buckets import Matrix, add_gradients, batches, load_block, store_block
from ldadam_dist.costs import choose_communication
from ldadam_dist.edges import shared_edges
from ldadam_dist.entries import MISSING, NONZERO, Entry
from ldadam_dist.fragments import CutMatrix, complete_rows, hand_back
from ldadam_dist.layout import MatrixLayout
from ldadam_dist.measures import summed
from ldadam_dist.plan import Unit, make_plan
from ldadam_dist.requests import Exchange
from ldadam_dist.rules import compute_dtype, learning_rate
from ldadam_dist.runtime import Job, during, listed, run
from ldadam_dist.separate import is_fake
from ldadam_dist.state import matrices_here
from ldadam_dist.step import Block, Hyper, ldadam_step, step_on_owner
from ldadam_dist.whole import Progress

EXACT_INIT_SIZE = 256
"""With projector_init="auto", the first projector comes from an SVD if the smaller dimension of the matrix is at most
this, and from a randomised subspace iteration if it is larger."""

CACHED_ELEMENTS = 2**18
"""Elements of projectors and moments in a batch of large matrices on a CPU, so that they stay in a core's cache."""

Measured: TypeAlias = tuple[int, int, Tensor]
"""Number of the parameter, of the matrix among those that lie here, and (7,): ‖G‖² and `measures.MEASURES`."""

_Moving: TypeAlias = tuple[Any, Unit, Matrix, int | Tensor]
"""A matrix that is stepped: what must be equal in a batch, its place in the plan, its storage, the step's number."""


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


@dataclass(frozen=True)
class OnDevice:
    """What the device alone knows of a step that the host does not see; all matrices have been stepped before.

    Attributes:
        usable: bool (), whether all gradients are: whether to step at all.
        moves: for each parameter, bool (number,), which of its matrices are stepped; others rest.
    """

    usable: Tensor
    moves: Sequence[Tensor]


def step_matrices(
    entries: Sequence[Entry],
    plan: Sequence[Sequence[Sequence[Unit]]],
    unseen: OnDevice | None = None,
    progress: Progress | None = None,
) -> list[Measured]:
    """Step every matrix whose gradient is not zero on all ranks; collective.

    Others rest: their states stay as they are, and only their weight decays. So a matrix starts with its first gradient
    that is not zero everywhere.

    Args:
        entries: all parameters that are projected, as in `plan_windows`.
        plan: from `plan_windows`.
        unseen: then the host reads nothing.
        progress: how far this step had come when it was interrupted; kept up to date.
    Returns:
        what was measured (the group's `metrics_every`).
    """
    measured: list[Measured] = []
    progress = progress or Progress()
    steps = [_next_steps(entry) for entry in entries] if unseen is None else _next_steps_there(entries)
    moves = [[status == NONZERO for status in entry.statuses] for entry in entries]

    def moving(window: Sequence[Unit]) -> list[_Moving]:
        here: dict[int, tuple[list[Matrix], Hyper]] = {}
        found: list[_Moving] = []
        for unit in window:
            entry, (start, stop) = entries[unit.entry], entries[unit.entry].held
            number = start + unit.slot
            if number >= stop or entry.statuses[number] == MISSING or _key(unit) in progress.done:
                continue
            if unit.entry not in here:
                here[unit.entry] = matrices_here(entry, unit.layout), _hyper(entry, unseen is not None)
            matrices, hyper = here[unit.entry]
            every = entry.group["metrics_every"]
            if moves[unit.entry][number]:
                matrix = matrices[unit.slot]
                if _key(unit) in progress.formed:
                    matrix = replace(matrix, grad=None)
                t = steps[unit.entry][number]
                if every and t % every == 0:
                    hyper = replace(hyper, measured=True)
                how = (type(matrix), unit.layout, unit.communication, hyper, t if isinstance(t, int) else None)
                where = (compute_dtype(entry.param.dtype), entry.adapter.device)
                found.append(((*how, *where), unit, matrix, t))
            else:
                progress.changing.add(_key(unit))
                matrices[unit.slot].weight.mul_(1 - hyper.lr * hyper.weight_decay)
                progress.done.add(_key(unit))
                progress.changing.remove(_key(unit))
        return found

    for windows in plan:
        together = [moving(window) for window in windows]
        with during(partial(_stepped, entries, list(chain(*together)))):
            run(_jobs(moving, unseen, measured, progress) for moving in together)
    progress.closed = True
    if unseen is not None:
        counts = [entry.state["step"] for entry in entries]
        torch._foreach_add_(counts, [m.view_as(c).float() for m, c in zip(unseen.moves, counts, strict=True)])
        return measured
    for entry, moved in zip(entries, moves, strict=True):
        if entry.present:
            step = entry.state["step"]
            step += torch.tensor(moved, device=step.device) if len(moved) > 1 else moved[0]
    return measured


def _next_steps(entry: Entry) -> list[Any]:
    """The number of the step that each matrix takes."""
    if not entry.present:
        return [1] * entry.number
    if is_fake(entry.state["step"]):
        return [2] * entry.number  # a step like any but the first
    return [int(step) + 1 for step in entry.state["step"].reshape(-1).tolist()]


def _next_steps_there(entries: Sequence[Entry]) -> list[list[Any]]:
    """The same as float64 tensors (), which the host does not read."""
    steps = torch.cat([entry.state["step"].reshape(-1) for entry in entries]).double() + 1
    return [list(some) for some in steps.split([entry.number for entry in entries])]


def _stepped(entries: Sequence[Entry], moving: Sequence[_Moving]) -> str:
    return f"stepped {listed(dict.fromkeys(entries[unit.entry].name for _, unit, *_ in moving))}"


def _key(unit: Unit) -> tuple[int, int]:
    """A matrix in `Progress`."""
    return unit.entry, unit.slot


def _jobs(
    moving: Sequence[_Moving], unseen: OnDevice | None, measured: list[Measured], progress: Progress
) -> Iterator[Job]:
    for batch in batches([(key, matrix.layout, _most_together(key)) for key, _, matrix, _ in moving]):
        (_, layout, communication, hyper, t, dtype, device), *_ = moving[batch[0]]
        _, units, matrices, steps = zip(*(moving[i] for i in batch), strict=True)
        at = torch.stack(steps).view(-1, 1, 1) if t is None else t
        function: Callable[..., Exchange] = step_on_owner if communication == "gather" else ldadam_step
        step = partial(function, layout=layout, hyper=hyper, t=at)
        moves = None if unseen is None else [unseen.moves[unit.entry][unit.slot] for unit in units]
        decays = 1.0 if unseen is None else unseen.usable.to(dtype)
        storage = (
            partial(load_block, matrices, dtype, device, steps, moves, decays, hyper.measured),
            partial(add_gradients, matrices, moves=moves),
            partial(store_block, matrices, t=steps, moves=moves),
        )
        tell = partial(_tell, measured, units, layout) if hyper.measured else None
        owners, come = tuple(unit.owner for unit in units), _Come(progress, list(map(_key, units)))
        yield Job(layout, device, owners, partial(_exchange, matrices, step, *storage, device, tell, come))


def _most_together(key: Any) -> int:
    """How many large matrices one batch may have: what is of rank size is then one call for all of them.

    A GPU starts fewer kernels, the more there are. What a step brings together whole must be a single tensor.
    """
    _, layout, communication, hyper, t, _, device = key
    if communication != "lowrank" or hyper.proj_method != "power_iteration" or t == 1:
        return 1
    if device.type != "cpu":
        return sys.maxsize
    factors = layout.rank * (layout.m_pieces.longest + layout.n_pieces.longest)
    return int(max(1, CACHED_ELEMENTS // factors))


def _exchange(
    matrices: Sequence[Matrix],
    step: Callable[[Block], Exchange],
    load: Callable[[], Block],
    form: Callable[[Block], bool],
    store: Callable[..., None],
    device: torch.device,
    tell: Callable[[Block], Exchange] | None,
    come: _Come,
) -> Exchange:
    """A step of equal matrices, from what is stored to what is stored."""
    cut = [matrix for matrix in matrices if isinstance(matrix, CutMatrix)]  # all or none
    if cut:
        yield from complete_rows(cut, device)
    block = load()
    block.begin = come.changes
    come.changes()
    come.forms(in_place=form(block))
    states = yield from step(block)
    if tell is not None:
        yield from tell(block)
    edges = yield from shared_edges([matrix.error for matrix in matrices], block.accumulated, matrices[0].layout)
    store(block=block, states=states, edges=edges)
    come.ends()
    if cut:
        yield from hand_back(cut, device)


@dataclass(frozen=True)
class _Come:
    """How far a batch has come."""

    progress: Progress
    keys: Sequence[tuple[int, int]]

    def changes(self) -> None:
        self.progress.changing.update(self.keys)

    def forms(self, in_place: bool) -> None:
        if in_place:
            self.progress.formed.update(self.keys)
        self.progress.changing.difference_update(self.keys)

    def ends(self) -> None:
        self.progress.done.update(self.keys)
        self.progress.changing.difference_update(self.keys)


def _tell(measured: list[Measured], units: Sequence[Unit], layout: MatrixLayout, block: Block) -> Exchange:
    """Add what was measured of a batch to `measured`; the squares of the gradients come first, NaN where unknown."""
    assert block.measures is not None
    grads = torch.full_like(block.measures[:, :1], torch.nan)
    if block.grad_squares is not None:
        grads = yield from summed(block.grad_squares[:, None] / layout.sync.count, layout)
    measured += [(u.entry, u.slot, row) for u, row in zip(units, torch.cat([grads, block.measures], -1), strict=True)]


def _hyper(entry: Entry, on_device: bool) -> Hyper:
    group = entry.group
    assert entry.matrices is not None
    init, method = group["projector_init"], group["proj_method"]
    small = min(entry.matrices[1:]) <= EXACT_INIT_SIZE
    exact = init == "svd" or (init == "auto" and (method == "svd" or (small and method != "svd_lowrank")))
    return Hyper(
        lr=learning_rate(group) if on_device else float(learning_rate(group)),
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        rho=group["rho"],
        proj_method=method,
        error_feedback=group["error_feedback"],
        exact_init=exact,
    )
