"""The first steps of the long run in docs/soak.md: what it checks holds, and it writes what it saw."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import soak

OVERLAP = {"float32": 1e-4, "bfloat16": 2.0**-8, "bfloat16-error32": 1e-4}
"""Largest ‖UᵀE‖ / ‖E‖: what float32 leaves of a difference, and half a unit of bfloat16."""


def test_writes_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soak.md"
    found = soak.main(["--steps", "5", "--every", "1", "--dtype", "float32", "--out", str(out)])
    assert capsys.readouterr().out.strip() == out.read_text().strip()
    assert [check.step for check in found["float32"]] == [1, 2, 3, 4, 5]
    assert out.read_text().count("\n| float32 | ") == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name != "float32" else []) for name in soak.RUNS]
)
def test_invariants_hold(name: str) -> None:
    checks = list(soak.soak(*soak.RUNS[name], steps=300, every=10))
    for check in checks:
        assert check.skew <= 1e-5
        assert check.overlap <= OVERLAP[name]
        assert check.errors <= 20 * check.first
    assert checks[-1].loss < 0.8 * checks[0].loss
    assert all(math.isfinite(value) for check in checks for value in vars(check).values())


@pytest.mark.slow
def test_what_is_left_is_rounding() -> None:
    for check in soak.soak(torch.float64, None, steps=100, every=10):
        assert check.skew <= 1e-13
        assert check.overlap <= 1e-12
