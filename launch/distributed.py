"""The processes of a run: what a launcher started, the device of each, and the few collectives the trainer needs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from launch.config import expect


@dataclass(frozen=True)
class World:
    """This process's place among the processes of the run."""

    dp_rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.dp_rank == 0

    @property
    def is_distributed(self) -> bool:
        return dist.is_initialized()

    def barrier(self) -> None:
        if self.is_distributed:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if not self.is_distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all processes, in place."""
        if self.is_distributed:
            dist.all_reduce(tensor)
        return tensor


def start(needs_group: bool = False) -> World:
    """Join the process group when a launcher started this process; pick the device and the number of CPU threads.

    Args:
        needs_group: make a process group of one for a process that was started alone.
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
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_size))
    alone: dict[str, Any] = {}
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:  # not started by a launcher
        if not needs_group:
            return World(dp_rank=0, size=1, local_rank=0, device=device)
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # gloo next to nccl: object broadcasts and checkpoints move CPU tensors.
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **alone)
    else:
        dist.init_process_group("gloo", **alone)
    return World(dp_rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, device=device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
