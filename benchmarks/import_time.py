"""Seconds that `import ldadam_dist` takes beyond `import torch`, and the modules that it brings.

    python benchmarks/import_time.py --repeats 9

Each repetition is a new interpreter, so files are in the page cache and nothing else is. The goal is less than 0.2 s;
tests/test_packaging.py holds it to the modules, not to seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a file, Python looks for modules in benchmarks/ alone: name the repository as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import ROOT, Report

GOAL = 0.2
"""Seconds beyond torch's."""

CODE = """
import json, sys, time
start = time.perf_counter()
import torch
between, before = time.perf_counter(), set(sys.modules)
import ldadam_dist
end = time.perf_counter()
print(json.dumps({"torch": between - start, "ldadam_dist": end - between, "new": sorted(set(sys.modules) - before)}))
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="interpreters to start, after one that is not counted")
    parser.add_argument("--out", type=Path, help="folder for import_time.md and import_time.json")
    return parser.parse_args(argv)


def measure() -> dict[str, Any]:
    """Seconds of both imports in a new interpreter, and the modules that the second brought."""
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, and return what goes to the JSON file."""
    args = parse(argv)
    report = Report("import_time", argv, torch.device("cpu"), None)
    measure()
    runs = [measure() for _ in range(args.repeats)]
    others = [name for name in runs[0]["new"] if name.partition(".")[0] != "ldadam_dist"]
    rows = {}
    for name in ("torch", "ldadam_dist"):
        seconds = sorted(run[name] for run in runs)
        rows[name] = {"median": statistics.median(seconds), "least": seconds[0], "most": seconds[-1]}
    report.table(
        ("import", "median s", "least", "most"),
        ((name, *(f"{row[key]:.3f}" for key in ("median", "least", "most"))) for name, row in rows.items()),
    )
    reached = "reached" if rows["ldadam_dist"]["median"] < GOAL else "missed"
    own = len(runs[0]["new"]) - len(others)
    report.lines([f"{own} modules of the package; others: {', '.join(others) or 'none'}. Goal of {GOAL} s: {reached}."])
    report.result |= {"seconds": rows, "others": others}
    return report.write(args.out)


if __name__ == "__main__":
    main()
