"""Wrong input is one line and exit code 2; one run at a time in a folder; Ctrl-C saves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.config import ConfigError
from launch.finetune import KEPT_ARGUMENTS, FinetuneOptions, _keep_options
from launch.lock import LOCK_FILE
from launch.pretrain import main as pretrain

PROGRAM = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    try:
        code = pretrain([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err
    assert code == 2, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]


def test_one_run_at_a_time(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another process holds the lock; killed, it leaves none."""
    run = tmp_path / "run"
    hold = "import sys, time; from pathlib import Path; from launch import distributed, lock\n"
    hold += "lock.hold(Path(sys.argv[1]), distributed.start()); print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(run)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[1])},
    )
    assert holder.stdout
    with holder.stdout:
        try:
            assert holder.stdout.readline() == b"held\n"
            said = refused(capsys, "--config", tiny_config, "--output_dir", run)
            assert f"pid {holder.pid}, since" in said
        finally:
            holder.kill()
            holder.wait()
    assert json.loads((run / LOCK_FILE).read_text())["pid"] == holder.pid
    assert pretrain(["--config", str(tiny_config), "--output_dir", str(run), "--steps", "2"]) == 0
    assert pretrain(["--config", str(tiny_config), "--output_dir", str(run), "--steps", "2"]) == 0
    said = "".join(capsys.readouterr())
    assert "warmup_steps=3 is cut to steps=2" in said
    assert "this run is complete" in said
    checkpoint = run / "checkpoints" / "step_000002"
    (checkpoint / "SHA256SUMS").unlink()
    assert "all 1 checkpoint(s) are damaged" in refused(
        capsys, "--config", tiny_config, "--output_dir", run, "--steps", "2"
    )
    assert checkpoint.is_dir()


def test_wrong_folders_and_data(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    common = ("--config", tiny_config, "--cache_dir", tmp_path / "cache")
    assert "is a file" in refused(capsys, *common, "--output_dir", file)
    assert "is a file" in refused(capsys, *common, "--output_dir", file / "below")
    assert "cannot be written" in refused(capsys, *common, "--output_dir", "/proc/run")
    text = json.dumps({"text": "some words of a document " * 20})
    for name, content, said in (
        ("a.jsonl", f"{text}\n{text}\n{{broken\n".encode(), "a.jsonl, line 3"),
        ("b.parquet", b"PAR1 and then nothing", "b.parquet is not a whole Parquet file"),
        ("c.txt", b"", "is empty"),
        ("d.docx", b"PK\x03\x04 zipped", "d.docx is not text but binary"),
        ("e.txt", b"\x00\x01\x02", "e.txt is not text but binary"),
    ):
        (tmp_path / name).write_bytes(content)
        assert said in refused(capsys, *common, "--output_dir", tmp_path / "run", "--data", tmp_path / name)


def test_one_file_holds_out_its_end(
    tiny_config: Path, documents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "input.txt").write_text("".join(documents))
    arguments = ["--config", tiny_config, "--data", tmp_path / "input.txt", "--output_dir", tmp_path / "run"]
    arguments += ["--cache_dir", tmp_path / "cache", "--steps", "2"]
    assert pretrain([str(argument) for argument in arguments]) == 0
    assert "its last 20.0% are held out" in capsys.readouterr().out


def test_interrupts(tiny_config: Path, tmp_path: Path) -> None:
    """The first saves and exits with 0; a second one, when the first has been seen, ends at once with 130."""
    run = tmp_path / "run"
    command = [sys.executable, str(PROGRAM), "--config", str(tiny_config), "--steps", "100000", "--output_dir"]
    command += [str(run), "--save_every", "0", "--eval_every", "0"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        log = run / "log.jsonl"
        while not (log.exists() and log.read_text().count("\n") > 2):
            assert process.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    output = (tmp_path / "said").read_text()
    assert "stopped by SIGINT" in output
    assert "Traceback" not in output
    assert len(list((run / "checkpoints").iterdir())) == 1
    shutil.rmtree(run)


def test_a_second_interrupt_ends_at_once() -> None:
    program = "import os, signal, time; from launch.stopping import StopRequest\n"
    program += "with StopRequest():\n os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\n"
    program += " time.sleep(1.1); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=50)
    assert done.returncode == 130
    assert b"interrupted again" in done.stderr


def test_finetuning_goes_on_with_the_same_optimizer_only(tmp_path: Path) -> None:
    args = SimpleNamespace(**dict.fromkeys(KEPT_ARGUMENTS, 0.1))
    options = FinetuneOptions(model="m", data="d", rank=4)
    _keep_options(tmp_path, None, options, args)
    _keep_options(tmp_path, "checkpoint-1", options, args)
    for changed in ({"rank": 8}, {"optimizer": "adamw"}):
        with pytest.raises(ConfigError, match=f"{next(iter(changed))}=.* \\(was "):
            _keep_options(tmp_path, "checkpoint-1", replace(options, **changed), args)
    args.weight_decay = 0.0
    with pytest.raises(ConfigError, match=r"weight_decay=0.0 \(was 0.1\)"):
        _keep_options(tmp_path, "checkpoint-1", options, args)
