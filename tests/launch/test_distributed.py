"""How a process of the trainer begins."""

import os

import pytest
import torch

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
