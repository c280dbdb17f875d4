"""The benchmarks run on tiny shapes and write what they measured; how long anything takes is not tested."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import choosing, first_step, memory, scaling, where_time_goes
from benchmarks.common import MODELS, ROOT, Llama, Options
from benchmarks.contenders import BASELINE
from ldadam_dist import LDAdamW, describe
from ldadam_dist.tables import format_bytes

CPU = torch.device("cpu")


def written(module: Any, folder: Path, *argv: str) -> dict[str, Any]:
    """What a benchmark returns, which is what it writes."""
    name = module.__name__.rpartition(".")[2]
    result: dict[str, Any] = module.main([*argv, "--out", str(folder)])
    assert json.loads((folder / f"{name}.json").read_text()) == json.loads(json.dumps(result))
    table = (folder / f"{name}.md").read_text()
    assert f"benchmarks/{name}.py" in result["facts"]["command"]
    assert all(f"- {key}: {value}" in table for key, value in result["facts"].items())
    return result


@pytest.mark.parametrize("name", [name for name in MODELS if name != "7b-layer"])
def test_shapes_are_those_of_the_model(name: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        config = LlamaConfig.from_pretrained(ROOT / "configs" / "models" / f"{MODELS[name]}.json")
        model = LlamaForCausalLM(config)
    expected = sorted(tuple(p.shape) for p in model.parameters())
    llama = Llama.named(name)
    found = sorted(shape for count, shape in (*llama.matrices, *llama.others) for _ in range(count))
    assert found == expected
    assert llama.parameters == sum(p.numel() for p in model.parameters())


def test_a_layer_has_no_embedding() -> None:
    layer = Llama.named("7b-layer")
    assert layer.matrices == ((4, (4096, 4096)), (2, (11008, 4096)), (1, (4096, 11008)))
    assert layer.others == ((2, (4096,)),)


def test_options_are_literals_or_text() -> None:
    assert Options.parse("a=1,b=int4,c=True,d=0.5").values == {"a": 1, "b": "int4", "c": True, "d": 0.5}
    with pytest.raises(Exception, match="expected name=value"):
        Options.parse("error_in_grad")


def test_first_step(tmp_path: Path) -> None:
    argv = ("--device", "cpu", "--scale", "128", "--ranks", "4", "8", "--repeats", "1", "--steps", "1")
    result = written(first_step, tmp_path, *argv)
    rows = {(tuple(row["shape"]), row["rank"], row["init"]) for row in result["rows"]}
    shapes = ((32, 32), (86, 32))
    assert rows == {(s, *kind) for s in shapes for kind in ((4, "randomized"), (8, "randomized"), (4, "svd"))}
    for row in result["rows"]:
        assert min(row[part] for part in ("projector", "states", "rest", "ordinary")) > 0
        assert row["first"] == pytest.approx(row["projector"] + row["states"] + row["rest"])


def test_memory_of_small_blocks_is_counted_exactly() -> None:
    with memory.Meter(CPU) as meter:
        kept = torch.empty(1000)
        with meter.phase("part"):
            more = torch.empty(500)
            del more
            other = torch.empty(250)
        with meter.phase("part"):
            del other, kept
    assert meter.found == {"part": [(4000, 6000), (5000, 5000)]}


def test_states_are_counted_once() -> None:
    weight = nn.Parameter(torch.randn(24, 40))
    weight.grad = torch.randn(24, 40)
    optimizer = LDAdamW([weight], rank=4)
    optimizer.step()
    assert memory.state_bytes(optimizer) == 4 * (24 * 4 + 2 * 4 * 40 + 24 * 40)


def test_memory(tmp_path: Path) -> None:
    argv = ("--device", "cpu", "--scale", "32", "--ranks", "4", "--length", "4", "--options", "error_feedback=False")
    result = written(memory, tmp_path, *argv, "--shapes", "llama-60m", "llama-350m")
    rows = {row["name"]: row for row in result["rows"]}
    ldadamw, parameters = rows["LDAdamW, rank 4"], Llama.named("llama-60m", 32).parameters
    assert rows[BASELINE]["states"] == 8 * parameters
    assert rows["LDAdamW, rank 4, error_feedback=False"]["states"] < ldadamw["states"]
    for row in rows.values():
        assert row["training"] >= row["states"] + row["step"] + 4 * parameters  # and the weights
        assert row["left_in_grad"] == 0 or "error_in_grad" in row["name"]
    shapes = {(row["model"], row["optimizer"]): row["bytes"] for row in result["shapes"]}
    assert {model for model, _ in shapes} == {"llama-60m ÷ 32", "llama-350m ÷ 32"}
    assert shapes["llama-60m ÷ 32", "LDAdamW, rank 4"] == ldadamw["states"], "what is measured is what shapes tell"
    assert shapes["llama-60m ÷ 32", "AdamW"] == rows[BASELINE]["states"]


def test_bytes_from_shapes_are_those_that_describe_tells() -> None:
    model = Llama.named("llama-60m", 8)
    total, adamw = memory.by_shapes(model, 16, Options("", {"error_dtype": "bfloat16"}), torch.float32)
    with torch.device("meta"):
        built = memory.build(model, torch.device("meta"), torch.float32)
    last = describe(built, rank=16, error_dtype="bfloat16").splitlines()[-1]
    assert f"state {format_bytes(total)} against {format_bytes(adamw)} of AdamW" in last


def test_scaling_with_fake_ranks(tmp_path: Path) -> None:
    argv = ("--scale", "16", "--rank", "4", "--processes", "--fake", "2", "8")
    rows = {(row["kind"], row["processes"]): row for row in written(scaling, tmp_path, *argv)["rows"]}
    assert rows.keys() == {(kind, number) for kind in scaling.KINDS for number in (2, 8)}
    for kind in scaling.KINDS:
        if kind == "sync":  # where each replica has an error of its own, as large as AdamW's first moment
            assert rows[kind, 8]["adamw_states"] / 2 < rows[kind, 8]["states"] < rows[kind, 2]["states"]
        else:
            assert rows[kind, 8]["states"] < rows[kind, 2]["states"] / 3
        assert rows[kind, 2]["sent"] > 0
        assert rows[kind, 2]["step_ms"] is None


def test_scaling_with_real_ranks(tmp_path: Path) -> None:
    argv = ("--scale", "16", "--rank", "4", "--kinds", "fsdp", "--processes", "2", "--fake", "2", "--steps", "1")
    real, fake = written(scaling, tmp_path, *argv)["rows"]
    assert (real["real"], fake["real"]) == (True, False)
    assert real["states"] == fake["states"], "what is held is what is foretold"
    assert real["sent"] == pytest.approx(fake["sent"], rel=0.1)  # with the agreement about the gradients
    assert min(real["step_ms"], real["adamw_ms"], real["ratio"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", scaling.KINDS)
def test_scaling_by_every_kind_of_mesh(kind: str, tmp_path: Path) -> None:
    argv = ("--scale", "8", "--rank", "8", "--kinds", kind, "--processes", "4", "--fake", "4", "--steps", "1")
    real, fake = written(scaling, tmp_path, *argv)["rows"]
    assert real["states"] == pytest.approx(fake["states"], rel=0.02)  # the rank in the middle may not be the fullest
    assert real["sent"] == pytest.approx(fake["sent"], rel=0.1)


def test_where_time_goes(tmp_path: Path) -> None:
    argv = ("--device", "cpu", "--scale", "8", "--rank", "4", "--steps", "2", "--warmup", "1")
    result = written(where_time_goes, tmp_path, *argv)
    host = {part: times[0] for part, times in result["parts"].items()}
    absent = {"collectives", "waiting"}
    assert {part for part, taken in host.items() if taken > 0} == set(where_time_goes.KINDS) - absent
    trace = json.loads((tmp_path / "where_time_goes.trace.json").read_text())
    assert where_time_goes.STEP in {event.get("name") for event in trace["traceEvents"]}


@pytest.mark.slow
def test_where_time_goes_on_several_processes(tmp_path: Path) -> None:
    argv = ("--device", "cpu", "--scale", "8", "--rank", "4", "--steps", "1", "--processes", "2")
    parts = written(where_time_goes, tmp_path, *argv)["parts"]
    assert {part for part, (host, _) in parts.items() if host > 0} == set(where_time_goes.KINDS) - {"waiting"}


def test_products_are_told_apart() -> None:
    matrix, tall, wide = torch.randn(8, 12), torch.randn(8, 2), torch.randn(2, 12)

    class Stepped:
        def step(self) -> None:
            matrix @ wide.mT  # takes a whole matrix
            tall @ wide  # gives one
            wide @ wide.mT
            torch.baddbmm(matrix[None], tall[None], wide[None])

    events, times = where_time_goes.record(Stepped(), lambda: None, CPU, steps=1, warmup=0, trace=None)
    found = [
        where_time_goes._kind(event, [event.name, *where_time_goes._around(event)], {(8, 12)})
        for event in events
        if event.name in ("aten::mm", "aten::baddbmm")
    ]
    whole, small = "products over m×n", "small products"
    assert found == [whole, whole, small, whole]
    parts = where_time_goes.shares(events, [(12, 8)], 1)
    assert min(parts[whole][0], parts[small][0]) > 0
    assert sum(host for host, _ in parts.values()) <= times[0]


def test_choosing_reads_complete_runs_and_tells_a_run_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def starts(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--output_dir") + 1])
        started.append(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").write_text('{"step": 1, "val_loss": 4.5, "optimizer_step_seconds": 0.01}\n')
        if len(started) != 2:  # the second run is stopped by a signal: such runs save a checkpoint and end with 0
            (folder / "curves.png").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", starts)
    argv = ("--first", "2", "--runs", str(tmp_path / "runs"))
    with pytest.raises(SystemExit, match="was stopped before its end"):
        choosing.main(argv)
    result = written(choosing, tmp_path, *argv)
    assert started == [started[0], started[1], started[1]]
    assert [run["last"][0]["val_loss"] for run in result["runs"]] == [4.5, 4.5]
