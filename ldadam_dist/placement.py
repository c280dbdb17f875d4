"""Where everything is: which rank owns a matrix, what each rank holds of its states, what a step moves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from ldadam_dist.costs import wire_elements
from ldadam_dist.entries import Entry
from ldadam_dist.layout import Bounds, MatrixLayout
from ldadam_dist.plan import Unit
from ldadam_dist.quantized import row_bytes
from ldadam_dist.rules import compute_dtype, state_shapes, stored_error_dtype, stored_state_dtype
from ldadam_dist.state import PARTS, first_column, local_error_shape
from ldadam_dist.tables import format_bytes, table


@dataclass(frozen=True)
class Placed:
    """One trainable parameter.

    Attributes:
        name, shape: its name and its global shape.
        mesh: which mesh dimensions cut what, with their sizes: "rows/fsdp 8, columns/tp 2". Its states are cut by all
            of them, replicas included.
        side: the projected side, "rows" or "columns"; empty for AdamW.
        communication: "lowrank" or "gather" (see `LDAdamW`), "none" where nobody shares a matrix; "AdamW".
        owners: global ranks that compute the projectors of the matrices that this rank shares; empty where nobody
            shares them.
        state_bytes: of its states, on this rank; `step` is left out.
        error_bytes: those of them that the error takes.
        total_bytes: of its states, over all ranks that share it.
        wire_bytes: that one step moves, per rank, by the count of `costs.wire_elements`; the pieces of cut rows, that
            are lent under DeepSpeed, come on top.
    """

    name: str
    shape: tuple[int, ...]
    mesh: str
    side: str
    communication: str
    owners: tuple[int, ...]
    state_bytes: int
    error_bytes: int
    total_bytes: int
    wire_bytes: int


class Placement(tuple[Placed, ...]):
    """The parameters of an optimizer, in its order; printed as a table."""

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [
            ("parameter", "shape", "mesh", "side", "step", "owner", "state here", "on all ranks", "wire per step")
        ]
        cells += [
            (
                row.name,
                " × ".join(map(str, row.shape)) or "scalar",
                row.mesh,
                row.side,
                row.communication,
                _ranks(row.owners),
                *map(format_bytes, (row.state_bytes, row.total_bytes, row.wire_bytes)),
            )
            for row in self
        ]
        totals = (
            sum(column) for column in zip(*((r.state_bytes, r.total_bytes, r.wire_bytes) for r in self), strict=True)
        )
        lines = table([*cells, ("total", "", "", "", "", "", *map(format_bytes, totals))], "<><<<<>>>")
        lines.insert(-1, lines[1])
        return "\n".join(lines)


def placement(entries: Sequence[Entry], plan: Iterable[Iterable[Iterable[Unit]]]) -> Placement:
    """The placement of all trainable parameters; from metadata alone, so any rank may ask for it by itself.

    Args:
        entries: all parameters.
        plan: of those that are projected.
    """
    units: dict[int, list[Unit]] = {}
    for window in chain.from_iterable(plan):
        for unit in window:
            units.setdefault(unit.entry, []).append(unit)
    planned = iter(range(len(units)))
    return Placement(_matrix(e, units[next(planned)]) if e.matrices else _vector(e) for e in entries)


def _vector(entry: Entry) -> Placed:
    local = entry.adapter.local(entry.param).numel()  # none if it is not here
    item = stored_state_dtype(entry.param.dtype, entry.group["state_dtype"], low_rank=False).itemsize
    whole = math.prod(entry.shape)
    copies, sync = entry.adapter.copies, entry.adapter.sync
    return Placed(
        *(entry.name, entry.shape, entry.adapter.describe(), "", "AdamW", ()),
        state_bytes=2 * local * item,
        error_bytes=0,
        total_bytes=2 * whole * item * copies * (sync.count if sync else 1),
        wire_bytes=2 * local * entry.param.dtype.itemsize if sync else 0,  # of the mean gradient
    )


def _matrix(entry: Entry, units: Sequence[Unit]) -> Placed:
    group, layout, dtype = entry.group, units[0].layout, compute_dtype(entry.param.dtype)
    shapes = state_shapes(entry.shape, group)
    item = stored_state_dtype(entry.param.dtype, group["state_dtype"], low_rank=True).itemsize
    factors = {key: shapes[key] for key in ("projector", "exp_avg", "exp_avg_sq")}
    local = {key: entry.adapter.local_shape(shapes[key], PARTS[key], entry.side) for key in factors}
    here = item * sum(math.prod(local[key]) for key in factors)
    total = item * sum(math.prod(shape) for shape in factors.values())
    error = 0
    if group["error_feedback"]:
        shape = local_error_shape(entry)
        error = math.prod(shape[:-1]) * _row_bytes(entry, shape[-1], first_column(entry))
        rows = math.prod(shapes["error"][:-1]) * (layout.sync.count if entry.side == "right" else 1)
        total += rows * sum(_row_bytes(entry, stop - start, start) for start, stop in _row_pieces(entry, layout))
    start, stop = entry.held
    owners = [entry.adapter.owner_rank(unit.owner, entry.side) for unit in units[: stop - start]]
    wire = wire_elements(layout, units[0].communication, group["proj_method"], group["error_feedback"])
    return Placed(
        name=entry.name,
        shape=entry.shape,
        mesh=entry.adapter.describe(),
        side="rows" if entry.side == "left" else "columns",
        communication="none" if layout.whole else units[0].communication,
        owners=() if layout.whole else tuple(rank for rank in owners if rank is not None),
        state_bytes=here + error,
        error_bytes=error,
        total_bytes=total,
        wire_bytes=round(wire * (stop - start) * dtype.itemsize),
    )


def _row_bytes(entry: Entry, columns: int, first: int) -> int:
    """Bytes of a piece of a row of the error, which begins at column `first`."""
    setting = entry.group["error_dtype"]
    return row_bytes(columns, setting, stored_error_dtype(entry.param.dtype, setting), first)


def _row_pieces(entry: Entry, layout: MatrixLayout) -> tuple[Bounds, ...]:
    """Into what pieces the rows of a matrix are cut; blocks of 8 or 4 bits are filled up in each."""
    return (layout.n_pieces if entry.side == "left" else layout.m_pieces).bounds


def _ranks(owners: Sequence[int]) -> str:
    distinct = sorted(set(owners))
    return ", ".join(map(str, distinct)) if len(distinct) <= 4 else f"{len(distinct)} ranks"
