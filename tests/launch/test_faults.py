"""Runs that lose a process: torchrun starts them again, and they end as if nothing had happened."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import HANG_LIMIT
from test_checkpoint import names, same_weights
from test_pretrain import assert_same_curves

from launch.config import REPOSITORY
from launch.pretrain import main as pretrain
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
    "faults",
    [
        # in the training: before there is any checkpoint, and later; the one that raises is not killed, and must leave
        # by itself, though its checkpoint is never written
        "forward:1:1 raise:6:1",
        # while a checkpoint is saved
        "write:4:1 rename:6:0",
        # more places of both kinds
        pytest.param("backward:6:0 step:8:1", marks=pytest.mark.exhaustive),
        pytest.param("write:6:0 checksums:6:1 delete:6:0", marks=pytest.mark.exhaustive),
    ],
)
def test_killed_and_started_again_by_torchrun(
    faults: str, tiny_config: Path, tmp_path: Path, whole: Path, launched: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    train_with(faults, run, tiny_config, launched)
    assert names(run) == ["step_000008", "step_000010"]
    same_weights(run, whole)
    assert_same_curves(read_log(run), read_log(whole), relative=0)


@pytest.mark.parametrize("resume", ["never", pytest.param("another run's", marks=pytest.mark.exhaustive)])
def test_started_again_without_a_folder_or_with_another_runs_checkpoint(
    resume: str, tiny_config: Path, tmp_path: Path, whole: Path, launched: Callable[..., str], monkeypatch: Any
) -> None:
    """The second life goes on in the folder of the first."""
    monkeypatch.chdir(tmp_path)
    if resume == "never":
        train_with("forward:9:1", None, tiny_config, launched, "--resume", "never", struck=tmp_path / "struck")
        (run,) = (tmp_path / "runs").iterdir()
    else:
        run, checkpoint = tmp_path / "run", whole / "checkpoints" / "step_000008"
        train_with("forward:2:1", run, tiny_config, launched, "--resume", checkpoint)
    same_weights(run, whole)
    assert [record["step"] for record in read_log(run)] == list(range(1 if resume == "never" else 9, 11))


def test_the_same_under_deepspeed(
    tiny_config: Path, tmp_path: Path, launched: Callable[..., str], ranks: Callable
) -> None:
    pytest.importorskip("deepspeed")
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = ("--deepspeed", REPOSITORY / "configs" / "deepspeed" / "zero3.json")
    train_with("backward:6:1 second_file:6:1", run, tiny_config, launched, *options)
    ranks(2, "--config", tiny_config, "--output_dir", whole, *OPTIONS, *options)
    assert names(run) == ["step_000008", "step_000010"]
    assert_same_curves(read_log(run), read_log(whole), relative=0)


def train_with(
    faults: str,
    run: Path | None,
    config: Path,
    launched: Callable[..., str],
    *options: object,
    struck: Path | None = None,
) -> None:
    """A run on two ranks, one of which is lost in each life but the last; see faulty_pretrain.py."""
    folder = () if run is None else ("--output_dir", run)
    struck = struck or Path(str(run)).with_name("struck")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launched(
        [*torchrun, "--max-restarts", str(len(faults.split())), "--monitor-interval", "0.2"],
        *("--config", config, *folder, *OPTIONS, *options),
        program=PROGRAM,
        environment={"FAULTS": faults, "STRUCK": str(struck)},
    )
    assert struck.read_text().split() == faults.split()


def start_host(port: int, *arguments: object) -> subprocess.Popen[str]:
    """torchrun as on one of one to two hosts, two processes each."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "elastic"]
    # Those of a host that is gone are missed after three seconds, and another one is waited for no longer than that.
    patience = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    elastic = ["--nnodes", "1:2", "--nproc-per-node", "2", "--max-restarts", "3", "--monitor-interval", "0.2"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--rdzv-conf", patience, *elastic]
    return subprocess.Popen(
        [*command, str(REPOSITORY / "launch" / "pretrain.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def await_store(port: int) -> None:
    """Until the first host serves it: the one that is going to be lost must not."""
    for _ in range(600):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("localhost", port)):
            return
        time.sleep(0.1)
    raise AssertionError("no store")


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(found for child in children for found in descendants(child))]


def test_half_of_the_ranks_are_lost_and_the_others_go_on(tiny_config: Path, tmp_path: Path) -> None:
    """The optimizer's states of four ranks are taken up by two."""
    run, one, steps = tmp_path / "run", tmp_path / "one", 60
    options = ["--config", str(tiny_config), "--steps", str(steps), "--save_every", "5", "--eval_every", "0"]
    assert pretrain([*options, "--output_dir", str(one)]) == 0
    options += ["--output_dir", str(run)]
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    hosts = [start_host(port, *options)]
    try:
        await_store(port)
        hosts.append(start_host(port, *options))
        deadline = time.monotonic() + HANG_LIMIT
        while len(records := read_log(run) if (run / "log.jsonl").exists() else []) < 12:
            assert time.monotonic() < deadline, "no training"
            time.sleep(0.1)
        lost = hosts[1].pid
        for pid in [lost, *descendants(lost)]:  # the agent first, so that it tells nobody
            os.kill(pid, signal.SIGKILL)
        output, _ = hosts[0].communicate(timeout=HANG_LIMIT)
        assert hosts[0].returncode == 0, output
    finally:
        for host in hosts:
            for pid in [host.pid, *descendants(host.pid)] if host.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
            host.communicate()
    assert "fsdp on 4 x cpu" in output
    assert "fsdp on 2 x cpu" in output
    records = read_log(run)
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert_same_curves(records, read_log(one), relative=1e-3)
