"""One thread a process: the matrices are small, and distributed tests run several processes on few cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)


@pytest.fixture
def fake_world() -> Iterator[Callable[..., None]]:
    """A function that starts a world in which only one rank exists, in the place of an earlier one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def stop() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def start(world_size: int, rank: int = 1) -> None:
        stop()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield start
    stop()
