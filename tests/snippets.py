"""The programs in docs/quickstart.md, and the commands below each, as a reader would type them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from distributed import HANG_LIMIT

ROOT = Path(__file__).resolve().parent.parent

ACCELERATE_ON_CPUS = """
import os

import accelerate
import accelerate.state
from accelerate.utils import DistributedType

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    del os.environ["ACCELERATE_USE_CPU"]
    accelerate.state.PartialState(backend="gloo")


class Accelerator(accelerate.Accelerator):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            from accelerate.utils import FullyShardedDataParallelPlugin

            accelerate.state.PartialState().distributed_type = self.state.distributed_type = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin()


accelerate.Accelerator = Accelerator
"""
"""Before a program: accelerate shards on GPUs alone, though all that it needs works on CPUs."""

_BLOCK = re.compile(r'^```(python|bash)(?: title="([\w.]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass
class Program:
    """A Python block with a title, and the lines of the bash blocks up to the next one that has it in them.

    Attributes:
        name: the title, a file name.
        code: the block.
        commands: lines that run it.
    """

    name: str
    code: str
    commands: list[str] = field(default_factory=list)


def programs(page: Path) -> dict[str, Program]:
    """The programs of a page by name; "" has the commands that run none of them."""
    found = {"": Program("", "")}
    for language, title, text in _BLOCK.findall(page.read_text()):
        if language == "python":
            assert title, f"{page.name} has a Python block without a title: it would not be run:\n{text}"
            assert title not in found, f"{page.name} has two programs {title}"
            found[title] = Program(title, text)
        else:
            for line in text.splitlines():
                name = next((word for word in shlex.split(line) if word in found), "")
                found[name].commands.append(line)
    return found


def run(command: str, folder: Path) -> str:
    """Run a command in a folder on CPUs, one thread a process; what it printed.

    Raises:
        AssertionError: it failed, or had to be killed.
    """
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if command.startswith("accelerate"):  # or it takes each process for the only one where there is no GPU
        settings["ACCELERATE_USE_CPU"] = "true"
    home = {"HF_HOME": str(folder / "home"), "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    running = subprocess.Popen(
        _arguments(command),
        cwd=folder,
        env=os.environ | settings | home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = running.communicate(timeout=HANG_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        printed, _ = running.communicate()
        raise AssertionError(f"{command}: still running after {HANG_LIMIT:.0f} s:\n{printed[-8000:]}") from None
    assert running.returncode == 0, f"{command}: exit code {running.returncode}:\n{printed[-8000:]}"
    return printed


def _arguments(command: str) -> list[str]:
    """The command with this interpreter's programs and a free port."""
    program, *rest = shlex.split(command)
    python = [sys.executable]
    if program == "torchrun":
        return [*python, "-m", "torch.distributed.run", *rest]
    if program == "deepspeed":
        return [*python, str(Path(sys.executable).parent / "deepspeed"), "--master_port", _free_port(), *rest]
    if program == "accelerate":
        port = ["--main_process_port", _free_port()]
        return [*python, "-m", "accelerate.commands.accelerate_cli", rest[0], *port, *rest[1:]]
    assert program == "python", f"{command}: expected python, torchrun, deepspeed or accelerate"
    return [*python, *rest]


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
