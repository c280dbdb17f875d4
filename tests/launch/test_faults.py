"""Runs that lose a process: torchrun starts them again, and they end as if nothing had happened."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_checkpoint import names, same_weights
from test_pretrain import assert_same_curves

from launch.runlog import read_log

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("faulty_pretrain.py")
OPTIONS = ("--save_every", "2", "--keep_last", "2")


@pytest.fixture(scope="module")
def whole(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Callable[..., None]) -> Path:
    """A run on two ranks that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ranks(2, "--config", tiny_config, "--output_dir", folder, *OPTIONS)
    return folder


@pytest.mark.parametrize(
    ("fault", "step", "rank"),
    [
        ("forward", 1, 1),  # before there is any checkpoint
        ("backward", 6, 0),
        ("step", 8, 1),
        ("write", 6, 0),
        ("write", 4, 1),
        ("checksums", 6, 1),
        ("rename", 6, 0),
        ("delete", 6, 0),
    ],
)
def test_killed_and_started_again_by_torchrun(
    fault: str, step: int, rank: int, tiny_config: Path, tmp_path: Path, whole: Path, launched: Callable[..., str]
) -> None:
    run, marker = tmp_path / "run", tmp_path / "struck"
    faults = {"FAULT": fault, "FAULT_STEP": str(step), "FAULT_RANK": str(rank), "FAULT_MARKER": str(marker)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launched(
        [*torchrun, "--max-restarts", "1", "--monitor-interval", "0.2"],
        *("--config", tiny_config, "--output_dir", run, *OPTIONS),
        program=PROGRAM,
        environment=faults,
    )
    assert marker.exists()
    assert names(run) == ["step_000008", "step_000010"]
    same_weights(run, whole)
    assert_same_curves(read_log(run), read_log(whole), relative=0)
