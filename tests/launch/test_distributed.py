"""How a process of the trainer begins."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from launch import distributed
from launch.distributed import start


def test_a_process_takes_its_share_of_the_cores_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)  # not started by a launcher
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for processes in (1, 2, cores + 1):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        start()
        assert torch.get_num_threads() == max(1, cores // processes)

    torch.set_num_threads(cores + 1)  # as torch does by itself with the variable
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores + 1))
    start()
    assert torch.get_num_threads() == cores + 1


def test_all_groups_keep_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # put back in the end
        monkeypatch.setattr(dist.distributed_c10d, name, getattr(dist.distributed_c10d, name))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    distributed.start(needs_group=True, timeout_minutes=0.5)
    try:
        for group in (dist.group.WORLD, dist.new_group([0], backend="gloo")):
            options = group._get_backend(torch.device("cpu")).options
            assert options._timeout == timedelta(seconds=30)
    finally:
        distributed.stop()
