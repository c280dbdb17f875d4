"""The benchmark of the optimizer step runs and writes what it measured; how long a step takes is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import step_time

SHAPES = ((2, (24, 24)), (1, (40, 24)))


def test_writes_a_row_for_every_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--device", "cpu", "--ranks", "2", "4", "--steps", "3", "--warmup", "1", "--out", str(tmp_path)]
    result = step_time.main(argv, SHAPES)

    assert capsys.readouterr().out.strip() == (tmp_path / "step_time.md").read_text().strip()
    assert json.loads((tmp_path / "step_time.json").read_text()) == result
    rows = {row["name"]: row for row in result["rows"]}
    assert {step_time.BASELINE, "torch AdamW, foreach", "LDAdamW, rank 2", "LDAdamW, rank 4"} <= rows.keys()
    assert next(iter(rows)) == step_time.BASELINE
    assert rows[step_time.BASELINE]["ratio"] == 1.0
    for row in rows.values():
        assert len(row["times_ms"]) == 3
        assert min(row["times_ms"]) <= row["median_ms"] <= max(row["times_ms"])
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["first_ms"] > 0
    assert f"--out {tmp_path}" in result["facts"]["command"]
    assert any(note.startswith("galore-torch") for note in result["notes"])


def test_a_peer_that_is_missing_or_broken_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert step_time.load_peer("no-such-peer", "no_such_peer.adamw") == (None, "no-such-peer: not installed")
    package = tmp_path / "broken_peer"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('8-bit')")
    (package / "adamw.py").write_text("import a_library_of_long_ago")
    monkeypatch.syspath_prepend(tmp_path)
    peer, line = step_time.load_peer("broken-peer", "broken_peer.adamw")
    assert peer is None
    assert line.startswith("broken-peer: installed, but its import failed (ModuleNotFoundError: ")
    assert "\n" not in line


def test_the_recurring_first_step_is_spread_over_the_gap() -> None:
    row = step_time.Row("x", median_ms=1.0, ratio=1, ratio_low=1, ratio_high=1, first_ms=401.0, gap=200, times_ms=[])
    assert row.mean_ms == 3.0
    assert row.first_in_steps == 401.0
