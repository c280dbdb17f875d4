"""The benchmark of the optimizer step runs and writes what it measured; how long a step takes is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import contenders, step_time
from benchmarks.common import Options, normal

SHAPES = ((2, (24, 24)), (1, (40, 24)))


def test_writes_a_row_for_every_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--device", "cpu", "--ranks", "2", "4", "--steps", "3", "--warmup", "1", "--out", str(tmp_path)]
    result = step_time.main(argv, SHAPES)

    assert capsys.readouterr().out.strip() == (tmp_path / "step_time.md").read_text().strip()
    assert json.loads((tmp_path / "step_time.json").read_text()) == result
    rows = {row["name"]: row for row in result["rows"]}
    assert {contenders.BASELINE, "torch AdamW, foreach", "LDAdamW, rank 2", "LDAdamW, rank 4"} <= rows.keys()
    assert next(iter(rows)) == contenders.BASELINE
    assert rows[contenders.BASELINE]["ratio"] == 1.0
    for row in rows.values():
        assert len(row["times_ms"]) == 3
        assert min(row["times_ms"]) <= row["median_ms"] <= max(row["times_ms"])
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        yardstick = row["name"].startswith((contenders.SIX_PRODUCTS, contenders.AUTHORS_WAY))
        assert row["first_ms"] is None if yardstick else row["first_ms"] > 0
        ldadam = row["name"].startswith("LDAdamW")
        assert row["over"].keys() == ({contenders.SIX_PRODUCTS, contenders.AUTHORS_WAY} if ldadam else set())
    assert f"--out {tmp_path}" in result["facts"]["command"]
    for peer in ("galore-torch", "apollo-torch", "torchao", "bitsandbytes"):
        assert any(note.startswith(peer) for note in result["notes"])


def test_a_peer_that_is_missing_or_broken_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert contenders.load_peer("no-such-peer", "no_such_peer.adamw") == (None, "no-such-peer: not installed")
    package = tmp_path / "broken_peer"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('8-bit')")
    (package / "adamw.py").write_text("import a_library_of_long_ago")
    monkeypatch.syspath_prepend(tmp_path)
    peer, line = contenders.load_peer("broken-peer", "broken_peer.adamw")
    assert peer is None
    assert line.startswith("broken-peer: installed, but its import failed (ModuleNotFoundError: ")
    assert "\n" not in line


def test_the_recurring_first_step_is_spread_over_the_gap() -> None:
    row = step_time.Row("x", median_ms=1.0, ratio=1, ratio_low=1, ratio_high=1, first_ms=401.0, gap=200, times_ms=[])
    assert row.mean_ms == 3.0
    assert row.first_in_steps == 401.0


def test_options_become_contenders_and_what_does_not_run_is_said() -> None:
    asked = [Options.parse("error_dtype=bfloat16,rho=0.5"), Options.parse("error_dtype=int3")]
    found, notes = contenders.contenders([4], torch.device("cpu"), torch.float32, asked)
    names = [contender.name for contender in found]
    assert names[:2] == [contenders.BASELINE, "torch AdamW, foreach"]
    assert "LDAdamW, rank 4, error_dtype=bfloat16, rho=0.5" in names
    assert names[-2:] == [f"{contenders.SIX_PRODUCTS}, rank 4", f"{contenders.AUTHORS_WAY}, rank 4"]
    assert any(note.startswith("LDAdamW, rank 4, error_dtype=int3: does not run here (ValueError: ") for note in notes)


def test_embeddings_and_norms_are_stepped_too() -> None:
    argv = ["--device", "cpu", "--ranks", "2", "--steps", "1", "--warmup", "0", "--scale", "64", "--whole"]
    result = step_time.main(argv)
    assert result["facts"]["other parameters"] == "2 of 500×8, 3 of 8"
    assert result["facts"]["matrices"] == "4 of 8×8, 2 of 21×8, 1 of 8×21"


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_yardsticks_do_their_work(shape: tuple[int, int]) -> None:
    (weight,) = normal([shape], 1.0, torch.device("cpu"), torch.float32)
    for kind in (contenders.SixProducts, contenders.AuthorsWay):
        param, vector = nn.Parameter(weight.clone()), nn.Parameter(torch.ones(3))
        param.grad, vector.grad = torch.randn_like(param), torch.ones(3)
        before = param.clone()
        optimizer = kind([param], [vector], rank=4)
        optimizer.step()
        assert bool((vector < 1).all())
        moved = not torch.equal(param, before)
        assert moved == (kind is contenders.SixProducts)  # the other has a weight of its own


def test_gradients_are_shared_or_accumulated() -> None:
    params, grads = [nn.Parameter(torch.zeros(2))], [torch.ones(2)]
    optimizer = torch.optim.SGD(params)
    contenders.give(optimizer, params, grads)
    assert params[0].grad is grads[0]
    optimizer.zero_grad = lambda: None  # as where the error is in the gradient
    params[0].grad = torch.ones(2)
    contenders.give(optimizer, params, grads, "backward")
    assert params[0].grad.tolist() == [2.0, 2.0]
    kept = params[0].grad
    contenders.give(optimizer, params, grads, "copy")
    assert params[0].grad is kept
    assert kept.tolist() == [1.0, 1.0]
    assert grads[0].tolist() == [1.0, 1.0]
