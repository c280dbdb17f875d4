"""Tables of plain text: columns, bytes, percentages."""

from __future__ import annotations

from collections.abc import Sequence


def table(cells: Sequence[Sequence[str]], align: str) -> list[str]:
    """Lines of a table: its header, a rule, its rows.

    Args:
        cells: the header, then the rows; all of one length.
        align: for each column "<" (left), ">" (right) or "^" (centre).
    Returns:
        One string for each line, without trailing spaces; columns are two spaces apart.
    """
    lengths = sorted({len(line) for line in cells})
    if lengths != [len(align)]:
        raise ValueError(
            f"align={align!r} is for lines of {len(align)} cells, found {', '.join(map(str, lengths)) or 'no line'}. "
            "Pass a header first, and one character of align for each column."
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(_pad, line, widths, align)).rstrip() for line in cells]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def format_bytes(number: float) -> str:
    """'17 B', '1.5 KiB' and so on, up to TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def format_percent(part: float, whole: float) -> str:
    """'12.5 %'; '-' of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _pad(cell: str, width: int, align: str) -> str:
    return f"{cell:{align}{width}}"
