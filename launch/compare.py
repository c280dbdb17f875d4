"""Draw the curves of several runs in one picture and print a table of their results.

python launch/compare.py runs/ldadamw runs/adamw --output comparison.png
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Run as a file, Python looks for modules in launch/ alone: name the repository as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldadam_dist.curves import Record, draw, read_runs


def table(runs: Mapping[str, list[Record]]) -> str:
    """A Markdown table, best final validation loss first."""
    lines = [
        "| run | steps | tokens | validation loss | perplexity | tokens/s | optimizer step, median |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for name, records in runs.items():
        last = records[-1]
        loss = [record["val_loss"] for record in records if record["val_loss"] is not None][-1]
        speed = statistics.median(record["tokens_per_second"] for record in records)
        step_ms = 1e3 * statistics.median(record["optimizer_step_seconds"] for record in records)
        row = f"| {name} | {last['step']:,} | {last['tokens']:,} | {loss:.4f} | {math.exp(loss):.2f} "
        rows.append((loss, f"{row}| {speed:,.0f} | {step_ms:.1f} ms |"))
    return "\n".join([*lines, *(row for _, row in sorted(rows))])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or their log.jsonl")
    parser.add_argument(
        "--output", type=Path, default=Path("comparison.png"), help="the picture (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        runs = read_runs(options.runs)
    except ValueError as error:
        parser.error(str(error))
    for name, records in runs.items():
        if not any(record["val_loss"] is not None for record in records):
            parser.error(f"{name} has no validation loss yet: let it reach its first validation")
    draw(runs, options.output)
    print(table(runs))
    print(f"\ncurves: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
