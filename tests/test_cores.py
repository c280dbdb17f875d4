"""Matrices that nobody shares, side by side on the cores of a CPU."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ldadam_dist import LDAdamW
from ldadam_dist.runtime.cores import side_by_side


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def train(steps: int = 5) -> list[torch.Tensor]:
    """12 matrices, each too large to be copied into a batch."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(190, 190, dtype=torch.float64, generator=generator)) for _ in range(12)]
    optimizer = LDAdamW(params, lr=1e-2, rank=4)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(190, 190, dtype=torch.float64, generator=generator)
        optimizer.step()
    return [param.detach() for param in params] + [optimizer.state[param]["error"] for param in params]


def test_equals_one_after_the_other(two_threads: None) -> None:
    together = train()
    torch.set_num_threads(1)
    torch.testing.assert_close(together, train(), rtol=0, atol=1e-10)


def test_each_piece_has_one_core_and_the_caller_keeps_its_own(two_threads: None) -> None:
    seen: list[tuple[int, bool, int]] = []

    def look() -> None:
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident()))

    side_by_side([(1, look)] * 8)
    later: list[int] = []
    new = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert {(threads, grad) for threads, grad, _ in seen} == {(1, False)}
    assert threading.get_ident() not in {thread for *_, thread in seen}
    assert (len(seen), torch.get_num_threads(), later) == (8, 2, [2])


def test_an_error_comes_after_all_are_done(two_threads: None) -> None:
    done: list[int] = []

    def fail() -> None:
        raise ValueError("a piece")

    work = [(9, fail), *((1, lambda i=i: done.append(i)) for i in range(8))]
    with pytest.raises(ValueError, match="a piece"):
        side_by_side(work)
    assert sorted(done) == list(range(8))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_in_a_process_that_was_forked(two_threads: None) -> None:
    """Threads do not survive a fork: the child must not wait for its parent's."""
    side_by_side([(1, int)] * 8)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that waits
        side_by_side([(1, int)] * 8)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
