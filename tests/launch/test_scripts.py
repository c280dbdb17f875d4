"""The launch scripts: what they would run and refuse, how they hand on signals; small scripts play SLURM."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distributed import HANG_LIMIT

from launch.config import REPOSITORY
from launch.runlog import read_log

LAUNCH = REPOSITORY / "launch"
SCRIPTS = [LAUNCH / name for name in ("torchrun.sh", "deepspeed.sh", "slurm.sbatch")]
PRETRAIN = str(LAUNCH / "pretrain.py")
SIGNALS = "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torchrun's --signals-to-handle
DEFAULTS = ["PYTHONFAULTHANDLER=1", "NCCL_DEBUG=WARN", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]
"""What the scripts set unless it is set."""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Without variables that the scripts look at, and with this interpreter."""
    known = "SLURM_ LDADAM_ MASTER_ OMP_ NCCL_ GLOO_ TORCH_ PYTORCH_ HF_ PYTHONPATH PYTHONFAULT".split()
    for name in list(os.environ):
        if name.startswith(tuple(known)):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return dict(os.environ)


def run(
    script: str, *arguments: object, environment: dict[str, str], **changed: str
) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(LAUNCH / script), *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=HANG_LIMIT,
        env={**environment, **changed},
        stdin=subprocess.DEVNULL,
    )


def commands(script: str, *arguments: object, environment: dict[str, str], **changed: str) -> list[list[str]]:
    """The words of what --dry-run prints, a list for each line."""
    done = run(script, "--dry-run", *arguments, environment=environment, **changed)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line, comments=True) for line in done.stdout.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: make install-dev, or apt-get install shellcheck")
    done = subprocess.run([shellcheck, "-x", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help(script: Path, environment: dict[str, str]) -> None:
    done = run(script.name, "--help", environment=environment)
    assert done.returncode == 0
    assert done.stdout.startswith("usage:")
    assert "--no-preflight" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 150


def test_torchrun_on_one_host(environment: dict[str, str]) -> None:
    options = ["--nproc-per-node=2", "--config", "a file.yaml", "--max-restarts", "3", "--output_dir", "out", "--lr=1"]
    check, train = commands("torchrun.sh", *options, environment=environment, OMP_NUM_THREADS="7")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    waits = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100"
    variables = [*DEFAULTS, f"PYTHONPATH={REPOSITORY}", "OMP_NUM_THREADS=7", waits, SIGNALS]
    assert check == ["env", *variables, *start, "-m", "ldadam_dist.preflight", "--output-dir", "out"]
    passed_on = ["--config", "a file.yaml", "--output_dir", "out", "--lr=1"]
    logs = ["--log-dir=out/logs", "--tee=3"]
    assert train == ["env", *variables, *start, *logs, "--max-restarts=3", PRETRAIN, *passed_on]
    changed = {"NCCL_DEBUG": "INFO", "PYTORCH_ALLOC_CONF": "backend:native", "PYTHONFAULTHANDLER": ""}
    _, train = commands("torchrun.sh", *options, "--log-dir=", "--cpu", environment=environment, **changed)
    assert not any(word.startswith((*changed, "PYTORCH_CUDA", "--log-dir", "--tee")) for word in train)
    assert "CUDA_VISIBLE_DEVICES=" in train


def test_torchrun_on_several_hosts(environment: dict[str, str]) -> None:
    options = ["--nnodes", "1:2", "--rdzv-endpoint", "127.0.0.1:1234", "--rdzv_id", "a"]
    check, train = commands("torchrun.sh", *options, "--", "--nnodes", environment=environment)
    for command, port, name in ((check, 1235, "a-preflight"), (train, 1234, "a")):
        assert f"--rdzv-endpoint=127.0.0.1:{port}" in command
        assert f"--rdzv-id={name}" in command
        assert {"--nnodes=1:2", "--rdzv-backend=c10d", "--local-addr=127.0.0.1"} <= set(command)
        assert "--rdzv-conf=is_host=1,join_timeout=600" in command
    assert train[-1] == "--nnodes"  # what follows -- is the training's
    (train,) = commands("torchrun.sh", *options, "--node-rank=1", environment=environment, PREFLIGHT="0")
    assert "--rdzv-conf=is_host=0,join_timeout=600" in train


def test_processes_are_as_many_as_gpus(environment: dict[str, str]) -> None:
    for devices, count in {"": 1, "0": 1, "2,5,7": 3, "0,-1,2": 1, "NoDevFiles": 1}.items():
        check, _ = commands("torchrun.sh", environment=environment, CUDA_VISIBLE_DEVICES=devices)
        assert f"--nproc-per-node={count}" in check
    check, _ = commands("torchrun.sh", "--cpu", environment=environment, CUDA_VISIBLE_DEVICES="0,1")
    assert "--nproc-per-node=1" in check


@pytest.mark.parametrize(
    "script", ["torchrun.sh --nproc-per-node 2", "deepspeed.sh --num-gpus 2", "accelerate.sh --num-processes 2"]
)
def test_a_host_without_a_gpu_trains_only_if_asked_to(script: str, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/usr/bin/env bash\n[[ $1 == */accelerate_config.py ]] || exit 3\n")
    (tmp_path / "python").chmod(0o755)
    fake = {"PYTHON": str(tmp_path / "python"), "SLURM_JOB_ID": "1"}
    name, *options = script.split()
    for devices in ("", "-1", "NoDevFiles"):
        done = run(name, *options, environment=environment, CUDA_VISIBLE_DEVICES=devices, **fake)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert f"CUDA_VISIBLE_DEVICES is '{devices}'" in done.stderr
        assert "--cpu" in done.stderr
    bare = {key: value for key, value in environment.items() if key != "CUDA_VISIBLE_DEVICES"}
    if not shutil.which("nvidia-smi"):
        assert "torch sees none" in run(name, *options, environment=bare, **fake).stderr
    dry = run(name, "--dry-run", *options, environment=environment)
    assert dry.returncode == 0  # on a login node it is right that there is none
    assert "no GPU on" in dry.stderr
    for asked, changed in ((["--cpu"], {}), ([], {"LDADAM_CPU": "1"})):
        done = run(name, *asked, *options, environment=environment, **fake, **changed)
        assert "no GPU on" not in done.stderr
        assert done.returncode in (1, 2)  # of the fake python
    if name == "deepspeed.sh":
        done = run(name, "--cpu", *options, environment=environment, CUDA_VISIBLE_DEVICES="0", **fake)
        assert "which has GPUs" in done.stderr


def test_deepspeed_on_one_host(environment: dict[str, str]) -> None:
    options = ["--num_gpus", "2", "--master-port", "1234", "--output_dir=out", "--deepspeed", "zero.json"]
    check, train = commands("deepspeed.sh", *options, environment=environment, OMP_NUM_THREADS="1")
    variables = [*DEFAULTS, f"PYTHONPATH={REPOSITORY}", "OMP_NUM_THREADS=1"]
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=warning", "--hostfile="]
    start += ["--num_gpus=2", "--master_port=1234"]
    assert check == ["env", *variables, *start, "--module", "ldadam_dist.preflight", "--output-dir", "out"]
    assert train == ["env", *variables, *start, PRETRAIN, "--output_dir=out", "--deepspeed", "zero.json"]
    _, train = commands("deepspeed.sh", *options, "--log-dir", "logs", environment=environment)
    assert "--enable_each_rank_log=logs" in train


def test_deepspeed_on_several_hosts(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2  # first\nb slots=2\n")
    options = ["--hostfile", tmp_path / "hosts", "--include", "a:0@b:1"]
    given = {"NCCL_DEBUG": "INFO", "SECRET": "x", "HOME": str(tmp_path)}
    (tmp_path / ".deepspeed_env").write_text("\nUCX_TLS=tcp\n")
    printed = run("deepspeed.sh", "--dry-run", *options, environment=environment, **given).stdout.splitlines()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    handed_on = [line.removeprefix("#").strip() for line in printed if line.startswith("#   ")]
    defaults = [line for line in DEFAULTS if not line.startswith("NCCL_DEBUG")]
    assert handed_on == ["UCX_TLS=tcp", f"OMP_NUM_THREADS={threads}", *defaults, "NCCL_DEBUG=INFO"]
    for command in commands("deepspeed.sh", *options, environment=environment, **given):
        assert {f"--hostfile={tmp_path}/hosts", "--include=a:0@b:1", "--launcher=pdsh", "DS_ENV_FILE=FILE"} <= set(
            command
        )
        assert "PDSH_SSH_ARGS_APPEND=-o ServerAliveInterval=10 -o ServerAliveCountMax=3" in command
    alone = ["--hostfile", tmp_path / "hosts", "--node-rank", "1", "--master-addr", "a"]
    _, train = commands("deepspeed.sh", *alone, environment=environment)
    assert {"--no_ssh", "--node_rank=1", "--master_addr=a"} <= set(train)
    assert "--launcher=pdsh" not in train


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("torchrun.sh --nnodes two", "--nnodes two: expected N or MIN:MAX"),
        ("torchrun.sh --nnodes 2", "needs --rdzv-endpoint HOST:PORT"),
        ("torchrun.sh --nnodes 2 --rdzv-endpoint no-such-host.invalid:1", "does not know the name"),
        ("torchrun.sh --nproc-per-node 0", "--nproc-per-node 0: expected a whole number, at least 1"),
        ("torchrun.sh --max-restarts=-1", "--max-restarts -1: expected a whole number"),
        ("torchrun.sh --join-timeout", "--join-timeout needs a value"),
        ("deepspeed.sh --hostfile /no/such/file", "/no/such/file: no such file"),
        ("deepspeed.sh --hostfile /dev/null", "expected lines 'HOST slots=N'"),
        ("deepspeed.sh --num-nodes 2", "--num-nodes needs --hostfile"),
        ("deepspeed.sh --num-gpus many", "--num-gpus many: expected a whole number"),
        ("slurm.sbatch --config x", "not in a SLURM job"),
    ],
)
def test_what_cannot_be_is_refused(command: str, named: str, environment: dict[str, str]) -> None:
    script, *arguments = command.split()
    done = run(script, *arguments, environment=environment)
    assert done.returncode == 2
    assert named in done.stderr
    assert done.stderr.startswith(f"launch/{script}: ")


def test_slurm_script_wants_the_repository(environment: dict[str, str], tmp_path: Path) -> None:
    done = run("slurm.sbatch", environment=environment, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "call sbatch in the repository" in done.stderr


def test_slurm_asks_for_what_it_needs() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    for line in ("--ntasks-per-node=1", "--requeue", "--signal=B:USR1@120", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text
    assert text.index("#SBATCH --signal") < text.index("set -euo pipefail")  # sbatch stops reading at the first command


SRUN = """#!/usr/bin/env bash
# A task for each node, all on this machine; signals are handed on to the tasks' process groups, as SLURM does.
for option; do [[ $option == --nodes=* ]] && nodes=${option#*=}; done
while [[ $1 == --* ]]; do shift; done
set -m
for ((node = 0; node < nodes; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    tasks+=($!)
done
trap 'for task in "${tasks[@]}"; do kill -USR1 -- "-$task"; done' USR1
status=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; done
    wait "$task" || status=$?
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$LOG"
if [[ $1 == show ]]; then printf 'localhost\\nother\\n' | head -n "$SLURM_JOB_NUM_NODES"; fi
"""
PYTHON = """#!/usr/bin/env bash
if [[ $1 == -I ]]; then exec "$REAL_PYTHON" "$@"; fi
echo "$SLURM_NODEID $*" >> "$LOG"
if [[ $* == *ldadam_dist.preflight* ]]; then exit "$PREFLIGHT_CODE"; fi
trap 'echo "$SLURM_NODEID SIGTERM" >> "$LOG"; exit 1' TERM
for ((tick = 0; tick < TICKS; tick++)); do sleep 0.05; done
"""


@pytest.fixture
def slurm(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts launch/slurm.sbatch as job 42 on two nodes, where python only logs its arguments to tmp_path/log."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "fake-python": PYTHON}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, nodes: int = 2, **changed: str) -> subprocess.Popen[str]:
        job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": str(nodes)}
        fake = {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "REAL_PYTHON": sys.executable}
        values = {
            "PYTHON": str(folder / "fake-python"),
            "PREFLIGHT_CODE": "0",
            "TICKS": "0",
            "SLURM_SUBMIT_DIR": REPOSITORY,
            "LDADAM_CPU": "1",
        }
        copy = tmp_path / "slurm_script"  # SLURM runs a copy
        shutil.copy(LAUNCH / "slurm.sbatch", copy)
        started.append(
            subprocess.Popen(
                ["bash", copy, *map(str, arguments)],
                env={**environment, **job, **fake, **values, **changed},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=HANG_LIMIT)


def logged(tmp_path: Path) -> list[str]:
    log = tmp_path / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_slurm_starts_one_task_on_each_node(slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = slurm("--max-restarts", "1", "--config", "x.yaml")
    output, _ = process.communicate(timeout=HANG_LIMIT)
    assert process.returncode == 0, output
    assert output.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 "), output
    for node in ("0", "1"):
        check, train = (line for line in logged(tmp_path) if line.startswith(f"{node} "))
        assert "--rdzv-id=42-preflight" in check
        assert "-m ldadam_dist.preflight" in check
        assert "--rdzv-endpoint=localhost:10084" in train
        assert f"--rdzv-conf=is_host={int(node == '0')}," in train
        assert train.endswith(f"--max-restarts=1 {PRETRAIN} --config x.yaml")


def test_slurm_dry_run_prints_the_command(
    slurm: Callable[..., subprocess.Popen[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    options = ["--kill-on-bad-exit=0", "--wait=0", str(LAUNCH / "torchrun.sh"), "--nnodes=2"]
    expected = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", *options]
    output, _ = slurm("--dry-run", "--lr", "1", MASTER_ADDR="10.0.0.1", MASTER_PORT="7000").communicate(
        timeout=HANG_LIMIT
    )
    assert shlex.split(output) == [*expected, "--rdzv-id=42", "--rdzv-endpoint=10.0.0.1:7000", "--lr", "1"]
    assert logged(tmp_path) == ["scontrol show hostnames node[1-2]"]
    (outside,) = commands("slurm.sbatch", environment=environment, LDADAM_DIST=str(REPOSITORY))
    assert outside == [*expected, "--rdzv-id=0", "--rdzv-endpoint=FIRST_NODE:10000"]
    cores = {"LDADAM_DIST": str(REPOSITORY), "SLURM_CPUS_PER_TASK": "48"}
    (outside,) = commands("slurm.sbatch", environment=environment, **cores)
    assert "--cpus-per-task=48" in outside[: outside.index(options[2])]


def test_before_its_time_limit_a_job_saves_and_is_queued_again(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = slurm(TICKS="1000")
    deadline = time.monotonic() + HANG_LIMIT
    while sum(PRETRAIN in line for line in logged(tmp_path)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)  # the fake python sets its trap
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=HANG_LIMIT)
    assert process.returncode == 1, output
    assert sorted(line for line in logged(tmp_path) if "SIGTERM" in line) == ["0 SIGTERM", "1 SIGTERM"]
    assert logged(tmp_path)[-1] == "scontrol requeue 42"
    assert "stopped by a signal" in output


def test_a_failed_preflight_starts_and_queues_nothing(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = slurm(PREFLIGHT_CODE="1")
    output, _ = process.communicate(timeout=HANG_LIMIT)
    assert process.returncode == 1
    assert "the preflight on" in output
    assert not any(PRETRAIN in line or "requeue" in line for line in logged(tmp_path))


@pytest.mark.slow
def test_slurm_really_trains(slurm: Callable[..., subprocess.Popen[str]], tiny_config: Path, tmp_path: Path) -> None:
    options = ["--nproc-per-node", "2", "--config", tiny_config, "--output_dir", tmp_path / "run"]
    process = slurm(*options, nodes=1, PYTHON=sys.executable, OMP_NUM_THREADS="1")
    output, _ = process.communicate(timeout=HANG_LIMIT)
    assert process.returncode == 0, output
    assert "preflight: all is well" in output
    assert read_log(tmp_path / "run")[-1]["step"] == 10
    kept = "".join(path.read_text() for path in (tmp_path / "run/logs").rglob("*/0/std*.log"))
    assert "step" in kept


@pytest.mark.slow
@pytest.mark.parametrize("script", ["torchrun.sh --nproc-per-node", "deepspeed.sh --num-gpus"])
def test_scripts_really_train(script: str, environment: dict[str, str], tiny_config: Path, tmp_path: Path) -> None:
    name, option = script.split()
    arguments = ["--cpu", option, 2, "--config", tiny_config, "--output_dir", tmp_path / "run"]
    if name == "deepspeed.sh":
        pytest.importorskip("deepspeed")
        arguments += ["--deepspeed", REPOSITORY / "configs" / "deepspeed" / "zero2.json"]
    done = run(name, *arguments, environment=environment, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preflight: all is well" in done.stdout
    assert read_log(tmp_path / "run")[-1]["step"] == 10
