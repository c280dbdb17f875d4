"""Options that several commands take, and what is made of their text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

GPUS = {"a100": 79, "a100-40gb": 39, "h100": 79, "h200": 139, "b200": 178, "l40s": 44, "rtx4090": 23}
"""GiB that torch finds on a GPU, rounded down."""

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A Hugging Face config.json, or a folder that has one.", show_default=False),
]
Rank = Annotated[int, typer.Option(help="Directions kept of each matrix.", metavar="R")]
RankPattern = Annotated[
    str, typer.Option(help="Other ranks for what matches, as down_proj=64,o_proj=32.", metavar="NAME=R,...")
]
Include = Annotated[
    list[str] | None, typer.Option(help="Project only what this matches; may be repeated.", metavar="PATTERN")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Give AdamW to what this matches; may be repeated.", metavar="PATTERN")
]
Convolutions = Annotated[bool, typer.Option("--convolutions", help="Project convolutions too.")]
ProjType = Annotated[str, typer.Option(help="Projected side: std, reverse_std, left or right.", metavar="SIDE")]
ParamDtype = Annotated[
    str, typer.Option(help="dtype of the weights: float32, bfloat16, float16 or float64.", metavar="DTYPE")
]
ErrorDtype = Annotated[
    str | None,
    typer.Option(
        help="dtype of the error: float32, bfloat16, int8, int4; by default the weights'.",
        metavar="DTYPE",
        show_default=False,
    ),
]
StateDtype = Annotated[
    str | None,
    typer.Option(
        help="dtype of projectors and moments: float32, bfloat16; by default float32, and the weights' for AdamW.",
        metavar="DTYPE",
        show_default=False,
    ),
]
NoErrorFeedback = Annotated[bool, typer.Option("--no-error-feedback", help="Keep no error.")]


def dtype_of(option: str, name: str) -> torch.dtype:
    """A dtype by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in DTYPES:
        raise ValueError(f"{option} {name}: expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def parse_ranks(text: str) -> dict[str, int]:
    """Ranks by pattern, from "down_proj=64,o_proj=32".

    Raises:
        ValueError: it is not of that form.
    """
    found: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, _, rank = item.rpartition("=")
        if not name or not rank.strip().isdecimal():
            raise ValueError(f"--rank-pattern {text}: expected names with ranks, such as down_proj=64,o_proj=32.")
        if name.strip() in found:
            raise ValueError(f"--rank-pattern {text}: {name.strip()} has two ranks, expected one.")
        found[name.strip()] = int(rank)
    return found


def parse_memory(text: str) -> int:
    """Bytes, from "80GiB", "80GB" or the name of a GPU.

    Raises:
        ValueError: it is neither.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()] * 2**30
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"--gpu-memory {text}: expected bytes with their unit, such as 80GiB, or {', '.join(GPUS)}.")
    return int(float(match[1]) * _UNITS[match[2]])


def group_options(
    rank_pattern: str, include: Sequence[str] | None, exclude: Sequence[str] | None, convolutions: bool
) -> dict[str, Any]:
    """Arguments of `build_param_groups` and `describe` for a model, but for the rank."""
    return {
        "rank_pattern": parse_ranks(rank_pattern) or None,
        "include": list(include) if include else None,
        "exclude": list(exclude) if exclude else None,
        "convolutions": convolutions,
    }
