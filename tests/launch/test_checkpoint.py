"""Checkpoints of the trainer: when they are written, what is kept, damage, signals, a full disk."""

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrain import assert_same_curves
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from launch.checksums import SUMS, find_damage, write_sums
from launch.distributed import World
from launch.engine import TorchEngine, Update
from launch.pretrain import main as pretrain
from launch.runlog import read_log

ALONE = World(dp_rank=0, size=1, local_rank=0, device=torch.device("cpu"))

Start = Callable[..., int]


@pytest.fixture(scope="module")
def whole(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain(["--config", str(tiny_config), "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def start(tiny_config: Path, tmp_path: Path) -> Start:
    """Start the same command, of a run in tmp_path/run, once more."""
    return lambda *options: pretrain(["--config", str(tiny_config), "--output_dir", str(tmp_path / "run"), *options])


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Let something happen at the end of a step."""

    def after_step(step: int, happen: Callable[[], object]) -> None:
        update, steps = TorchEngine.update, iter(range(1, 1000))

        def updated(engine: TorchEngine, batches: list[torch.Tensor]) -> Update:
            found = update(engine, batches)
            if next(steps) == step:
                happen()
            return found

        monkeypatch.setattr(TorchEngine, "update", updated)

    return after_step


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(checkpoint: Path) -> dict[str, Any]:
    """Model and optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(checkpoint, f"{folder}/all.pt")
        found = dict(flatten(torch.load(f"{folder}/all.pt", weights_only=True)))
    # torch gives this to the groups of an optimizer that loads a state.
    return {name: value for name, value in found.items() if not name.endswith("/differentiable")}


def flatten(nested: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items() if isinstance(nested, dict) else enumerate(nested):
        if isinstance(value, dict | list):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def same_weights(run: Path, other: Path, step: int = 10) -> None:
    """Bit by bit, and all of the optimizer's state."""
    first, second = (contents(folder / "checkpoints" / f"step_{step:06}") for folder in (run, other))
    assert first.keys() == second.keys()
    assert len(first) > 50
    for name, value in first.items():
        assert torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name], name


@pytest.mark.slow
def test_keeps_the_last(start: Start, tmp_path: Path, whole: Path) -> None:
    assert start("--save_every", "2", "--keep_last", "2") == 0
    assert names(tmp_path / "run") == ["step_000008", "step_000010"]
    same_weights(tmp_path / "run", whole)


@pytest.mark.slow
def test_saves_by_the_clock(start: Start, tmp_path: Path) -> None:
    assert start("--save_every", "0", "--save_minutes", "1e-9", "--keep_last", "0", "--async_save", "false") == 0
    assert names(tmp_path / "run") == [f"step_{step:06}" for step in range(1, 11)]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_with_a_checkpoint(
    number: signal.Signals,
    start: Start,
    after_step: Callable,
    tmp_path: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of training, as a scheduler sends it; the handlers from before are back afterwards."""
    before = signal.getsignal(number)
    after_step(3, lambda: os.kill(os.getpid(), number))
    assert start() == 0
    assert signal.getsignal(number) == before
    assert f"stopped by {number.name} after step 3 of 10" in (said := capsys.readouterr().out)
    assert "same command again" in said
    assert names(tmp_path / "run") == ["step_000003"]
    assert start() == 0
    same_weights(tmp_path / "run", whole)
    assert_same_curves(read_log(tmp_path / "run"), read_log(whole), relative=0)


@pytest.mark.slow
def test_a_complete_run_is_not_trained_again(start: Start, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert start() == 0
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    same_weights(tmp_path / "run", whole)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def forget_a_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("__0_0.distcp", cut_short),
        ("__0_0.distcp", flip_a_bit),
        (".metadata", flip_a_bit),
        ("trainer.json", flip_a_bit),
        ("rng_0.pt", Path.unlink),
        ("tokenizer.json", cut_short),
        (SUMS, flip_a_bit),
        (SUMS, forget_a_line),
        (SUMS, Path.unlink),
    ],
)
def test_damage_is_found(name: str, damage: Callable[[Path], object], whole: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_000010"
    shutil.copytree(whole / "checkpoints" / "step_000010", checkpoint)
    assert find_damage(checkpoint, ALONE) is None
    damage(checkpoint / name)
    found = find_damage(checkpoint, ALONE)
    assert found is not None
    assert name in found or (name == SUMS and "checksum differs" in found), found


def test_damage_deep_in_a_folder(tmp_path: Path) -> None:
    """DeepSpeed's files are in a folder of their own."""
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "states.pt").write_bytes(b"states")
    write_sums(tmp_path, ALONE)
    assert find_damage(tmp_path, ALONE) is None
    assert subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path, capture_output=True, check=False).returncode == 0
    (tmp_path / "zero" / "more.pt").write_bytes(b"")
    assert find_damage(tmp_path, ALONE) == f"zero/more.pt is not in {SUMS}"


def test_goes_on_from_the_newest_complete_checkpoint(
    start: Start, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flip_a_bit(run / "checkpoints" / "step_000010" / "__0_0.distcp")
    (run / "checkpoints" / ".step_000011.tmp").mkdir()  # being written when the run was killed
    assert start("--resume", str(run / "checkpoints" / "step_000010")) == 2
    assert "__0_0.distcp" in capsys.readouterr().err
    assert start() == 0
    said = capsys.readouterr().out
    assert "step_000010 is damaged and passed over: __0_0.distcp is not what was written" in said
    assert names(run) == ["step_000006", "step_000010", "step_000010.left"]
    same_weights(run, whole)
    assert_same_curves(read_log(run), read_log(whole), relative=0)


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(start: Start, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("checkpoints"))
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote a line
    assert start("--resume", "latest") == 2
    assert start() == 0
    assert_same_curves(read_log(run), read_log(whole), relative=0)


@pytest.mark.slow
def test_a_named_checkpoint_is_what_the_run_goes_on_from(start: Start, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert start("--resume", str(run / "checkpoints" / "step_000006"), "--steps", "8") == 0
    assert names(run) == ["step_000006", "step_000008", "step_000010.left"]


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_is_refused(start: Start, tmp_path: Path, whole: Path) -> None:
    """Nothing of it is lost."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in (6, 10):
        flip_a_bit(run / "checkpoints" / f"step_{step:06}" / "__0_0.distcp")
    before = (run / "log.jsonl").read_text()
    assert start("--keep_last", "1") == 2
    assert names(run) == ["step_000006", "step_000010"]
    assert (run / "log.jsonl").read_text() == before


@pytest.mark.slow
def test_other_data_is_noticed(start: Start, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the same name, as the standard library of another Python is."""
    data = tmp_path / "corpus"
    shutil.copytree(corpus, data)
    assert start("--data", str(data), "--steps", "6") == 0
    for path in data.iterdir():
        path.write_text(path.read_text()[::-1])
    assert start("--data", str(data)) == 2
    assert "was trained on other data" in capsys.readouterr().err
    assert names(tmp_path / "run") == ["step_000006"]


@pytest.mark.slow
def test_a_checkpoint_that_was_set_aside_is_named_with_what_to_do(
    start: Start, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    left = tmp_path / "run" / "checkpoints" / "step_000010.left"
    left.with_suffix("").rename(left)
    assert start("--resume", str(left)) == 2
    assert "rename it" in capsys.readouterr().err


@pytest.mark.slow
def test_another_runs_checkpoints_are_left_alone(start: Start, tmp_path: Path, whole: Path) -> None:
    assert start("--resume", str(whole / "checkpoints" / "step_000006")) == 0
    assert names(whole) == ["step_000006", "step_000010"]
    same_weights(tmp_path / "run", whole)


@pytest.mark.slow
def test_the_tokenizer_comes_from_the_checkpoint(start: Start, tmp_path: Path, whole: Path) -> None:
    """A host that the run moves to may have none in its cache."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000010")
    assert start("--cache_dir", str(tmp_path / "cache")) == 0
    assert not list((tmp_path / "cache").glob("bpe-*"))
    same_weights(tmp_path / "run", whole)


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written(
    start: Start, after_step: Callable, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the moment at which it was asked for, however long it takes."""
    reached, rename = threading.Event(), Path.rename

    def slowly(path: Path, target: Path) -> Path:
        if target.name == "step_000006":
            assert reached.wait(60)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", slowly)
    after_step(9, reached.set)
    assert start() == 0
    same_weights(tmp_path / "run", whole, step=6)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with place for one checkpoint, and not for two."""
    folder = tmp_path / "run"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]).returncode:
        pytest.skip("needs root, and the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("background", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_checkpoint_before(
    background: str, small_disk: Path, start: Start, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filler = small_disk / "filler"
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / "step_000006").iterdir())
    options = ["--async_save", background, "--keep_last", "1", "--log_every", "100", "--eval_every", "0"]
    filler.write_bytes(bytes(2**22 - size * 3 // 2 - 2**16))
    assert start(*options) == 1
    said = capsys.readouterr().err
    assert "step_000010 could not be written" in said
    assert "No space left on device" in said
    assert "step_000006" in said
    assert names(small_disk) == ["step_000006"]
    assert find_damage(small_disk / "checkpoints" / "step_000006", ALONE) is None
    filler.unlink()
    assert start(*options) == 0
    same_weights(small_disk, whole)
