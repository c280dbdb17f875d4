"""Curves of runs of launch/pretrain.py, from their log.jsonl, as a PNG or as a page that is viewed offline."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"

Record = dict[str, Any]
Runs = Mapping[str, Sequence[Record]]

_MEASURED = {
    "ldadamw/error_norm": "error norm",
    "ldadamw/captured_energy": "captured energy",
}
"""What --metrics_every has added to the records; docs/metrics.md says what it is."""

_PLACES = {"tokens", "elapsed_seconds", "step"}
_NUMBERS = {*_PLACES, "loss", "val_loss", *_MEASURED}


def read_log(path: Path) -> list[Record]:
    """Records of a run, oldest first; `path` is its log or its folder."""
    file = path / LOG_FILE if path.is_dir() else path
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # a run that was killed leaves half a line, a power failure may leave worse
            break
    return records


def read_runs(paths: Sequence[Path]) -> dict[str, list[Record]]:
    """Records of runs by the name of their folder, or by as much of its path as tells them apart.

    Raises:
        ValueError: a path that is no run, or twice the same.
    """
    found: dict[str, list[Record]] = {}
    for path, name in zip(paths, _names([path if path.is_dir() else path.parent for path in paths]), strict=True):
        try:
            records = read_log(path)
        except OSError as error:
            raise ValueError(f"no log of a run: {error}; expected folders with {LOG_FILE}, or such files.") from None
        if not records or not all(isinstance(record, dict) and {"tokens", "loss"} <= set(record) for record in records):
            raise ValueError(f"{path} is no log of launch/pretrain.py: expected lines of JSON with tokens and loss.")
        for line, record in enumerate(records, start=1):
            for key in _NUMBERS & record.keys():
                if not _is_number(record[key], key):
                    raise ValueError(f"{path}, line {line}: {key} is {record[key]!r}, expected a number.")
        found[name] = records
    return found


def _is_number(value: Any, key: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value is None and key not in _PLACES
    return math.isfinite(value) or key not in _PLACES  # a run may diverge


def _names(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError(f"the same run is given twice: {', '.join(map(str, folders))}.")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def draw(runs: Runs, path: Path) -> None:
    """Draw the curves of runs: loss (thin: training, dots: validation) by tokens and by time, and what was measured.

    Args:
        runs: records by name.
        path: the picture to write, of type .png or .html.
    Raises:
        ValueError: another type, or matplotlib is not installed.
    """
    if path.suffix not in (".png", ".html"):
        raise ValueError(f"{path}: expected a picture of type .png or .html.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("drawing needs matplotlib: pip install 'ldadam-dist[cli]'") from error
    timed = any("elapsed_seconds" in record for records in runs.values() for record in records)
    measured = {
        key: title for key, title in _MEASURED.items() if any(points(records, key)[1] for records in runs.values())
    }
    number = 1 + timed + len(measured)
    columns = min(number, 2)
    figure = Figure(figsize=(1 + 6.5 * columns, 4.5 * -(-number // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(-(-number // columns), columns, i + 1) for i in range(number)]
    for axes, by in zip(panels, ("tokens", "elapsed_seconds"), strict=False):
        if by == "tokens" or timed:
            _draw_loss(axes, runs, by)
    for axes, (key, title) in zip(panels[1 + timed :], measured.items(), strict=True):
        for index, records in enumerate(runs.values()):
            axes.plot(*points(records, key), color=f"C{index}", marker=".", markersize=4, linewidth=1)
        axes.set(xlabel="tokens", ylabel=title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if path.suffix == ".png":
        figure.savefig(path, dpi=120)
    else:
        path.write_text(_page(figure, runs), encoding="utf-8")


def _draw_loss(axes: Any, runs: Runs, by: str) -> None:
    for index, (name, records) in enumerate(runs.items()):
        color = f"C{index}"
        axes.plot(*points(records, "loss", by), color=color, alpha=0.35, linewidth=0.8)
        places, losses = points(records, "val_loss", by)
        last = f": {losses[-1]:.3f}" if losses else ""
        axes.plot(places, losses, color=color, marker="o", markersize=3, label=name + last)
    axes.set(xlabel="tokens" if by == "tokens" else "seconds", ylabel="loss")
    axes.grid(alpha=0.3)
    if by == "tokens":
        axes.legend(title="validation loss (thin: training)")


def _page(figure: Any, runs: Runs) -> str:
    """A page with the figure as SVG, and a table of where each run has come to; nothing is loaded from elsewhere."""
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    rows = []
    for name, records in runs.items():
        losses = points(records, "val_loss")[1]
        last = records[-1]
        loss = f"{losses[-1]:.4f}" if losses else "-"
        seconds = f"{last['elapsed_seconds']:,.0f}" if "elapsed_seconds" in last else "-"
        cells = (html.escape(name), f"{last.get('step', 0):,}", f"{last['tokens']:,}", seconds, loss)
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    title = html.escape(", ".join(runs))
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{font-family:sans-serif;max-width:75em;margin:auto;padding:1em}svg{width:100%;height:auto}"
        "td,th{padding:.2em 1em;text-align:right}td:first-child,th:first-child{text-align:left}</style></head>\n"
        "<body>\n"
        "<table><tr><th>run</th><th>steps</th><th>tokens</th><th>seconds</th><th>validation loss</th></tr>\n"
        + "\n".join(rows)
        + f"\n</table>\n{svg[svg.index('<svg') :]}\n</body>\n</html>\n"
    )


def points(records: Sequence[Record], name: str, by: str = "tokens") -> tuple[list[float], list[float]]:
    """Where a record has a value of that name, and the values."""
    chosen = [record for record in records if record.get(name) is not None and by in record]
    return [record[by] for record in chosen], [record[name] for record in chosen]
