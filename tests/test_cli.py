"""The command ldadam-dist: what each command prints, and of every wrong input one line and exit code 2."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ldadam_dist import cli
from ldadam_dist.cli.options import parse_memory

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "configs" / "models" / "llama_9m.json")
COMMANDS = ("plan", "describe", "preflight", "plot", "convert", "doctor")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


# What commands do


def test_plan_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", MODEL, "--ranks", "8", "--rank", "16", "--gpu-memory", "1GiB")
    assert (code, err) == (0, "")
    for text in ("FSDP2 on 8 ranks", "LDAdamW", "AdamW", "8-bit Adam", "Muon", "on the wire", "largest rank", "q_proj"):
        assert text in out


def test_plan_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", MODEL, "--mesh", "replicate=2,shard=4", "--rank", "16", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["layout"]["ranks"] == 8
    for memory in found["memory"].values():
        assert memory["total"] == sum(memory[key] for key in ("weights", "masters", "gradients", "states", "error"))
    assert sum(row["state_bytes"] for row in found["parameters"]) == sum(
        found["memory"]["LDAdamW"][key] for key in ("states", "error")
    )
    assert "gpu" not in found


@pytest.mark.parametrize("sharding", ["one", "ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_plan_takes_every_sharding(sharding: str, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = "1" if sharding == "one" else "4"
    code, out, err = run(capsys, "plan", MODEL, "--sharding", sharding, "--ranks", ranks, "--rank", "16")
    assert (code, err) == (0, "")
    assert "of AdamW's states" in out


def test_plan_takes_tensor_parallelism(capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(run(capsys, "plan", MODEL, "--mesh", "shard=2", "--rank", "16", "--json")[1])
    code, out, _ = run(capsys, "plan", MODEL, "--mesh", "shard=2,tp=2", "--rank", "16", "--json")
    assert code == 0
    assert json.loads(out)["memory"]["AdamW"]["states"] < whole["memory"]["AdamW"]["states"]


def test_describe_says_what_is_projected(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "describe", MODEL, "--rank", "16", "--include", "q_proj", "--verbose")
    assert code == 0
    assert "model.layers.0.self_attn.q_proj.weight" in out


def test_a_folder_with_a_configuration_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(Path(MODEL).read_text())
    assert (
        run(capsys, "describe", str(tmp_path), "--rank", "16")[1] == run(capsys, "describe", MODEL, "--rank", "16")[1]
    )


def log(folder: Path, steps: int) -> Path:
    folder.mkdir()
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        record = {"step": step, "tokens": 100 * step, "loss": 5 / math.sqrt(step), "elapsed_seconds": step * 2.0}
        record |= {"ldadamw/error_norm": 1.0 * step, "ldadamw/captured_energy": 0.5}
        records.append(record | {"val_loss": 5.1 / math.sqrt(step) if step % 5 == 0 else None})
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_plot_draws_runs(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, picture = [log(tmp_path / name, 20) for name in ("first", "second")], tmp_path / f"curves.{suffix}"
    code, out, _ = run(capsys, "plot", *map(str, runs), "--output", str(picture))
    assert (code, out) == (0, f"{picture}: 2 runs\n")
    if suffix == "png":
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 20_000
    else:
        page = picture.read_text()
        assert "<svg" in page
        assert "first" in page
        for outside in ("<script", "<link", "src=", "@import"):
            assert outside not in page


def test_doctor_finds_this_installation_sound(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "doctor")
    assert (code, err) == (0, "")
    assert "ldadam-dist is healthy" in out
    assert "2 gloo processes" in out
    assert "FAIL" not in out


def test_doctor_finds_a_wrong_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ldadam_dist.optimizer import LDAdamW

    monkeypatch.setattr(LDAdamW, "step", lambda self: None)
    code, out, _ = run(capsys, "doctor", "--quick")
    assert code == 1
    assert "FAIL" in out
    assert "ldadam-dist is not healthy" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"ldadam-dist {command}" in out


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    for command in COMMANDS:
        assert command in out


def test_the_module_and_the_script_are_the_command() -> None:
    script = Path(sys.executable).parent / "ldadam-dist"
    commands = [[sys.executable, "-m", "ldadam_dist"], *([[str(script)]] if script.exists() else [])]
    for command in commands:
        done = subprocess.run([*command, "plan", "nowhere.json"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: there is no nowhere.json")
        assert done.stderr.count("\n") == 1


# Wrong input

WRONG: dict[str, tuple[list[str], str]] = {
    "no model": (["plan"], "MODEL"),
    "no such file": (["plan", "nowhere.json"], "there is no nowhere.json"),
    "a folder without": (["plan", str(ROOT / "tests")], "has no config.json"),
    "misspelt command": (["pln", MODEL], "pln"),
    "misspelt option": (["plan", MODEL, "--rankk", "8"], "--rankk"),
    "no number": (["plan", MODEL, "--ranks", "many"], "--ranks"),
    "no ranks": (["plan", MODEL, "--ranks", "0"], "expected a positive number"),
    "unknown sharding": (["plan", MODEL, "--sharding", "fsdp1"], "expected one of one, ddp, fsdp2"),
    "unknown axis": (["plan", MODEL, "--mesh", "pipeline=2"], "expected a number of ranks for"),
    "two sizes": (["plan", MODEL, "--mesh", "shard=4", "--ranks", "8"], "give one"),
    "hsdp without a mesh": (["plan", MODEL, "--sharding", "hsdp", "--ranks", "8"], "both sides of the mesh"),
    "one device with a mesh": (["plan", MODEL, "--sharding", "one", "--ranks", "4"], "expected a single rank"),
    "nothing replicated": (["plan", MODEL, "--ranks", "8", "--gradient-sync", "lowrank"], "expected ddp or hsdp"),
    "unknown sync": (["plan", MODEL, "--gradient-sync", "low"], "expected full or lowrank"),
    "heads that are cut": (["plan", MODEL, "--mesh", "shard=2,tp=16"], "does not divide num_attention_heads="),
    "rank too large": (["plan", MODEL, "--rank", "5000"], "rank=5000"),
    "rank of nothing": (["plan", MODEL, "--rank", "0"], "rank"),
    "unknown dtype": (["plan", MODEL, "--rank", "16", "--param-dtype", "float8"], "expected one of"),
    "unknown error dtype": (["plan", MODEL, "--rank", "16", "--error-dtype", "int2"], "int2"),
    "unknown side": (["plan", MODEL, "--rank", "16", "--proj-type", "up"], "up"),
    "a pattern without a rank": (["plan", MODEL, "--rank-pattern", "down_proj"], "expected names with ranks"),
    "a pattern of nothing": (["describe", MODEL, "--rank", "16", "--include", "attention_x"], "attention_x"),
    "no unit": (["plan", MODEL, "--rank", "16", "--gpu-memory", "80"], "with their unit"),
    "no run": (["plot", "nowhere"], "no log of a run"),
    "no picture": (["plot", "RUN", "-o", "curves.txt"], "curves.txt"),
    "no checkpoint": (["convert", "nowhere", "there"], "nowhere"),
    "misspelt conversion": (["convert", "nowhere", "--too", "dcp"], "--too"),
    "misspelt option of preflight": (["preflight", "--nonsense"], "nonsense"),
    "two ranks for one name": (["plan", MODEL, "--rank-pattern", "down_proj=8,down_proj=16"], "has two ranks"),
    "too many ranks": (["plan", MODEL, "--ranks", "100000000"], "expected at most 131,072"),
    "errors in other gradients": (["plan", MODEL, "--error-in-grad", "--grad-dtype", "float32"], "weights' dtype"),
    "no time": (["doctor", "--timeout", "0"], "timeout"),
    "no number of seconds": (["doctor", "--timeout", "nan"], "timeout"),
    "an endless preflight": (["preflight", "--timeout", "inf"], "--timeout=inf: expected a number from"),
    "vectors of no size": (["preflight", "--size", "nan"], "--size=nan: expected a number from"),
    "less than nothing free": (["preflight", "--min-free", "-1"], "--min-free=-1"),
    "a negative bandwidth": (["preflight", "--min-bandwidth", "-1"], "--min-bandwidth=-1"),
    "a clock that is never wrong": (["preflight", "--max-clock-offset", "nan"], "--max-clock-offset=nan"),
    "a slower link that is quicker": (["preflight", "--max-slowdown", "0.5"], "--max-slowdown=0.5"),
}


@pytest.mark.parametrize("suffix", ["png", "html"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("tokens", [1, 2]), ("tokens", None), ("tokens", math.nan), ("loss", "y"), ("loss", True), ("val_loss", "x")),
        *(("elapsed_seconds", "x"), ("ldadamw/error_norm", "bad"), ("step", {})),
    ],
)
def test_a_log_of_other_things_than_numbers_is_one_line(
    key: str, value: object, suffix: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    good = {"step": 1, "tokens": 10, "loss": 2.0, "elapsed_seconds": 0.5}
    lines = [good, good | {"loss": math.nan, "val_loss": None}, good | {key: value}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, _, err = run(capsys, "plot", str(tmp_path), "-o", str(tmp_path / f"curves.{suffix}"))
    assert code == 2
    assert err == f"error: {tmp_path}, line 3: {key} is {value!r}, expected a number.\n"
    assert not (tmp_path / f"curves.{suffix}").exists()


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(
    what: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = WRONG[what]
    there = log(tmp_path / "run", 2)
    code, out, err = run(capsys, *(str(there) if argument == "RUN" else argument for argument in arguments))
    assert code == 2, (out, err)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert out == ""
    assert list(tmp_path.iterdir()) == [there]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "names no model_type"),
        ('{"model_type": "lama"}', "Near names: 'llama'"),  # and not the 800 that there are
        ('{"model_type": "llama", "hiden_size": 512}', "'hidden_size' is meant?"),
        ('{"model_type": "gpt2", "n_layers": 4}', "'n_layer' is meant?"),
        ('{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}', "attention heads"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
    ],
)
def test_a_wrong_configuration_is_one_line(
    config: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(config)
    code, _, err = run(capsys, "plan", str(tmp_path), "--rank", "2")
    assert code == 2, err
    assert message in err
    assert err.count("\n") == 1


def test_keys_that_do_nothing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = json.loads(Path(MODEL).read_text())
    # Keys of other versions: the first still means something, the others nothing.
    (tmp_path / "config.json").write_text(json.dumps({**said, "rope_theta": 1e5, "auto_map": {}, "flavour": "sweet"}))
    assert cli.main(["plan", str(tmp_path), "--rank", "16", "--json"]) == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: LlamaConfig does not know, and ignores, auto_map, flavour."
    ]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("typer", ["plan", MODEL]), ("transformers", ["plan", MODEL]), ("matplotlib", ["plot", "RUN"])],
)
def test_a_missing_package_is_named(module: str, arguments: list[str], tmp_path: Path) -> None:
    run_folder = log(tmp_path / "run", 3)
    given = [str(run_folder) if a == "RUN" else a for a in arguments]
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "import importlib.abc\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {module!r}:\n"
        f"            raise ModuleNotFoundError(f'No module named {{name!r}}', name={module!r})\n"
        f"del sys.modules[{module!r}]; sys.meta_path.insert(0, Missing())\n"
        f"from ldadam_dist.cli import main; sys.exit(main({given!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pip install 'ldadam-dist[cli]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("h100", 79 * 2**30)])
def test_memory_has_a_unit(text: str, size: int) -> None:
    assert parse_memory(text) == size


def test_a_plan_inside_a_run_is_refused(capsys: pytest.CaptureFixture[str], fake_world: Any) -> None:
    fake_world(2)
    with pytest.raises(RuntimeError, match="process group already"):
        cli.main(["plan", MODEL, "--rank", "16"])
    assert torch.distributed.is_initialized()
