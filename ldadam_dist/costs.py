"""What a step of one matrix moves and computes, from its layout alone; so every process comes to the same choice.

Elements are those of the whole tensor that a collective deals with, on one rank: an all-reduce counts twice, any other
collective once, and an all-to-all what a rank sends or receives on average. `traffic` measures by the same convention.
"""

from __future__ import annotations

from typing import Literal

from ldadam_dist.layout import MatrixLayout

Communication = Literal["lowrank", "gather"]
"""How a matrix is stepped: on its shards, which exchange low-rank factors, or whole on its owner."""


def wire_elements(
    layout: MatrixLayout, communication: str, proj_method: str = "power_iteration", error_feedback: bool = True
) -> float:
    """Elements that one step of one matrix moves, per rank; the first step, which finds the projector, moves others.

        lowrank   kept dimension cut       3·m·r + r + 1   gather U; reduce Y and its sizes to the owner; broadcast U'
                  projected dimension cut  r·(2m/P + 6n)   rows of Y and U' to the owner and back; M, UᵀA and g, UtB,
                                           + 2·r² + r + 1  the lost part and D; R; sizes of Y
                  replicas                 r·n more        the update's factor D
                  own gradients            5·r·n more      UᵀA and g, UtB, M and D (n/P where both are cut)
        gather    3·m·n/P and the states twice, for each cut dimension; under replicas the dense update

    where m and n are the parts that the other dimension's cut leaves.

    Args:
        layout: how the matrix is cut.
        communication: "lowrank" or "gather".
        proj_method, error_feedback: as in `LDAdamW`; a decomposition at every step moves the matrix, and without an
            error there is less to move.
    """
    if layout.whole:
        return 0.0
    m, n, r, shared = layout.m, layout.n, layout.rank, layout.processes
    m_local, n_local = layout.m_pieces.longest, layout.n_pieces.longest
    hops = (layout.over_m.count > 1) + (layout.over_n.count > 1)
    replicated = layout.replicas.count > 1
    weight_columns = layout.replicas.count * n_local
    elements = 0.0
    if communication == "gather":
        elements += (2 + error_feedback) * m * n + 2 * r * (m + 2 * n)
        return hops * elements / shared + replicated * m_local * weight_columns
    sizes = r + 1 if proj_method == "power_iteration" else 0
    if layout.over_n.count > 1:
        elements += 3 * m_local * r + sizes
    if layout.over_m.count > 1:
        gathers = 5 + error_feedback
        elements += gathers * n_local * r + 2 * m * r / shared + 2 * r * r + sizes
    if proj_method != "power_iteration":
        elements += hops * m * n / shared
    if layout.sync.count > 1:
        elements += 5 * r * layout.over_m.pieces(n_local).longest
    return elements + replicated * r * weight_columns


def choose_communication(
    layout: MatrixLayout, asked: str, window: int, proj_method: str = "power_iteration", error_feedback: bool = True
) -> Communication:
    """How a matrix is stepped: as asked, or with "auto" in the way that moves fewer elements.

    A matrix larger than the window is not brought together on one rank unless that is asked for.

    Args:
        layout: how the matrix is cut.
        asked: "auto", "lowrank" or "gather".
        window: elements that may be in flight together.
        proj_method, error_feedback: as in `wire_elements`.
    """
    if asked in ("lowrank", "gather"):
        return "lowrank" if asked == "lowrank" or layout.whole else "gather"
    if layout.whole or layout.sync.count > 1 or layout.m * layout.n > window:
        return "lowrank"
    options: tuple[Communication, ...] = ("lowrank", "gather")
    return min(options, key=lambda option: wire_elements(layout, option, proj_method, error_feedback))


def owner_work(layout: MatrixLayout, communication: Communication) -> int:
    """Multiplications that a step asks of the matrix's owner alone: a QR, and with "gather" all products."""
    m, n, r = layout.m, layout.n, layout.rank
    return 2 * m * r * r + (6 * m * n * r if communication == "gather" else 0)
