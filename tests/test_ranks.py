"""The harness of the distributed tests: of ranks that fail, the report says first which did and why."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks


def fail(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "error":
            raise ValueError("the cause")
        os.kill(os.getpid(), signal.Signals[how])
    dist.all_reduce(torch.ones(3))


@pytest.mark.parametrize(
    ("how", "codes", "cause"),
    [
        ("error", "[1, 1, 1]", "ValueError: the cause"),
        ("SIGSEGV", "[1, -11, 1]", "Fatal Python error: Segmentation fault"),
        ("SIGKILL", "[1, -9, 1]", "Connection"),  # as the kernel does when memory ends: nobody can tell more
    ],
)
def test_the_cause_comes_first(how: str, codes: str, cause: str) -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(3, fail, how)
    exits, *rest = str(caught.value).split("\n")
    assert exits.endswith(codes)
    assert any(cause in line for line in rest[: rest.index("")])
