"""Blocks of 8 and 4 bits, and stochastic rounding: tensors alone, without an optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldadam_dist.quantized import BLOCK, FORMATS, Format, Quantized, row_bytes
from ldadam_dist.rounding import CHUNK, SALTS, Place, chunks, is_narrower, random_bits, rounded, write

NAMES = list(FORMATS)
DTYPES = [torch.float32, torch.float64]
BF16 = torch.bfloat16


def hard(dtype: torch.dtype, columns: int = 77) -> Tensor:
    """Rows of all sizes, the last block of each not full."""
    x = torch.randn(64, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    x *= 10.0 ** torch.linspace(-15, 14, 64, dtype=torch.float64)[:, None]
    x[0] = 0.0
    x[1] = 1e-42  # subnormal
    x[2] = 1e30  # larger than what any gradient may be
    x[3] *= 1e-20
    x[3, -1] = 1e15  # one huge element
    x[4] = -0.0
    x[5] = 7.5 * 2.0 ** torch.arange(columns)  # between two scales, and between two codes
    return x.clamp(-3e38, 3e38).to(dtype)


def place(kind: str = "error", t: int = 3) -> Place:
    return Place(kind, t, 0, 0)


def bits_of(x: Tensor, t: int = 3) -> Tensor:
    return place(t=t).bits(0, len(x), x.shape[1], x.device)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 77, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_what_was_decoded_is_encoded_to_the_same_bytes(name: str, dtype: torch.dtype, columns: int) -> None:
    form, x = FORMATS[name], hard(dtype, columns)
    codes, scales = form.encode(x)
    assert (codes.shape, scales.shape) == form.shapes(x.shape)
    y = form.decode(codes, scales, columns, dtype)
    assert torch.equal(form.decode(codes, scales, columns, BF16).to(dtype), y)  # exact in bfloat16
    for again in (form.encode(y), form.encode(y.to(BF16).to(dtype)), form.encode_again(y)):
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_what_was_rounded_stochastically_comes_back_exactly(name: str, dtype: torch.dtype) -> None:
    """Its largest code may have been rounded down so far that a smaller scale would do."""
    form, columns = FORMATS[name], 77
    differ = False
    for t in range(8):
        x = hard(dtype, columns)
        y = form.decode(*form.encode(x, bits_of(x, t)), columns, dtype)
        assert torch.equal(form.decode(*form.encode_again(y), columns, dtype), y)
        differ |= not torch.equal(form.decode(*form.encode(y), columns, dtype), y)
    assert differ == (name == "int4")  # in 8 bits the scales are powers of two, so every smaller one is exact


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_piece_of_what_was_decoded_is_encoded_without_the_rest_to_the_same_numbers(
    name: str, stochastic: bool
) -> None:
    """Also where the largest element of its block lies elsewhere: what is loaded on any cut is what was saved."""
    form, columns = FORMATS[name], 128
    x = hard(torch.float64, columns) * torch.logspace(0, -3, columns, dtype=torch.float64)
    y = form.decode(*form.encode(x, bits_of(x) if stochastic else None), columns, torch.float64)
    for start, stop in [(0, 1), (5, 9), (7, 100), (31, 33), (32, 64), (90, 128), (40, 40)]:
        again = form.encode_again(y[:, start:stop], start)
        assert [t.shape for t in again] == list(form.shapes((len(y), stop - start), start))
        assert torch.equal(form.decode(*again, stop - start, torch.float64, start), y[:, start:stop])


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_no_element_is_more_than_a_step_off_and_the_scale_is_the_smallest(name: str, stochastic: bool) -> None:
    form, x = FORMATS[name], hard(torch.float64, 64)[6:]
    codes, scales = form.encode(x, bits_of(x) if stochastic else None)
    y = form.decode(codes, scales, 64, torch.float64)
    unit = scale_of(scales)[..., None].expand(-1, -1, BLOCK).reshape(x.shape)
    limit = form.largest + (0.0 if stochastic else 0.5)
    largest = x.abs().view(-1, 2, BLOCK).amax(-1)
    assert ((x - y).abs() <= unit * (1.0 if stochastic else 0.5)).all()
    assert (largest < limit * scale_of(scales)).all()
    assert (largest >= limit * scale_of(scales - form.step)).all()


def scale_of(codes: Tensor) -> Tensor:
    codes = codes.long()
    return (1 + codes % 2 / 2).double() * 2.0 ** (codes // 2 - 72).double()


def test_the_scales_are_what_the_thresholds_say() -> None:
    """The largest x at which a scale is enough, and the next one: by the numbers, not by the code."""
    for f, int8, int4 in (
        (127.5 / 128, -6, (-3, 1.0)),
        (0.703125, -7, (-3, 0.0)),
        (0.9375, -7, (-3, 1.0)),
        (0.5, -7, (-4, 1.0)),
    ):
        for e in (0, 5, -20):
            x = torch.zeros(1, 32, dtype=torch.float64)
            x[0, 7] = f * 2.0**e
            assert scale_of(FORMATS["int8"].encode(x)[1]).item() == 2.0 ** (e + int8)
            assert scale_of(FORMATS["int4"].encode(x)[1]).item() == 2.0 ** (e + int4[0]) * (1 + int4[1] / 2)


def test_the_last_scales_hold_what_is_too_large() -> None:
    x = torch.full((1, 32), 3e38)
    for name, top in (("int8", 127 * 2.0**55), ("int4", 7 * 1.5 * 2.0**55)):
        form = FORMATS[name]
        assert (form.decode(*form.encode(x), 32, torch.float32) == top).all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_are_the_zeros_of_new_states(name: str) -> None:
    for tensor in FORMATS[name].encode(torch.zeros(3, 40)):
        assert not tensor.any()


def test_bytes() -> None:
    assert FORMATS["int8"].bytes_of(10, 64) == 10 * (64 + 2)
    assert FORMATS["int4"].bytes_of(10, 64) == 10 * (32 + 2)
    assert FORMATS["int4"].bytes_of(10, 33) == 10 * (32 + 2)  # filled up
    assert row_bytes(33, "bfloat16", BF16) == 66
    for form in FORMATS.values():
        codes, scales = form.encode(torch.randn(10, 33))
        assert codes.nbytes + scales.nbytes == form.bytes_of(10, 33)


def stored(form: Format, rows: int, columns: int, transposed: bool = False) -> Quantized:
    codes, scales = form.shapes((rows, columns))
    tensors = torch.zeros(codes, dtype=form.dtype), torch.zeros(scales, dtype=torch.uint8)
    return Quantized(*tensors, columns, transposed)


@pytest.mark.parametrize("at", [None, place()])
@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_is_stored_a_run_of_rows_at_a_time_and_seen_from_either_side(
    name: str, at: Place | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, x = FORMATS[name], hard(torch.float32)
    whole = form.encode(x, None if at is None else bits_of(x))
    monkeypatch.setattr("ldadam_dist.rounding.CHUNK", 5 * 77)
    for transposed in (False, True):
        matrix = stored(form, *x.shape, transposed)
        matrix.copy_(x.mT if transposed else x, None if at is None else at.mT if transposed else at)
        assert torch.equal(matrix.codes, whole[0])
        assert torch.equal(matrix.scales, whole[1])
        loaded = matrix.to(device=x.device, dtype=torch.float32)
        assert torch.equal(loaded.mT if transposed else loaded, form.decode(*whole, 77, torch.float32))


def test_chunks_are_small_and_cover() -> None:
    for rows, columns in ((10, 3 * CHUNK), (3000, 1000), (0, 5), (5, 0)):
        found = list(chunks(rows, columns))
        assert [start for start, _ in found] == [0, *(stop for _, stop in found)][: len(found)]
        assert (found[-1][1] if found else 0) == rows
        assert all((stop - start) * columns <= max(CHUNK, columns) for start, stop in found)


# Stochastic rounding


KINDS = [
    (torch.float32, BF16),
    (torch.float32, torch.float16),
    (torch.float64, BF16),
    (torch.float64, torch.float32),
    (torch.float64, torch.float16),
]


@pytest.mark.parametrize("scale", [1.0, 1e-6])  # 1e-6: subnormal in float16
@pytest.mark.parametrize(("wide", "narrow"), KINDS)
def test_the_mean_of_many_roundings_is_the_number(wide: torch.dtype, narrow: torch.dtype, scale: float) -> None:
    generator, count = torch.Generator().manual_seed(0), 150
    x = torch.randn(30, 40, dtype=wide, generator=generator) * scale
    total = torch.zeros(30, 40, dtype=torch.float64)
    for t in range(count):
        y = rounded(x, narrow, bits_of(x, t))
        total += y.double() - x.double()
        assert torch.equal((y == x.to(narrow)) | neighbours(y, x), torch.ones_like(x, dtype=torch.bool))
    step = spacing(x, narrow)
    assert ((total / count).abs() <= step * 0.5 * 5 / count**0.5).all()  # five standard deviations
    assert ((total / count) / step).mean().abs() <= 5 * 0.5 / (count * x.numel()) ** 0.5


def spacing(x: Tensor, narrow: torch.dtype) -> Tensor:
    """Distance of the numbers of a dtype around x."""
    info = torch.finfo(narrow)
    return (2.0 ** x.abs().double().log2().floor()).clamp(min=info.smallest_normal) * info.eps


def neighbours(y: Tensor, x: Tensor) -> Tensor:
    return (y.double() - x.double()).abs() < spacing(x, y.dtype) * (1 + 1e-12)


def test_the_mean_of_many_codes_is_the_number() -> None:
    x, count = torch.randn(8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 150
    for form in FORMATS.values():
        total = sum(form.decode(*form.encode(x, bits_of(x, t)), 64, x.dtype) - x for t in range(count))
        step = scale_of(form.encode(x, bits_of(x))[1])[..., None].expand(-1, -1, BLOCK).reshape(x.shape)
        assert ((total / count).abs() <= step * 0.5 * 5 / count**0.5).all()
        assert (total / count / step).mean().abs() <= 5 * 0.5 / (count * x.numel()) ** 0.5


@pytest.mark.parametrize(("wide", "narrow"), KINDS)
def test_what_is_exact_stays_and_nothing_becomes_infinite(wide: torch.dtype, narrow: torch.dtype) -> None:
    largest = torch.finfo(narrow).max
    exact = torch.tensor([[0.0, 1.0, -1.5, largest, -largest, torch.finfo(narrow).smallest_normal]], dtype=wide)
    beyond = torch.tensor([[torch.finfo(wide).max, -torch.finfo(wide).max, largest * (1 + 1e-7)]], dtype=wide)
    for ones in (-1, 0, 0x7FFFFFFF):  # the random bits that carry, or do not
        noise = torch.full((1, 6), ones, dtype=torch.int32)
        assert torch.equal(rounded(exact, narrow, noise), exact.to(narrow))
        assert rounded(beyond, narrow, noise[:, :3]).abs().tolist() == [[largest] * 3]
        assert rounded(torch.full((1, 6), torch.nan, dtype=wide), narrow, noise).isnan().all()


def test_random_bits_are_those_of_the_place() -> None:
    whole = random_bits("weight", 5, torch.arange(30)[:, None], torch.arange(40))
    assert torch.equal(Place("weight", 5, 7, 11).bits(2, 9, 20, whole.device), whole[9:16, 11:31])
    assert torch.equal(Place("weight", 5, 7, 11).mT.bits(2, 9, 20, whole.device), whole[7:27, 13:20].mT)
    others = [random_bits(kind, t, torch.arange(30)[:, None], torch.arange(40)) for kind in SALTS for t in range(4, 7)]
    same = [(a == b).sum().item() for i, a in enumerate(others) for b in others[:i]]
    assert max(same) <= 2  # of 1,200


def test_random_bits_are_as_many_as_they_should_be() -> None:
    bits = random_bits("error", 1, torch.arange(500)[:, None], torch.arange(500))
    ones = torch.stack([(bits >> i & 1).double().mean() for i in range(32)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 500  # five standard deviations
    lower = (bits & 0xFFFF).double() / 2**16
    for other in (lower.roll(1, 0), lower.roll(1, 1)):
        assert torch.corrcoef(torch.stack([lower.flatten(), other.flatten()]))[0, 1].abs() < 5 / 500


def test_a_matrix_is_written_the_same_from_either_side() -> None:
    x = torch.randn(33, 21)
    rows, columns = torch.empty(33, 21, dtype=BF16), torch.empty(21, 33, dtype=BF16)
    at = Place("weight", 2, 4, 5)
    write(rows, x, at)
    write(columns.mT, x, at)
    assert torch.equal(rows, columns.mT)
    assert not torch.equal(rows, x.to(BF16))
    write(rows, x, None)
    assert torch.equal(rows, x.to(BF16))
    assert is_narrower(BF16, torch.float32)
    assert not is_narrower(torch.float32, torch.float32)
