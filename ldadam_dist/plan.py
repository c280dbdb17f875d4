"""Where each matrix is stepped, by whom and together with which others: decided once, from metadata alone.

Shapes, meshes and settings are the same on every rank that shares a matrix, and nothing else is used here. So all
ranks cut the work into the same windows and agree on the owners without a word.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from ldadam_dist.costs import Communication, owner_work
from ldadam_dist.layout import MatrixLayout

WINDOW_ELEMENTS = 2**25
"""Elements of matrices in flight together on a rank, by default: 128 MiB in float32."""

SIDE_BY_SIDE = 2
"""Windows that run side by side: while the collectives of one are on their way, the other computes."""


@dataclass(frozen=True)
class Unit:
    """One matrix of a parameter, or the place of one: other ranks may hold one expert more than this.

    Attributes:
        entry: number of the parameter among those that are projected.
        slot: number of the matrix among those that a rank holds of it.
        layout: how it is cut.
        communication: how it is stepped.
        owner: number of its owner among the processes that share it.
    """

    entry: int
    slot: int
    layout: MatrixLayout
    communication: Communication
    owner: int


def make_plan(
    matrices: Sequence[tuple[MatrixLayout, int, Communication]], window: int, turn: int = 0
) -> list[list[list[Unit]]]:
    """Windows of units, and which of them run side by side: one such set after the other.

    Args:
        matrices: for each parameter the layout of its matrices, how many of them a rank holds at most, and how they are
            stepped.
        window: elements in flight together: of weights and factors on a rank, and of the matrices gathered on it. A
            window has at least one unit, and is alone if there is no room for another.
        turn: see `assign_owners`.
    """
    slots = [(e, s, layout, how) for e, (layout, count, how) in enumerate(matrices) for s in range(count)]
    owners = assign_owners([(layout, how) for _, _, layout, how in slots], turn)
    units = [Unit(*slot, owner) for slot, owner in zip(slots, owners, strict=True)]
    plan: list[list[list[Unit]]] = []
    room = 0
    for together, size in _windows(units, window // SIDE_BY_SIDE):
        if not plan or len(plan[-1]) == SIDE_BY_SIDE or size > room:
            plan.append([])
            room = window
        plan[-1].append(together)
        room -= size
    return plan


def assign_owners(matrices: Sequence[tuple[MatrixLayout, Communication]], turn: int = 0) -> list[int]:
    """For each matrix the number, among the processes that share it, of the one that owns it.

    The heaviest matrix goes first, each to the process with the least work so far; of several that have as little, to
    the first from number `turn` on.
    """
    load: dict[Hashable, list[int]] = {}
    owners = [0] * len(matrices)
    work = [owner_work(*matrix) for matrix in matrices]
    for i in sorted(range(len(matrices)), key=lambda i: -work[i]):
        layout = matrices[i][0]
        so_far = load.setdefault((layout.over_m.group, layout.over_n.group), [0] * layout.processes)
        count = layout.processes
        owners[i] = min(range(count), key=lambda p: (so_far[p], (p - turn) % count))
        so_far[owners[i]] += work[i]
    return owners


def _windows(units: Iterable[Unit], window: int) -> Iterable[tuple[list[Unit], int]]:
    """Units that are stepped together, and the elements in flight on the rank that has most."""
    together: list[Unit] = []
    blocks, gathered = 0, dict[Hashable, int]()
    for unit in units:
        layout = unit.layout
        place = (layout.over_m.group, layout.over_n.group, unit.owner)
        whole = layout.m * layout.n if unit.communication == "gather" else 0
        most = max([*gathered.values(), gathered.get(place, 0) + whole])
        if together and blocks + layout.held_elements + most > window:
            yield together, blocks + max(gathered.values())
            together, blocks, gathered = [], 0, {}
        together.append(unit)
        blocks += layout.held_elements
        gathered[place] = gathered.get(place, 0) + whole
    if together:
        yield together, blocks + max(gathered.values())
