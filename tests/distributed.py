"""Runs a function on real gloo ranks: one process each, a file store, a hang limit, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HANG_LIMIT = 150.0
"""Seconds after which ranks that are still running are killed and the test fails."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint", "models", "ldadam_dist"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = HANG_LIMIT) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks of one gloo group and return what each returned.

    Args:
        world_size: number of processes.
        function: a module-level function.
        args: picklable arguments.
        timeout: hang limit in seconds, for collectives too.
    Raises:
        AssertionError: a rank raised (with its traceback), died or hung.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(target=_rank, args=(rank, world_size, folder, timeout, function, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
                if any(p.exitcode not in (None, 0) for p in processes):
                    time.sleep(1.0)  # let the others tell their side
                    break
                time.sleep(0.02)
            alive = [rank for rank, p in enumerate(processes) if p.is_alive()]
        finally:
            for process in processes:
                process.kill()
                process.join()
        errors = "\n".join(path.read_text() for path in sorted(Path(folder).glob("error-*")))
        assert not errors, errors
        assert not alive, f"ranks {alive} were still running after {timeout:.0f} s"
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, timeout: float, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"] = str(rank), str(world_size), str(rank)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    try:
        torch.save(function(*args), f"{folder}/result-{rank}")
        dist.barrier()
    except BaseException:
        Path(f"{folder}/error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the others may never come to a collective shutdown
    dist.destroy_process_group()
