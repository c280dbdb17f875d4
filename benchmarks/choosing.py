"""Validation loss by rank, rho and learning rates: short runs of launch/pretrain.py, one after the other.

    OMP_NUM_THREADS=1 python benchmarks/choosing.py --seeds 0 1 2

Everything but what the table names is as configs/pretrain/default.yaml says, on one process. A run that is complete in
--runs is read and not repeated, so that an interrupted call goes on.
"""

from __future__ import annotations

import argparse
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
from launch.runlog import PLOT_FILE
from ldadam_dist.curves import read_log

Settings = dict[str, str]
"""Options of launch/pretrain.py."""

RATES = ("1e-3", "2.5e-3", "5e-3")
RANKS = ("4", "16", "64")
START: Settings = {"optimizer": "ldadamw", "rank": "16", "lr": "2.5e-3", "lr_other": "1e-2", "rho": "0.908"}
GRID: tuple[Settings, ...] = (
    *(START | {"rank": rank, "lr": lr} for lr in (RATES[1], RATES[0], RATES[2]) for rank in RANKS),
    *(START | {"rho": rho} for rho in ("0.5", "0.97")),
    START | {"lr_other": "2.5e-3"},
    *({"optimizer": "adamw", "lr": lr, "lr_other": "1e-2"} for lr in ("5e-4", *RATES)),
    {"optimizer": "adamw", "lr": "1e-3", "lr_other": "2.5e-3"},
)
"""All ranks at all rates, then one change at a time from `START`; AdamW in the same groups, to compare."""


def run(settings: Settings, folder: Path, extra: Sequence[str]) -> list[dict[str, Any]]:
    """The log of a run with these settings, which goes on, or begins, unless it is complete."""
    config = ["--config", str(ROOT / "configs" / "pretrain" / "default.yaml")]
    options = [text for name, value in settings.items() for text in (f"--{name}", value)]
    ends = ["--eval_every", "0", "--output_dir", str(folder), *extra]
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *config, *options, *ends]
    if not (folder / PLOT_FILE).exists():  # drawn when the run is complete
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        if not (folder / PLOT_FILE).exists():  # a run that a signal stops saves a checkpoint and ends with 0
            raise SystemExit(f"the run in {folder} was stopped before its end; the same command goes on from there")
    return read_log(folder)


def cells(settings: Settings, logs: Sequence[list[dict[str, Any]]]) -> list[str]:
    """A row of the table: the mean over the seeds, and the smallest and the largest."""
    projected = [settings.get(name, "–") for name in ("rank", "rho")]
    losses = [log[-1]["val_loss"] for log in logs]
    spread = f" ({min(losses):.3f}–{max(losses):.3f})" if len(losses) > 1 else ""
    step = 1e3 * statistics.median(record["optimizer_step_seconds"] for log in logs for record in log)
    name = {"ldadamw": "LDAdamW", "adamw": "AdamW"}[settings["optimizer"]]
    rates = [settings["lr"], settings["lr_other"]]
    return [name, *projected, *rates, f"{statistics.mean(losses):.3f}{spread}", f"{step:.0f} ms"]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the grid for each seed and print the table. Options that are not known here go to launch/pretrain.py."""
    description = (__doc__ or "").partition("\n")[0]
    arguments = argparse.ArgumentParser("python benchmarks/choosing.py", description=description, allow_abbrev=False)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run for each (default: 0)")
    arguments.add_argument("--first", type=int, default=len(GRID), help="take so many settings of the grid only")
    arguments.add_argument("--runs", type=Path, default=Path("runs/choosing"), help="folder of the runs")
    arguments.add_argument("--out", type=Path, help="folder for choosing.md and choosing.json")
    options, extra = arguments.parse_known_args(argv)
    report = Report("choosing", argv, torch.device("cpu"), None)
    logs: list[list[list[dict[str, Any]]]] = [[] for _ in GRID[: options.first]]
    for seed in options.seeds:
        for settings, found in zip(GRID, logs, strict=False):
            folder = options.runs / "-".join([*settings.values(), f"seed{seed}"])
            found.append(run(settings, folder, ["--seed", str(seed), *extra]))
            print(" ".join(cells(settings, found)), file=sys.stderr, flush=True)
    report.result["runs"] = [
        {"settings": settings, "last": [log[-1] for log in found]} for settings, found in zip(GRID, logs, strict=False)
    ]
    header = ["optimizer", "rank", "rho", "lr", "lr_other", "validation loss", "optimizer step, median"]
    report.table(header, [cells(settings, found) for settings, found in zip(GRID, logs, strict=False)])
    return report.write(options.out)


if __name__ == "__main__":
    main()
