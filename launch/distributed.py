"""The processes of a run: what a launcher started, the device of each, and the few collectives the trainer needs."""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from launch.config import ConfigError, expect
from ldadam_dist.network import choose_interface


class FailedRankError(RuntimeError):
    """Something failed on one process, and so for all."""


@dataclass(frozen=True)
class World:
    """This process's place among the processes of the run, and the collectives that the trainer needs.

    Attributes:
        group: what they communicate over; None is the default group.
        launcher_store: outlives the processes if torchrun starts them again; None without a launcher.
    """

    dp_rank: int
    size: int
    local_rank: int
    device: torch.device
    group: Any = None
    launcher_store: Any = None

    @property
    def is_main(self) -> bool:
        return self.dp_rank == 0

    @property
    def is_distributed(self) -> bool:
        return dist.is_initialized()

    def apart(self, timeout: timedelta | None = None) -> World:
        """The same processes over a group of their own on the CPU, for another thread or for long waits; collective."""
        return replace(self, group=dist.new_group(backend="gloo", timeout=timeout)) if self.is_distributed else self

    def remember(self, run: str) -> None:
        """Tell those whom torchrun starts in the place of these processes what the run is."""
        if self.is_main and self.launcher_store is not None:
            self.launcher_store.set("run", run)

    def recall(self) -> str | None:
        """What those before these processes remembered; None for the first. Collective."""

        def look() -> str | None:
            store = self.launcher_store
            return store.get("run").decode() if store is not None and store.check(["run"]) else None

        return self.attempt_on_main(look)

    def barrier(self) -> None:
        if self.is_distributed:
            dist.barrier(self.group)

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if not self.is_distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, on every process."""
        values = [value] * self.size
        if self.is_distributed:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def attempt(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function on every process; what each returned, on every process.

        Raises:
            FailedRankError: on every process, if it raised on one.
            ConfigError: the same, if what was raised is one.
        """
        error: Exception | None = None
        result: Any = None
        try:
            result = function(*args)
        except Exception as raised:
            error = raised
        is_config = isinstance(error, ConfigError)
        told = None if error is None else (is_config, str(error) if is_config else f"{type(error).__name__}: {error}")
        outcomes = self.gather((result, told))
        failed = [(rank, told) for rank, (_, told) in enumerate(outcomes) if told]
        if failed:
            rank, (is_config, told) = failed[0]
            if is_config:
                raise ConfigError(told) from error
            where = f"rank {rank}: " if self.size > 1 else ""
            raise FailedRankError(f"{where}{told}") from error
        return [result for result, _ in outcomes]

    def attempt_on_main(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function on the main process; what it returned, and what it raised, on every process."""
        return self.attempt(function if self.is_main else _nothing, *args)[0]

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each over all processes; through the CPU, so that no GPU is waited for."""
        tensor = torch.tensor(values)
        if self.is_distributed:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all processes, in place."""
        if self.is_distributed:
            dist.all_reduce(tensor, group=self.group)
        return tensor


def start(needs_group: bool = False, timeout_minutes: float = 30.0) -> World:
    """Join the process group when a launcher started this process; pick the device and the number of CPU threads.

    Args:
        needs_group: make a process group of one for a process that was started alone.
        timeout_minutes: how long a collective waits for the other processes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))  # torchrun's, deepspeed's
    if torch.cuda.is_available():
        expect(
            local_size <= torch.cuda.device_count(),
            f"{local_size} processes on this host have {torch.cuda.device_count()} CUDA device(s): expected one each. "
            "Start fewer (--nproc-per-node, --num_gpus, make pretrain NPROC=1), or train on the CPU with "
            "CUDA_VISIBLE_DEVICES= ",
        )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # which torch reads by itself
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // local_size))
    timeout = timedelta(minutes=timeout_minutes)
    limit_waiting(timeout)
    choose_interface()
    options: dict[str, Any] = {}
    store = None
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:  # not started by a launcher
        if not needs_group:
            return World(dp_rank=0, size=1, local_rank=0, device=device)
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    else:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        options |= {"store": meet(store, rank, size, timeout_minutes), "rank": rank, "world_size": size}
    # gloo next to nccl: object broadcasts and checkpoints move CPU tensors.
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=timeout, **options)
    else:
        dist.init_process_group("gloo", timeout=timeout, **options)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, launcher_store=store)


def limit_waiting(timeout: timedelta) -> None:
    """Have ranks wait no longer for each other in any group that is made from now on.

    DeepSpeed and others make groups for themselves, with torch's defaults; so these are changed.
    """
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timeout)


def meet(store: dist.Store, rank: int, size: int, timeout_minutes: float) -> dist.Store:
    """A part of the store for just these processes, among all those that torchrun starts one after another.

    When torchrun starts the processes again, its store still has the addresses of those that are gone, and each
    process takes what it finds first (https://github.com/pytorch/pytorch/issues/167288). So the first process names
    a new meeting, and tells who came to it: one that does not find itself there has read of an earlier meeting.

    Raises:
        FailedRankError: the others did not come in time.
    """
    me = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_minutes * 60
    if rank == 0:
        store.set("meeting", me)
        missing = set(range(1, size))
        while missing := {other for other in missing if not store.check([f"meeting/{me}/{other}"])}:
            wait_until(deadline, f"{len(missing)} of {size} processes, the first of them rank {min(missing)}")
        came = [me, *(store.get(f"meeting/{me}/{other}").decode() for other in range(1, size))]
        store.set(f"meeting/{me}/came", json.dumps(came))
        return dist.PrefixStore(f"meeting/{me}", store)
    while True:
        if store.check(["meeting"]):
            meeting = store.get("meeting").decode()
            store.set(f"meeting/{meeting}/{rank}", me)
            if store.check([f"meeting/{meeting}/came"]):
                came = json.loads(store.get(f"meeting/{meeting}/came"))
                if rank < len(came) and came[rank] == me:
                    return dist.PrefixStore(f"meeting/{meeting}", store)
        wait_until(deadline, "rank 0, or for another that rank 0 waits for")


def wait_until(deadline: float, what: str) -> None:
    """A moment.

    Raises:
        FailedRankError: it is after the deadline.
    """
    if time.monotonic() > deadline:
        raise FailedRankError(f"the processes did not come together in timeout_minutes: waited for {what}")
    time.sleep(0.02)


def _nothing(*_: Any) -> None:
    """What the others do while the main process does something."""


def leave(code: int) -> NoReturn:
    """End this process at once, when the others do not know that it fails.

    To end as usual it would wait for what is under way, a checkpoint or collectives, and the others wait for it: they
    and the launcher hear that it failed when its connections and its process are gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
