"""Elements that a step moves for one matrix, per rank: low-rank factors against gathering the matrix on its owner.

    python benchmarks/wire.py --shape 4096 4096 --ranks 32 128 512 --processes 8 64 256

Prints Markdown. It needs no process group and no hardware: the counts follow from the layout, and tests/test_wire.py
holds them to what `ldadam_dist.Traffic` counts. What FSDP2 and DDP move themselves is left out.
"""

from __future__ import annotations

import argparse

from ldadam_dist.costs import choose_communication, wire_elements
from ldadam_dist.layout import Axis, MatrixLayout
from ldadam_dist.plan import WINDOW_ELEMENTS


def layouts(m: int, n: int, rank: int, processes: int) -> dict[str, MatrixLayout]:
    """The layouts that are compared, of an oriented m × n matrix."""
    axis = Axis((processes,), 0, "group")
    return {
        "kept dimension cut": MatrixLayout(m, n, rank, over_n=axis),
        "projected dimension cut": MatrixLayout(m, n, rank, over_m=axis),
        "replicas": MatrixLayout(m, n, rank, over_n=axis, replicas=axis),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), help="projected and kept dimension")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128, 512], help="ranks of the projection")
    parser.add_argument("--processes", type=int, nargs="+", default=[8, 64, 256])
    args = parser.parse_args()
    m, n = args.shape
    print(f"A {m} × {n} matrix ({m * n:,} elements); in millions of elements a rank and step, * what auto takes\n")
    print("| layout | r | processes | lowrank | gather |\n|---|---|---|---|---|")
    for rank in args.ranks:
        for processes in args.processes:
            for name, layout in layouts(m, n, rank, processes).items():
                chosen = choose_communication(layout, "auto", WINDOW_ELEMENTS)
                cells = (
                    f"{wire_elements(layout, how) / 1e6:.2f}{' *' if how == chosen else ''}"
                    for how in ("lowrank", "gather")
                )
                print(f"| {name} | {rank} | {processes} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
