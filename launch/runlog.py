"""What a run tells: progress bar, JSONL, TensorBoard and the picture of its curves. Only the main rank writes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

LOG_FILE = "log.jsonl"
PLOT_FILE = "curves.png"
Record = dict[str, Any]


def read_log(path: Path) -> list[Record]:
    """Records of a run, oldest first; ``path`` is its log or its folder."""
    file = path / LOG_FILE if path.is_dir() else path
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # a run that was killed leaves half a line, a power failure may leave worse
            break
    return records


def replace_text(path: Path, text: str) -> None:
    """Write a file, which is never seen half written."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class RunLog:
    """Log of the main rank; a resumed run drops what was logged after its checkpoint and goes on from there."""

    def __init__(self, folder: Path, *, steps: int, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_FILE
        earlier = read_log(folder) if start_step and self.path.exists() else []
        kept = [record for record in earlier if record["step"] <= start_step]
        replace_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=0.2 if is_terminal else 10
        )

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, record["step"])

    def progress(self, record: Mapping[str, Any]) -> None:
        """Move the bar to the record's step."""
        shown = {"loss": f"{record['loss']:.3f}", "lr": f"{record['lr']:.1e}"}
        shown["tokens/s"] = f"{record['tokens_per_second']:,.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(record["step"] - self._bar.n)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._bar.write(message)

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()


def plot(runs: Mapping[str, list[Record]], path: Path) -> None:
    """Loss (thin) and validation loss (dots) of every run by tokens seen, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, records) in enumerate(runs.items()):
        color = f"C{index}"
        axes.plot(*points(records, "loss"), color=color, alpha=0.35, linewidth=0.8)
        tokens, losses = points(records, "val_loss")
        last = f": {losses[-1]:.3f}" if losses else ""
        axes.plot(tokens, losses, color=color, marker="o", markersize=3, label=name + last)
    axes.set(xlabel="tokens", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend(title="validation loss (thin: training)")
    figure.savefig(path, dpi=120)


def points(records: list[Record], name: str) -> tuple[list[int], list[float]]:
    chosen = [record for record in records if record.get(name) is not None]
    return [record["tokens"] for record in chosen], [record[name] for record in chosen]
