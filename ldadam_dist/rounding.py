"""Stochastic rounding: up or down, with the probability that makes the mean right.

Nearest rounding loses every change that is smaller than half a step of the stored number, however often it comes;
rounded stochastically, such changes add up. The random bits of an element are an integer hash of the step, of what is
stored and of the element's place in the whole matrix. So there is no generator whose state must be kept: a resumed run
goes on exactly, and every mesh rounds alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK = 2**20
"""Elements that are rounded at once, which bounds the temporary memory."""

SALTS = {"weight": 1, "error": 2, "exp_avg": 3, "exp_avg_sq": 4}
"""What is rounded, by the name of the tensor; each has random bits of its own."""

_MASK = 0xFFFFFFFF
_MIXING = ((16, 0x7FEB352D), (15, 0x846CA68B))
"""The rounds of a 32-bit finaliser: shifts, and factors."""


@dataclass(frozen=True)
class Place:
    """Where the elements of a stored matrix are in the whole one, which is oriented, and the step that stores them.

    Attributes:
        kind: a key of `SALTS`.
        t: the step; a tensor () where the host does not know it.
        row, column: of the first element.
        transposed: whether what is stored is seen with its rows as columns.
    """

    kind: str
    t: int | Tensor
    row: int
    column: int
    transposed: bool = False

    @property
    def mT(self) -> Place:  # noqa: N802 -- as of a tensor
        """The same of the transposed view."""
        return replace(self, transposed=not self.transposed)

    def bits(self, start: int, stop: int, columns: int, device: torch.device) -> Tensor:
        """Random bits for rows `start` to `stop` of what is stored, (stop − start, columns), int32."""
        down, across = torch.arange(start, stop, device=device)[:, None], torch.arange(columns, device=device)
        rows, others = (across, down) if self.transposed else (down, across)
        return random_bits(self.kind, self.t, rows + self.row, others + self.column)


def random_bits(kind: str, t: int | Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """32 random bits for each element, by its place.

    Args:
        kind: a key of `SALTS`.
        t: the step; a tensor () where the host does not know it.
        rows, columns: int64, of the elements in the whole; they are broadcast.
    Returns:
        int32, of their common shape.
    """
    t = t.long() if isinstance(t, Tensor) else t
    seed = (t * 0x9E3779B1 + SALTS[kind] * 0x85EBCA77) & _MASK
    x = _mixed(rows * 0x9E3779B1 + seed) + _mixed(columns * 0xC2B2AE3D + (seed ^ 0x27D4EB2F))
    for shift, factor in _MIXING:  # in 32 bits, which wrap around
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor - (factor >> 31 << 32))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _mixed(x: Tensor) -> Tensor:
    """The rounds of the finaliser on the lower 32 bits of int64, as int32."""
    x = x & _MASK
    for shift, factor in _MIXING:
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return ((x ^ (x >> 16)) - 2**31).to(torch.int32)


def rounded(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Values in a narrower dtype, each one of its two neighbours there; finite ones stay finite.

        the bits of the mantissa that have no place are added to as many random bits, and what does not carry is cut off

    Args:
        values: float32 or float64.
        dtype: float32, bfloat16 or float16, narrower than that.
        bits: int32, of the same shape.
    """
    spare = _mantissa(values.dtype) - _mantissa(dtype)
    largest = torch.finfo(dtype).max
    values = values.clamp(-largest, largest)
    # Below 2**-14 the numbers of float16 are as far apart as above: it is rounded there, and moved back.
    moved = None
    if dtype == torch.float16:
        moved = torch.where(values.abs() < 2.0**-14, torch.full_like(values, 2.0**-14).copysign_(values), 0.0)
        values += moved
    if values.dtype == torch.float64:
        wide = bits.long().bitwise_and_(_MASK)
        noise = wide << (spare - 32) if spare > 32 else wide >> (32 - spare)
        values.view(torch.int64).add_(noise).bitwise_and_(-(1 << spare))
    else:
        values.view(torch.int32).add_(bits & ((1 << spare) - 1)).bitwise_and_(-(1 << spare))
    return (values if moved is None else values.sub_(moved)).to(dtype)


def _mantissa(dtype: torch.dtype) -> int:
    return round(-math.log2(torch.finfo(dtype).eps))


def is_narrower(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Whether numbers of the one are rounded when they are stored as the other."""
    return _mantissa(dtype) < _mantissa(than)


def write(target: Tensor, source: Tensor, place: Place | None) -> None:
    """Store a matrix.

    Args:
        target: (rows, columns), a view of what is stored.
        source: (rows, columns), in the dtype of the computation.
        place: where it lies; None to round to nearest.
    """
    if place is None or not is_narrower(target.dtype, source.dtype):
        target.copy_(source)
        return
    if target.stride(0) < target.stride(1):  # a transposed view: its chunks are to be contiguous
        target, source, place = target.mT, source.mT, place.mT
    for start, stop in chunks(*target.shape):
        bits = place.bits(start, stop, target.shape[1], source.device)
        target[start:stop] = rounded(source[start:stop], target.dtype, bits)


def chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of rows with at most `CHUNK` elements, or of single rows."""
    step = max(1, CHUNK // max(1, columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
