"""What a run tells: progress bar, JSONL and TensorBoard. Only the main rank writes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldadam_dist.curves import LOG_FILE, Record, read_log

PLOT_FILE = "curves.png"


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
