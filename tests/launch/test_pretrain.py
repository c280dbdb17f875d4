"""The trainer itself: one and two ranks, both optimizers, logs, checkpoints."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import optim
from launch.compare import main as compare
from launch.optim import build_groups
from launch.pretrain import main as pretrain
from launch.runlog import Record, read_log

STEPS = 10  # as in the tiny configuration; saved at 6 and 10
PNG = b"\x89PNG"


def values(records: list[Record], name: str) -> list[float]:
    return [record[name] for record in records if record[name] is not None]


def assert_same_curves(first: list[Record], second: list[Record], relative: float) -> None:
    assert [record["step"] for record in first] == [record["step"] for record in second]
    for name in ("loss", "val_loss", "grad_norm", "lr", "tokens"):
        assert values(first, name) == pytest.approx(values(second, name), rel=relative), name


@pytest.fixture(scope="module", params=["ldadamw", "adamw"])
def optimizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def one_rank(optimizer: str, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / optimizer
    assert pretrain(["--config", str(tiny_config), "--optimizer", optimizer, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def two_ranks(
    optimizer: str,
    tiny_config: Path,
    tmp_path_factory: pytest.TempPathFactory,
    torchrun: Callable[..., None],
    ranks: Callable[..., None],
) -> Path:
    folder = tmp_path_factory.mktemp("two") / optimizer
    start = torchrun if optimizer == "ldadamw" else ranks
    start(2, "--config", tiny_config, "--optimizer", optimizer, "--output_dir", folder)
    return folder


def test_loss_falls_and_everything_is_written(one_rank: Path, optimizer: str) -> None:
    records = read_log(one_rank)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] < records[0]["loss"] - 1
    assert [record["step"] for record in records if record["val_loss"] is not None] == [4, 8, STEPS]
    assert records[-1]["val_loss"] < records[3]["val_loss"]
    assert records[-1]["tokens"] == STEPS * 8 * 32
    assert all(record["skipped_steps"] == 0 for record in records)
    assert (one_rank / "curves.png").read_bytes().startswith(PNG)
    assert list((one_rank / "tensorboard").iterdir())
    assert f"optimizer: {optimizer}" in (one_rank / "config.yaml").read_text()
    names = sorted(path.name for path in (one_rank / "checkpoints").iterdir())
    assert names == ["step_000006", "step_000010"]


def test_two_ranks_train_like_one(one_rank: Path, two_ranks: Path) -> None:
    assert_same_curves(read_log(two_ranks), read_log(one_rank), relative=2e-5)


@pytest.mark.parametrize("optimizer", ["ldadamw"], indirect=True)
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_accumulation_and_checkpointing_train_like_one(
    one_rank: Path, optimizer: str, parallel: str, tiny_config: Path, tmp_path: Path, ranks: Callable[..., None]
) -> None:
    options = ["--parallel", parallel, "--micro_batch_size", "2", "--activation_checkpointing", "true"]
    options += ["--metrics_every", "2"]
    ranks(2, "--config", tiny_config, "--optimizer", optimizer, "--output_dir", tmp_path / "run", *options)
    records = read_log(tmp_path / "run")
    assert_same_curves(records, read_log(one_rank), relative=2e-5)
    assert "ldadamw/captured_energy" not in records[0]
    assert all(0 < record["ldadamw/captured_energy"] < 1 for record in records[1:])
    assert records[1]["ldadamw/error_norm"] == records[2]["ldadamw/error_norm"] != records[3]["ldadamw/error_norm"]


def assert_gradients_are_averaged_as_factors(
    size: int, options: list[str], tiny_config: Path, tmp_path: Path, ranks: Callable[..., None]
) -> None:
    """The curves of one rank, and an exact resume; on fewer replicas, or with whole gradients, from the mean error."""
    # Norms are the replicas' own, so nothing is clipped, and they are not compared.
    common = ["--config", str(tiny_config), "--clip", "0", "--save_every", "6"]
    replicas = ["--gradient_sync", "lowrank", "--micro_batch_size", "1", *options]
    assert pretrain([*common, "--output_dir", str(tmp_path / "one")]) == 0
    ranks(size, *common, *replicas, "--output_dir", tmp_path / "run")
    one, run = read_log(tmp_path / "one"), read_log(tmp_path / "run")
    for name in ("loss", "val_loss"):
        assert values(run, name) == pytest.approx(values(one, name), rel=2e-5), name
    again = interrupted(tmp_path / "run", tmp_path / "again")
    ranks(size, *common, *replicas, "--output_dir", again, "--resume", "latest")
    assert values(read_log(again), "loss") == values(run, "loss")
    alone = interrupted(tmp_path / "run", tmp_path / "alone")
    assert pretrain([*common, "--output_dir", str(alone), "--resume", "latest"]) == 0
    assert values(read_log(alone), "loss") == pytest.approx(values(one, "loss"), rel=2e-5)


def test_replicas_that_exchange_factors_train_like_one(
    tiny_config: Path, tmp_path: Path, ranks: Callable[..., None]
) -> None:
    assert_gradients_are_averaged_as_factors(2, ["--parallel", "ddp"], tiny_config, tmp_path, ranks)


@pytest.mark.slow
def test_sharded_replicas_that_exchange_factors_train_like_one(
    tiny_config: Path, tmp_path: Path, ranks: Callable[..., None]
) -> None:
    assert_gradients_are_averaged_as_factors(4, ["--replicas", "2"], tiny_config, tmp_path, ranks)


@pytest.mark.slow
def test_sharded_replicas_train_like_one(tiny_config: Path, tmp_path: Path, ranks: Callable[..., None]) -> None:
    assert pretrain(["--config", str(tiny_config), "--output_dir", str(tmp_path / "one")]) == 0
    ranks(4, "--config", tiny_config, "--replicas", "2", "--output_dir", tmp_path / "run")
    assert_same_curves(read_log(tmp_path / "run"), read_log(tmp_path / "one"), relative=2e-5)


def interrupted(run: Path, folder: Path) -> Path:
    """A copy of a run as if it had been ended after its first checkpoint was followed by more steps."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / "step_000010")
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:8]))
    return folder


@pytest.mark.parametrize("optimizer", ["ldadamw"], indirect=True)
def test_resumed_ranks_go_on_exactly(
    two_ranks: Path, optimizer: str, tiny_config: Path, tmp_path: Path, ranks: Callable[..., None]
) -> None:
    folder = interrupted(two_ranks, tmp_path / "run")
    ranks(2, "--config", tiny_config, "--optimizer", optimizer, "--output_dir", folder, "--resume", "latest")
    assert_same_curves(read_log(folder), read_log(two_ranks), relative=0)


def test_resumed_on_one_rank_goes_on_exactly(one_rank: Path, optimizer: str, tiny_config: Path, tmp_path: Path) -> None:
    folder = interrupted(one_rank, tmp_path / "run")
    checkpoint = folder / "checkpoints" / "step_000006"
    assert pretrain(["--config", str(tiny_config), "--optimizer", optimizer, "--resume", str(checkpoint)]) == 0
    assert_same_curves(read_log(folder), read_log(one_rank), relative=0)


def test_a_run_of_an_earlier_version_goes_on(
    one_rank: Path, optimizer: str, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its vectors were in one group with the embeddings."""
    arguments = ["--config", str(tiny_config), "--optimizer", optimizer, "--output_dir"]
    monkeypatch.setattr(optim, "build_groups", lambda model, options, _: build_groups(model, options, 2))
    assert pretrain([*arguments, str(tmp_path / "run")]) == 0
    folder = interrupted(tmp_path / "run", tmp_path / "resumed")
    monkeypatch.undo()
    assert pretrain([*arguments, str(folder)]) == 0
    assert_same_curves(read_log(folder), read_log(one_rank), relative=0)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["ldadamw"], indirect=True)
def test_errors_in_gradients_train_like_errors_apart(
    one_rank: Path, optimizer: str, tiny_config: Path, tmp_path: Path
) -> None:
    """Clipped, and without clipping, where a resumed run goes on exactly too."""
    for name, options in {
        "clipped": ["--error_in_grad", "true"],
        "in": ["--error_in_grad", "true", "--clip", "0"],
        "apart": ["--clip", "0"],
    }.items():
        assert pretrain(["--config", str(tiny_config), "--output_dir", str(tmp_path / name), *options]) == 0
    assert_same_curves(read_log(tmp_path / "clipped"), read_log(one_rank), relative=0)
    merged, apart = read_log(tmp_path / "in"), read_log(tmp_path / "apart")
    assert values(merged, "grad_norm") == []
    assert values(merged, "loss") == values(apart, "loss")
    assert values(merged, "val_loss") == values(apart, "val_loss")
    folder = interrupted(tmp_path / "in", tmp_path / "again")
    checkpoint = str(folder / "checkpoints" / "step_000006")
    options = ["--error_in_grad", "true", "--clip", "0", "--resume", checkpoint]
    assert pretrain(["--config", str(tiny_config), *options]) == 0
    assert values(read_log(folder), "loss") == values(merged, "loss")


def test_checkpoint_of_two_ranks_goes_on_with_one(
    two_ranks: Path, optimizer: str, tiny_config: Path, tmp_path: Path
) -> None:
    folder = interrupted(two_ranks, tmp_path / "run")
    options = ["--config", str(tiny_config), "--optimizer", optimizer, "--output_dir", str(folder)]
    assert pretrain([*options, "--resume", "latest"]) == 0
    assert_same_curves(read_log(folder), read_log(two_ranks), relative=2e-5)


def test_comparison(one_rank: Path, two_ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(two_ranks, other)
    assert compare([str(one_rank), str(other), "--output", str(tmp_path / "both.png")]) == 0
    table = capsys.readouterr().out
    assert f"| {one_rank.name} | 10 |" in table
    assert "| other | 10 |" in table
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)


def test_runs_that_do_not_fit_are_refused(
    one_rank: Path, optimizer: str, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config", str(tiny_config), "--optimizer", optimizer]
    checkpoint = str(one_rank / "checkpoints" / "step_000006")
    refused = {
        f"--output_dir {one_rank} --resume never": "holds a run",
        f"--output_dir {one_rank} --seed 1": "seed=1 (was 0)",
        f"--resume {checkpoint} --lr 0.5": "lr=0.5",
        f"--resume {checkpoint} --steps 6": "nothing is left",
        f"--resume {one_rank}": "trainer.json",
        f"--resume latest --output_dir {tmp_path}": "no complete checkpoint",
        f"--parallel fsdp --output_dir {tmp_path}": "torchrun",
        f"--rank 4000 --optimizer ldadamw --output_dir {tmp_path}": "rank",
    }
    for arguments, named in refused.items():
        assert pretrain([*options, *arguments.split()]) == 2, arguments
        assert named in capsys.readouterr().err


def test_divergence_is_named(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = ["--optimizer", "adamw", "--lr", "1e30", "--lr_other", "1e30", "--clip", "0"]
    assert pretrain(["--config", str(tiny_config), "--output_dir", str(tmp_path / "run"), *huge]) == 1
    assert "expected a finite number" in capsys.readouterr().err
