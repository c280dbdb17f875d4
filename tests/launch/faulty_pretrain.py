"""launch/pretrain.py, one rank of which is killed or fails, in each life of the run but the last.

FAULTS says how, in which step and on which rank, a life after the other: "forward:1:1 backward:6:0". STRUCK is a file
to which each is written as it happens.
"""

import itertools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Run as a file, Python looks for modules in this folder alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch.distributed.checkpoint.filesystem import FileSystemWriter

from launch import checkpoint, engine, zero
from launch.pretrain import main
from ldadam_dist import step

STRUCK = Path(os.environ["STRUCK"])
OF_EACH_LIFE = [*os.environ["FAULTS"].split(), "none:0:-1"]
FAULT = OF_EACH_LIFE[int(os.environ["TORCHELASTIC_RESTART_COUNT"])]
KIND, at_step, on_rank = FAULT.split(":")
AT_STEP, ON_RANK = int(at_step), int(on_rank)
step_number = 1
calls = itertools.count(1)
hangs = threading.Event()


def is_time() -> bool:
    """Whether this process is the one, from the step on."""
    return step_number >= AT_STEP and int(os.environ["RANK"]) == ON_RANK


def note() -> None:
    with STRUCK.open("a") as file:
        file.write(f"{FAULT}\n")


def strike(*_: Any) -> None:
    """Kill this process, if it is time."""
    if is_time():
        note()
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, happen: Callable[..., None]) -> None:
    function = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        happen(*args)
        return function(*args, **kwargs)

    setattr(owner, name, replaced)


def after(owner: Any, name: str, happen: Callable[[Any], None]) -> None:
    function = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        happen(found)
        return found

    setattr(owner, name, replaced)


def count_from(_: Any, resumed: Path | None) -> None:
    global step_number
    step_number = 1 + (int(resumed.name.removeprefix("step_")) if resumed else 0)


def count_step(_: Any) -> None:
    global step_number
    step_number += 1


def strike_in_backward(loss: torch.Tensor) -> None:
    if loss.requires_grad:
        loss.register_hook(strike)  # backward has begun, and no layer has its gradients yet


def strike_at_the_second(*_: Any) -> None:
    """Some matrices have their new moments, and others have not; or some files are written."""
    if step_number >= AT_STEP and next(calls) == 2:
        strike()


def strike_at_old(path: Path, *_: Any) -> None:
    if Path(path).suffix == ".old":
        strike()


def hang(temporary: Path, *_: Any) -> None:
    """As on a disk that does not answer.

    The checkpoint before may still be written in that step: if it hung, the training would wait for it, and never come
    to where it fails.
    """
    if is_time() and f".step_{AT_STEP:06d}." in temporary.name:
        hangs.set()
        time.sleep(3600)


def fail_while_a_checkpoint_hangs(_: torch.Tensor) -> None:
    """In the step after the checkpoint's, when it has come to hang."""
    if step_number > AT_STEP and is_time() and hangs.wait(60):
        note()
        raise RuntimeError("one rank fails")


def fail_and_hang() -> None:
    before(checkpoint, "write_sums", hang)
    after(engine.Engine, "loss", fail_while_a_checkpoint_hangs)


FAULTS: dict[str, Callable[[], None]] = {
    "forward": lambda: after(engine.Engine, "loss", strike),
    "backward": lambda: after(engine.Engine, "loss", strike_in_backward),
    "step": lambda: before(step, "adam_direction", strike_at_the_second),
    "write": lambda: after(FileSystemWriter, "write_data", strike),  # this rank's files are there, and not the others
    "second_file": lambda: before(torch, "save", strike_at_the_second),
    "checksums": lambda: before(checkpoint, "write_sums", strike),
    "rename": lambda: before(Path, "rename", strike),
    "delete": lambda: before(shutil, "rmtree", strike_at_old),
    "raise": fail_and_hang,
    "none": lambda: None,
}

if __name__ == "__main__":
    FAULTS[KIND]()
    before(checkpoint.Checkpointer, "start_from", count_from)
    for kind in (engine.TorchEngine, zero.ZeroEngine):
        after(kind, "update", count_step)
    sys.exit(main())
