"""The error of a matrix in 8 or 4 bits an element.

A row is cut into blocks of 32 elements, the last one filled up with zeros. They are those of the whole row, on any cut
of it: a process that has a part of a row fills its first block up too, and knows how large the others' elements of it
are (`edges`). A block has one scale, in a byte, and codes,

    x = q · s     |q| ≤ 127, s = 2**e                     "int8", 1 + 1/32 bytes an element
                  |q| ≤ 7,   s = 2**e or 1.5 · 2**e       "int4", 1/2 + 1/32; the halves of a block share 16 bytes

s is the smallest of its kind at which no element of the block is cut off, from 2**-72 to 1.5 · 2**55: that covers every
gradient that a step takes, and what is smaller is nothing beside Adam's eps. So every x is a number of bfloat16, and to
encode what was decoded gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldadam_dist.rounding import Place, chunks

BLOCK = 32
"""Elements of a row that share a scale."""

_LOWEST = -72
"""Exponent of the scale of code 0. The code c of a scale is twice the exponent above that, and 1 more for 1.5."""


@dataclass(frozen=True)
class Format:
    """How a block is stored.

    Attributes:
        name: what `error_dtype` calls it.
        largest: the largest |q|.
        dtype: of the bytes with the codes; each format has another.
        per_byte: elements in one.
        rungs: with the largest |x| of a block f · 2**e, f in [1/2, 1), the scales that it may need are these, times
            2**e, and twice the first.
        first: code of the first of these scales at e = `_LOWEST`.
        step: from the code of one scale to that of the next.
    """

    name: str
    largest: int
    dtype: torch.dtype
    per_byte: int
    rungs: tuple[float, ...]
    first: int
    step: int

    def bytes_of(self, rows: int, columns: int, first: int = 0) -> int:
        """Bytes of a matrix; `first` as for `shapes`."""
        return rows * sum(shape[-1] for shape in self.shapes((1, columns), first))

    def shapes(self, shape: Sequence[int], first: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the codes and of the scales of a matrix, or of a stack of them, whose rows begin at column `first`
        of the whole ones."""
        *rows, columns = shape
        blocks = _number(columns, first)
        return (*rows, blocks * BLOCK // self.per_byte), (*rows, blocks)

    def smallest_scale(self, largest: Tensor, limit: float) -> Tensor:
        """Codes of the smallest scales s with |x| < limit · s.

        Args:
            largest: |x| of each block.
            limit: `self.largest`, and what may be rounded down to it.
        Returns:
            uint8, of the same shape; of a block of zeros 0, of what no scale is enough for the largest.
        """
        mantissa, exponent = torch.frexp(largest)
        code = 2 * (exponent - _LOWEST) + self.first
        for rung in self.rungs:
            code += self.step * (mantissa >= limit * rung)
        return torch.where(mantissa > 0, code, 0).clamp_(0, 256 - self.step).to(torch.uint8)

    def encode(
        self, values: Tensor, bits: Tensor | None = None, first: int = 0, edges: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Codes and scales of a few rows.

        Args:
            values: (rows, columns), float32 or float64, finite.
            bits: int32 of the same shape, to round stochastically; None to round to nearest.
            first: where the rows begin in the whole ones.
            edges: (rows, 2), the largest |x| of the first and of the last block, whoever has it; None if no block is
                cut.
        """
        blocks = _blocks(values, first)
        largest = blocks.abs().amax(-1)
        if edges is not None and values.shape[1]:
            largest[:, 0] = torch.maximum(largest[:, 0], edges[:, 0])
            largest[:, -1] = torch.maximum(largest[:, -1], edges[:, 1])
        scales = self.smallest_scale(largest, self.largest + (0.5 if bits is None else 0.0))
        codes = blocks / _numbers(scales, values.dtype)
        if bits is None:
            codes.round_()
        else:  # by a number in (0, 1) of 17 bits: with those of a code that is what float32 holds, so 3.0 stays 3.0
            codes.add_(_blocks((bits & 0xFFFF).to(values.dtype).add_(0.5).div_(2.0**16), first)).floor_()
        return self._packed(codes.clamp_(-self.largest, self.largest).to(torch.int8)), scales

    def encode_again(self, values: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Codes and scales of a few rows that were perhaps decoded; they then decode to the same.

        Rounded stochastically, or with the largest element on another process, what a block has may be so small that
        smaller scales would do for it. The smallest, or the next one, is that of the block over a power of two, at
        which all its elements are whole numbers. So the smallest is not taken where it is not exact.
        """
        codes, scales = self.encode(values, first=first)
        blocks = _blocks(values, first)
        larger = scales.clamp(max=256 - 2 * self.step) + self.step
        others = blocks / _numbers(larger, values.dtype)
        exact = (others == others.round()).all(-1)
        exact &= (self.decode(codes, scales, blocks.shape[1] * BLOCK, values.dtype).view_as(blocks) != blocks).any(-1)
        packed = self._packed(others.round_().clamp_(-self.largest, self.largest).to(torch.int8))
        width = BLOCK // self.per_byte
        chosen = torch.where(exact[..., None], packed.view(*exact.shape, width), codes.view(*exact.shape, width))
        return chosen.view_as(codes), torch.where(exact, larger, scales)

    def decode(self, codes: Tensor, scales: Tensor, columns: int, dtype: torch.dtype, first: int = 0) -> Tensor:
        """(rows, columns) of a few rows.

        Args:
            codes, scales: of the shapes of `shapes`.
            columns: without what fills blocks up.
            dtype: bfloat16, float32 or float64; every value is exact in each.
            first: where the rows begin in the whole ones.
        """
        if self.per_byte == 2:
            halves = codes.view(torch.int8).view(*scales.shape, BLOCK // 2)
            codes = torch.cat(((halves << 4) >> 4, halves >> 4), dim=-1)  # which keeps the sign
        blocks = codes.view(*scales.shape, BLOCK).to(dtype) * _numbers(scales, dtype)
        return blocks.view(len(blocks), scales.shape[1] * BLOCK).narrow(1, first % BLOCK if columns else 0, columns)

    def _packed(self, codes: Tensor) -> Tensor:
        rows, blocks, _ = codes.shape
        if self.per_byte == 2:
            low, high = codes.chunk(2, dim=-1)
            codes = ((low & 15) | (high << 4)).view(torch.uint8)
        return codes.reshape(rows, blocks * BLOCK // self.per_byte)


FORMATS = {
    "int8": Format("int8", largest=127, dtype=torch.int8, per_byte=1, rungs=(1 / 128,), first=-14, step=2),
    "int4": Format("int4", largest=7, dtype=torch.uint8, per_byte=2, rungs=(1.5 / 16, 1 / 8), first=-7, step=1),
}
"""By the names that `error_dtype` has for them."""


def _number(columns: int, first: int) -> int:
    """Number of the blocks that columns from `first` on lie in."""
    return -(-(first % BLOCK + columns) // BLOCK) if columns else 0


def _blocks(values: Tensor, first: int) -> Tensor:
    """(rows, blocks, BLOCK)"""
    (rows, columns), filled = values.shape, first % BLOCK
    blocks = _number(columns, first)
    return pad(values, (filled, blocks * BLOCK - columns - filled) if columns else (0, 0)).reshape(rows, blocks, BLOCK)


def _numbers(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales from their codes, which are the upper bits of a float32, with a dimension for the elements of a block."""
    numbers = (scales.int().add_(2 * (127 + _LOWEST)) << 22).view(torch.float32)
    return numbers.to(dtype)[..., None]


@dataclass(frozen=True)
class Quantized:
    """A matrix in this form, or its transpose; it is loaded and stored like a tensor.

    Attributes:
        codes, scales: views of what is stored, of the shapes of `Format.shapes`; the codes' dtype tells the format.
        columns: of the matrix as it is stored.
        transposed: whether it is seen with its rows as columns.
        first: the column of the whole matrix, as it is stored, at which this part of it begins.
    """

    codes: Tensor
    scales: Tensor
    columns: int
    transposed: bool = False
    first: int = 0

    @property
    def format(self) -> Format:
        """Its format."""
        return next(known for known in FORMATS.values() if known.dtype == self.codes.dtype)

    def to(self, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The matrix, in memory of its own."""
        rows = len(self.codes)
        values = torch.empty(rows, self.columns, dtype=dtype, device=device)
        for start, stop in chunks(rows, self.columns):
            codes, scales = (t[start:stop].to(device) for t in (self.codes, self.scales))
            values[start:stop] = self.format.decode(codes, scales, self.columns, dtype, self.first)
        return values.mT if self.transposed else values

    def copy_(
        self,
        values: Tensor,
        place: Place | None = None,
        usable: Tensor | None = None,
        edges: Tensor | None = None,
    ) -> None:
        """Store a matrix.

        Args:
            values: the matrix.
            place: where it lies, to round it stochastically.
            usable: a tensor () that says on the device whether to store it.
            edges: (rows as they are stored, 2), see `Format.encode`.
        """
        if self.transposed:
            values, place = values.mT, None if place is None else place.mT
        for start, stop in chunks(*values.shape):
            bits = None if place is None else place.bits(start, stop, self.columns, values.device)
            some = None if edges is None else edges[start:stop]
            self._set(start, stop, self.format.encode(values[start:stop], bits, self.first, some), usable)

    def load(self, values: Tensor) -> None:
        """Store a matrix that a state dict has, exactly if it was decoded; any floating dtype."""
        for start, stop in chunks(*values.shape):
            part = values[start:stop]
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            self._set(start, stop, self.format.encode_again(part, self.first))

    def _set(self, start: int, stop: int, encoded: tuple[Tensor, Tensor], usable: Tensor | None = None) -> None:
        for target, source in zip((self.codes, self.scales), encoded, strict=True):
            kept = target[start:stop]
            kept.copy_(source if usable is None else torch.where(usable, source, kept))


def row_bytes(columns: int, error_dtype: str | None, dtype: torch.dtype, first: int = 0) -> int:
    """Bytes of a row of an error.

    Args:
        columns: its length, on the process that has it.
        error_dtype: the setting.
        dtype: in which it is stored if that is no name of a format.
        first: where it begins in the whole row.
    """
    return FORMATS[error_dtype].bytes_of(1, columns, first) if error_dtype in FORMATS else columns * dtype.itemsize
