"""Elements that a step moves for one matrix, per rank: low-rank factors against gathering the matrix on its owner.

    python benchmarks/wire.py --shape 4096 4096 --ranks 32 128 512 --processes 8 64 256

It needs no process group and no hardware: the counts follow from the layout, and tests/test_wire.py holds them to what
`ldadam_dist.Traffic` counts. What FSDP2 and DDP move themselves is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a file, Python looks for modules in benchmarks/ alone: name the repository as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import Report
from ldadam_dist.costs import choose_communication, wire_elements
from ldadam_dist.layout import Axis, MatrixLayout
from ldadam_dist.plan import WINDOW_ELEMENTS

HOW = ("lowrank", "gather")


def layouts(m: int, n: int, rank: int, processes: int) -> dict[str, MatrixLayout]:
    """The layouts that are compared, of an oriented m × n matrix."""
    axis = Axis((processes,), 0, "group")
    return {
        "kept dimension cut": MatrixLayout(m, n, rank, over_n=axis),
        "projected dimension cut": MatrixLayout(m, n, rank, over_m=axis),
        "replicas": MatrixLayout(m, n, rank, over_n=axis, replicas=axis),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), help="projected and kept dimension")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128, 512], help="ranks of the projection")
    parser.add_argument("--processes", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--out", type=Path, help="folder for wire.md and wire.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Count, print the table, and return what goes to the JSON file."""
    args = parse(argv)
    m, n = args.shape
    report = Report("wire", argv, torch.device("cpu"), None)
    report.facts["matrix"] = f"{m} × {n}, {m * n:,} elements"
    report.lines(["In millions of elements a rank and step; * what auto takes."])
    rows: list[dict[str, Any]] = []
    for rank in args.ranks:
        for processes in args.processes:
            for name, layout in layouts(m, n, rank, processes).items():
                counts = {how: wire_elements(layout, how) for how in HOW}
                auto = choose_communication(layout, "auto", WINDOW_ELEMENTS)
                rows.append({"layout": name, "rank": rank, "processes": processes, "auto": auto, **counts})
    lines = (
        [
            *(row["layout"], str(row["rank"]), str(row["processes"])),
            *(f"{row[how] / 1e6:.2f}{' *' if how == row['auto'] else ''}" for how in HOW),
        ]
        for row in rows
    )
    report.table(("layout", "r", "processes", *HOW), lines)
    report.result["rows"] = rows
    return report.write(args.out)


if __name__ == "__main__":
    main()
