"""Whether an installation is sound: versions, steps on the devices that are here, and two processes against one."""

from __future__ import annotations

import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldadam_dist._version import __version__
from ldadam_dist.optimizer import LDAdamW
from ldadam_dist.param_groups import build_param_groups

OPTIONAL = ("deepspeed", "transformers", "accelerate", "peft", "lightning", "torchtitan", "matplotlib", "typer")

STEPS = 2

Check = tuple[str, Callable[[], str]]
"""Its name, and what says what was found; it raises if that is not sound."""


class UnsoundError(Exception):
    """What was found, what was expected, and what to do."""


def examine(say: Callable[[str], Any], *, quick: bool = False, timeout: float = 60.0) -> bool:
    """Make all checks; whether all is well.

    Args:
        say: gets one line for each check.
        quick: leave out the two processes.
        timeout: seconds that these may take.
    """
    sound = True
    for name, check in _checks(quick, timeout):
        start = time.perf_counter()
        try:
            found = check()
            mark = "ok  "
        except Exception as error:  # whatever an installation that is not sound brings forth
            found = " ".join(f"{'' if isinstance(error, UnsoundError) else f'{type(error).__name__}: '}{error}".split())
            mark, sound = "FAIL", False
        say(f"{mark}  {name}: {found} ({time.perf_counter() - start:.1f} s)")
    say("ldadam-dist is healthy" if sound else "ldadam-dist is not healthy")
    return sound


def _checks(quick: bool, timeout: float) -> Iterator[Check]:
    yield "Python", _python
    yield "torch", _torch
    yield "back-ends", _backends
    yield "optional packages", _optional
    for device in _devices():
        yield f"{STEPS} steps on {device}", lambda device=device: _steps_on(device)  # type: ignore[misc]
    if not quick:
        yield "2 gloo processes", lambda: _two_processes(timeout)


def _devices() -> list[torch.device]:
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(number))]


def _python() -> str:
    return f"{platform.python_version()}, ldadam-dist {__version__}"


def _torch() -> str:
    found = str(torch.__version__)
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if release < (2, 7):
        raise UnsoundError(f"{found}: expected 2.7 or later. pip install 'torch>=2.7'")
    if not torch.cuda.is_available():
        return f"{found}, no CUDA device" + ("" if torch.version.cuda else " (built without CUDA)")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{found}, CUDA {torch.version.cuda}, {', '.join(names)}"


def _backends() -> str:
    if not dist.is_available():
        raise UnsoundError("torch.distributed is not there: expected a build of torch that has it.")
    there = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    if not there["gloo"]:
        raise UnsoundError("torch has no gloo: expected a build that has it.")
    if torch.cuda.is_available() and not there["nccl"]:
        raise UnsoundError("there is a CUDA device, and torch has no nccl: expected a build that has it.")
    return ", ".join(name for name, found in there.items() if found)


def _optional() -> str:
    return ", ".join(f"{name} {_version(name)}" for name in OPTIONAL)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _model(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Projected rows, projected columns, and biases; 19 and 37 so that two processes have uneven shards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(19, 37), nn.Tanh(), nn.Linear(37, 19))
    return model.to(device=device, dtype=dtype)


def _train(model: nn.Module, device: torch.device, dtype: torch.dtype) -> LDAdamW:
    """A few steps, on data that are the same everywhere."""
    optimizer = LDAdamW(build_param_groups(model, rank=4), lr=1e-2, rank=4)
    for step in range(STEPS):
        inputs = torch.randn(16, 19, generator=torch.Generator().manual_seed(step), dtype=dtype).to(device)
        optimizer.zero_grad()
        (model(inputs) - inputs).square().mean().backward()
        optimizer.step()
    return optimizer


def _steps_on(device: torch.device) -> str:
    """Weights stay finite and move, and projectors are orthonormal."""
    model = _model(device, torch.float32)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = _train(model, device, torch.float32)
    for (name, param), old in zip(model.named_parameters(), before, strict=True):
        if not bool(param.isfinite().all()):
            raise UnsoundError(f"{name} is not finite after {STEPS} steps: expected finite weights.")
        if torch.equal(param.detach(), old):
            raise UnsoundError(f"{name} has not moved in {STEPS} steps: expected it to.")
    projectors = [state["projector"] for state in optimizer.state.values() if "projector" in state]
    if len(projectors) != 2:
        raise UnsoundError(f"{len(projectors)} projectors: expected 2.")
    off = max(float((_gram(u) - torch.eye(4, device=device)).abs().max()) for u in projectors)
    if not off < 1e-4:
        raise UnsoundError(f"a projector is {off:.0e} from orthonormal: expected 1e-4 at most.")
    return f"weights finite and moved, projectors orthonormal to {off:.0e}"


def _gram(projector: Tensor) -> Tensor:
    return projector.mT @ projector


def _two_processes(timeout: float) -> str:
    """Sharded by `fully_shard` over two processes, weights are those of one process."""
    cpu = torch.device("cpu")
    model = _model(cpu, torch.float64)
    _train(model, cpu, torch.float64)
    start_anew = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ldadam-doctor-") as folder:
        ranks = [start_anew.Process(target=_on_a_rank, args=(rank, folder, timeout), daemon=True) for rank in range(2)]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout
        try:
            for rank in ranks:
                rank.join(max(0.0, deadline - time.monotonic()))
            late = [number for number, rank in enumerate(ranks) if rank.is_alive()]
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        if late:
            raise UnsoundError(
                f"rank {late[0]} of 2 was not done within {timeout:.0f} s: raise --timeout, or look at gloo."
            )
        for number, rank in enumerate(ranks):
            if rank.exitcode:
                said = Path(folder, f"error{number}")
                why = said.read_text(encoding="utf-8") if said.exists() else f"exit code {rank.exitcode}"
                raise UnsoundError(f"rank {number} of 2 failed: {why}")
        found: dict[str, Tensor] = torch.load(Path(folder, "weights.pt"), weights_only=True)
    off = max(float((found[name] - param.detach()).abs().max()) for name, param in model.named_parameters())
    if not off < 1e-10:
        raise UnsoundError(f"weights of two processes are {off:.0e} from those of one: expected 1e-10 at most.")
    return f"FSDP2 weights equal one process to {off:.0e}"


def _on_a_rank(rank: int, folder: str, timeout: float) -> None:
    """What one of the two processes does."""
    from datetime import timedelta

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from ldadam_dist.network import choose_interface

    try:
        torch.set_num_threads(1)
        choose_interface()
        meeting = Path(folder, "store").as_uri()
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=timeout)
        )
        cpu = torch.device("cpu")
        model = _model(cpu, torch.float64)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        _train(model, cpu, torch.float64)
        whole = {n: p.full_tensor().detach() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
        if rank == 0:
            torch.save(whole, f"{folder}/weights.pt")
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        Path(folder, f"error{rank}").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        sys.exit(1)
