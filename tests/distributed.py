"""Runs a function on real gloo ranks: one process each, a file store, a hang limit, and nothing left behind."""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

HANG_LIMIT = 600.0
"""Seconds after which ranks that are still running are killed and the test fails; for hangs, not for slow machines."""

_context = multiprocessing.get_context("forkserver")
# Imported once, so that a rank starts in a moment; what is not installed is passed over.
_context.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.checkpoint", "models", "ldadam_dist", "launch.trainer"]
    + ([] if torch.cuda.is_available() else ["deepspeed"])  # which looks for GPUs, and CUDA does not survive a fork
)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, backend: str = "gloo") -> list[Any]:
    """Call `function(*args)` on `world_size` ranks of one group and return what each returned.

    Args:
        world_size: number of processes.
        function: a module-level function.
        args: picklable arguments.
        backend: of the group.
    Raises:
        AssertionError: a rank raised (with its traceback), died or hung.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes = _run(world_size, _rank, (folder, HANG_LIMIT, backend, function, args))
        crashes, errors = _texts(folder, "crash-*"), _texts(folder, "error-*")
        # The causes first: a rank that died makes the others fail too, and a report may be cut before its own text.
        causes = [text.split("\n")[0] for text in crashes] + [text.rstrip().split("\n")[-1] for text in errors]
        exits = f"exit codes of the ranks (None: running after {HANG_LIMIT:.0f} s): {codes}"
        if crashes or errors or codes != [0] * world_size:
            raise AssertionError("\n".join([exits, *causes, "", *crashes, *errors]))
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def run_failing(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 3.0) -> list[str | None]:
    """Call `function(*args)` on ranks of which some fail; the traceback of each that raised, and None of the others.

    Args:
        world_size, function, args: as for `run_ranks`.
        timeout: of collectives, in seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes = _run(world_size, _rank, (folder, timeout, "gloo", function, args), patience=30.0)
        assert None not in codes, f"exit codes of the ranks (None: still running): {codes}"
        paths = [Path(folder) / f"error-{rank}" for rank in range(world_size)]
        return [path.read_text() if path.exists() else None for path in paths]


def slice_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank should hold."""
    if not isinstance(like, DTensor):
        return whole
    extents, offsets = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    for dim, (extent, offset) in enumerate(zip(extents, offsets, strict=True)):
        whole = whole.narrow(dim, offset, extent)
    return whole


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function once for the same arguments, for all tests that look at what it found; also if it failed."""
    found: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(function)
    def remembered(*args: Any) -> Any:
        if args not in found:
            try:
                found[args] = function(*args)
            except AssertionError as error:
                found[args] = error
        if isinstance(found[args], AssertionError):
            raise found[args]
        return found[args]

    return remembered


def run_like_torchrun(world_size: int, main: Callable[[list[str]], int], arguments: list[str]) -> None:
    """Call a program's `main(arguments)` on every rank with the environment that torchrun gives, only sooner.

    Raises:
        AssertionError: a rank did not return 0 or hung.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    codes = _run(world_size, _torchrun_rank, (store.port, main, arguments))
    assert codes == [0] * world_size, f"exit codes of the ranks (None: still running): {codes}"


def _run(
    world_size: int, target: Callable[..., None], args: tuple[Any, ...], patience: float = 1.0
) -> list[int | None]:
    """Exit codes of the ranks; None for those that had to be killed. No process outlives the call.

    `patience` is how many seconds the others have after one failed, to tell their side.
    """
    processes = [
        _context.Process(target=target, args=(rank, world_size, *args), daemon=True) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline, failed = time.monotonic() + HANG_LIMIT, False
    try:
        while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            if any(p.exitcode not in (None, 0) for p in processes) and not failed:
                failed, deadline = True, time.monotonic() + patience
            time.sleep(0.02)
        return [p.exitcode for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(
    rank: int, world_size: int, folder: str, timeout: float, backend: str, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    crash = open(f"{folder}/crash-{rank}", "w")  # noqa: SIM115  (faulthandler's as long as the process lives)
    faulthandler.enable(crash)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    try:
        torch.save(function(*args), f"{folder}/result-{rank}")
        dist.barrier()
    except BaseException:
        Path(f"{folder}/error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the others may never come to a collective shutdown
    dist.destroy_process_group()


def _texts(folder: str, pattern: str) -> list[str]:
    texts = [path.read_text() for path in sorted(Path(folder).glob(pattern))]
    return [text for text in texts if text.strip()]


def _torchrun_rank(
    rank: int, world_size: int, port: int, main: Callable[[list[str]], int], arguments: list[str]
) -> None:
    local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    joined = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**local, **joined}.items()})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is the caller's
    sys.exit(main(arguments))
