"""launch/pretrain.py under DeepSpeed: every shipped JSON on two ranks, its launcher, resuming, and what is refused."""

import functools
import itertools
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_like_torchrun, run_ranks
from test_pretrain import assert_same_curves, interrupted

from launch.config import REPOSITORY, ConfigError, parse_config
from launch.distributed import World
from launch.pretrain import main as pretrain
from launch.runlog import read_log
from launch.zero import ZeroEngine, leaves, prepare_deepspeed, read_json, refuse_misspelt, zero_settings
from ldadam_dist.convert import convert

pytest.importorskip("deepspeed")

FOLDER = REPOSITORY / "configs" / "deepspeed"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.json"))
QUICK = ("zero2", "zero3")
TWO_RANKS = World(dp_rank=0, size=2, local_rank=0, device=torch.device("cpu"))

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Callable[..., None]) -> Run:
    """The folder of a run of the tiny configuration on two ranks under DeepSpeed; each takes place once."""
    done: dict[tuple[str, ...], Path] = {}

    def run(*options: str) -> Path:
        if options not in done:
            folder = tmp_path_factory.mktemp("run") / "run"
            ranks(2, "--config", tiny_config, "--output_dir", folder, *options)
            done[options] = folder
        return done[options]

    return run


@pytest.fixture(scope="module")
def plain(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run with an optimizer, of one process and without DeepSpeed."""

    @functools.cache
    def plain(optimizer: str) -> Path:
        folder = tmp_path_factory.mktemp("plain") / optimizer
        assert pretrain(["--config", str(tiny_config), "--optimizer", optimizer, "--output_dir", str(folder)]) == 0
        return folder

    return plain


def under(name: str) -> tuple[str, str]:
    return "--deepspeed", str(FOLDER / f"{name}.json")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in SHIPPED])
def test_trains_like_one_process_without_deepspeed(name: str, run: Run, plain: Run) -> None:
    assert_same_curves(read_log(run(*under(name))), read_log(plain("ldadamw")), relative=2e-5)


@pytest.mark.parametrize("name", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_metrics_are_those_of_one_process(name: str, run: Run, tiny_config: Path, tmp_path: Path) -> None:
    options = ("--metrics_every", "1")
    assert pretrain(["--config", str(tiny_config), "--output_dir", str(tmp_path / "run"), *options]) == 0
    for found, expected in zip(read_log(run(*under(name), *options)), read_log(tmp_path / "run"), strict=True):
        told = {key for key in expected if key.startswith("ldadamw/")} - {"ldadamw/wire_bytes"}
        assert len(told) >= 6
        expected = {key: expected[key] for key in told}
        assert {key: found[key] for key in told} == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_accumulates_and_recomputes(run: Run, plain: Run, tmp_path: Path) -> None:
    """Under ZeRO-3 that gathers every weight when it is needed; so small ones stay, if the shipped JSON decides."""
    settings = json.loads((FOLDER / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    options = ("--micro_batch_size", "2", "--activation_checkpointing", "true")
    found = run("--deepspeed", str(tmp_path / "zero3.json"), *options)
    assert_same_curves(read_log(found), read_log(plain("ldadamw")), relative=2e-5)


def test_bfloat16_stays_close(run: Run, plain: Run) -> None:
    assert_same_curves(read_log(run(*under("zero2"), "--precision", "bf16")), read_log(plain("ldadamw")), relative=2e-2)


@pytest.mark.slow
def test_under_the_deepspeed_launcher(
    plain: Run, tiny_config: Path, tmp_path: Path, launched: Callable[..., None]
) -> None:
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    with socket.create_server(("localhost", 0)) as server:  # the launcher does not choose a free port by itself
        port = server.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    # One host of a hostfile, as on a cluster whose scheduler starts the launcher on every host.
    hosts = ["--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--node_rank", "0", "--master_addr", "localhost"]
    launched([*launcher, *hosts], "--config", tiny_config, "--output_dir", tmp_path / "run", *under("zero2"))
    assert_same_curves(read_log(tmp_path / "run"), read_log(plain("ldadamw")), relative=2e-5)


@pytest.mark.slow
def test_alone_and_with_adamw(plain: Run, tiny_config: Path, tmp_path: Path, launched: Callable[..., None]) -> None:
    options = ["--config", tiny_config, "--output_dir", tmp_path / "run", "--optimizer", "adamw"]
    launched([sys.executable], *options, *under("zero1"))
    assert_same_curves(read_log(tmp_path / "run"), read_log(plain("adamw")), relative=2e-5)


def with_a_bad_gradient(arguments: list[str]) -> int:
    """The program, but for a gradient that is not finite: on the last rank, in its third step."""
    finite, steps = ZeroEngine.loss, itertools.count(1)

    def loss(engine: ZeroEngine, tokens: torch.Tensor) -> torch.Tensor:
        value = finite(engine, tokens)
        if value.requires_grad and next(steps) == 3 and engine.world.dp_rank == engine.world.size - 1:
            value.register_hook(lambda grad: grad * float("inf"))
        return value

    ZeroEngine.loss = loss  # type: ignore[method-assign]
    return pretrain(arguments)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tiny_config: Path, tmp_path: Path) -> None:
    options = ["--config", str(tiny_config), "--output_dir", str(tmp_path / "run"), "--steps", "5"]
    run_like_torchrun(2, with_a_bad_gradient, [*options, *under("zero1")])
    records = read_log(tmp_path / "run")
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 1]
    assert [record["grad_norm"] is None for record in records] == [False, False, True, False, False]


@pytest.mark.parametrize("name", ["zero2", pytest.param("zero3_offload", marks=pytest.mark.slow)])
def test_resumed_goes_on_exactly(name: str, run: Run, tiny_config: Path, tmp_path: Path, ranks: Callable) -> None:
    whole = run(*under(name))
    folder = interrupted(whole, tmp_path / "run")
    ranks(2, "--config", tiny_config, "--output_dir", folder, *under(name), "--resume", "latest")
    assert_same_curves(read_log(folder), read_log(whole), relative=0)


@pytest.mark.parametrize(
    ("saved", "size", "options"),
    [
        ("zero2", 2, ()),  # FSDP2
        pytest.param("zero2", 2, under("zero3"), marks=pytest.mark.exhaustive),
        pytest.param("zero3", 2, under("zero1"), marks=pytest.mark.slow),
        pytest.param("zero3", 4, under("zero3"), marks=pytest.mark.slow),
        pytest.param("zero1", 1, under("zero1"), marks=pytest.mark.slow),
        pytest.param("zero3_offload", 1, (), marks=pytest.mark.slow),
        pytest.param(None, 2, under("zero3"), marks=pytest.mark.slow),
        pytest.param(None, 2, under("zero2"), marks=pytest.mark.exhaustive),
    ],
)
def test_resumed_by_other_ranks_and_engines(
    saved: str | None, size: int, options: tuple[str, ...], run: Run, plain: Run, tiny_config: Path, tmp_path: Path
) -> None:
    """Of the same command but for --deepspeed; what was converted on the way does not stay."""
    whole = run(*under(saved)) if saved else plain("ldadamw")
    folder = interrupted(whole, tmp_path / "run")
    run_like_torchrun(size, pretrain, ["--config", str(tiny_config), "--output_dir", str(folder), *options])
    assert_same_curves(read_log(folder), read_log(whole), relative=2e-5)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000006", "step_000010"]


@pytest.mark.parametrize("name", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_file_of_the_last_rank_that_is_missing_is_noticed(name: str, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "zero"
    shutil.copytree(run(*under(name)) / "checkpoints" / "step_000006" / "zero", folder)
    (lost,) = folder.glob("*zero_pp_rank_1_mp_rank_00_optim_states.pt")
    lost.unlink()
    with pytest.raises(ValueError, match="of 1 ranks: expected all 2"):
        convert(folder, tmp_path / "converted")


@pytest.mark.parametrize("optimizer", ["ldadamw", "adamw"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_auto_is_filled_in(name: str, optimizer: str) -> None:
    options = ["--batch_size", "8", "--micro_batch_size", "2", "--rank", "5", "--clip", "0.5"]
    config = parse_config([*under(name), *options, "--optimizer", optimizer])
    found = dict(leaves(zero_settings(config, TWO_RANKS, 2)))
    expected = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    assert found.items() >= {**expected, "bf16.enabled": False}.items()
    assert found.get("optimizer.params.rank") == (5 if optimizer == "ldadamw" else None)
    assert "auto" not in found.values()


def test_how_states_are_stored_is_the_runs_or_the_files(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    changed = {"optimizer": {"params": {"error_dtype": "int8"}}}
    path.write_text(json.dumps({**json.loads((FOLDER / "zero2.json").read_text()), **changed}))
    options = ["--state_dtype", "bfloat16", "--stochastic_rounding", "true"]
    found = dict(leaves(zero_settings(parse_config(["--deepspeed", str(path), *options]), TWO_RANKS, 8)))
    expected = {"error_dtype": "int8", "state_dtype": "bfloat16", "stochastic_rounding": True}
    assert {key: found[f"optimizer.params.{key}"] for key in expected} == expected


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"train_batch_size": 32}, "train_batch_size=32, but the run needs 16 (batch_size=16"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4, but the run needs 1"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5, but the run needs 1.0 (clip=1.0)"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=True, but the run needs False (precision=auto on cpu)"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True"),
        ({"bf16": True}, "bf16 is True: expected a section"),
        ({"optimizer": {"type": "Muon"}}, "optimizer.type='Muon', but the run has optimizer=ldadamw: expected LDAdamW"),
        ({"optimizer": {"params": {"rank": 8}}}, "optimizer.params.rank=8, but the run needs 16 (rank=16)"),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, "optimizer.params.betas=[0.9, 0.95], but"),
        ({"optimizer": {"params": {"error_dtype": "int8"}}}, "error_dtype='int8', but the run needs 'int4'"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage=0: expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({**json.loads((FOLDER / "zero2.json").read_text()), **changed}))
    with pytest.raises(ConfigError) as refused:
        zero_settings(parse_config(["--deepspeed", str(path), "--error_dtype", "int4"]), TWO_RANKS, 8)
    assert named in str(refused.value)


def misspelt() -> None:
    prepare_deepspeed(0, on_cpu=True)
    for path in FOLDER.glob("*.json"):
        refuse_misspelt(json.loads(path.read_text()), path.name)
    refuse_misspelt({"tensorboard": {}, "our_own_notes": "", "compile": {}, "bf16": {}}, "zero.json")
    for key, meant in {
        "gradient_cliping": "gradient_clipping",
        "zero_optimisation": "zero_optimization",
        "bf_16": "bf16",
    }.items():
        with pytest.raises(ConfigError, match=f"zero.json: unknown key '{key}': did you mean '{meant}'"):
            refuse_misspelt({"train_batch_size": 16, key: 0.5}, "zero.json")


def test_misspelt_keys_are_refused() -> None:
    """In a process of its own: importing DeepSpeed changes an environment that others read."""
    run_ranks(1, misspelt)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    for name, said in (("broken.json", "is not JSON"), ("bytes.json", "is not JSON"), ("", "cannot be read: Is a dir")):
        with pytest.raises(ConfigError, match=said):
            read_json(str(tmp_path / name))
    refused = {
        ("--deepspeed", str(tmp_path / "none.json")): "no such file",
        (*under("zero2"), "--parallel", "ddp"): "parallel=ddp and deepspeed=",
    }
    for arguments, named in refused.items():
        with pytest.raises(SystemExit):
            parse_config(arguments)
        assert named in capsys.readouterr().err


def test_what_the_launcher_adds_is_no_option() -> None:
    assert parse_config(["--local_rank=1", "--lr", "0.5"]) == parse_config(["--lr", "0.5"])
    assert "local_rank" not in parse_config(["--local_rank=1"]).flat()
