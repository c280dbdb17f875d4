"""Work on matrices that nobody shares, side by side on the cores of a CPU.

A step has many operations that are too small for two threads, and one barrier each. So each matrix gets one core, if
there are enough of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

LEAST_PER_CORE = 4
"""Pieces of work for each core, at least, or the last ones leave too many cores idle."""


def side_by_side(work: Sequence[tuple[int, Callable[[], object]]]) -> None:
    """Do independent pieces of work on CPU tensors, each on one core, as many at a time as torch uses threads.

    Args:
        work: (size, function) pairs; the largest begin.
    """
    threads = torch.get_num_threads()
    watched = torch._C._len_torch_dispatch_stack() > 0  # by a mode, which sees what is done on its own thread only
    if watched or threads == 1 or len(work) < LEAST_PER_CORE * threads:
        for _, function in work:
            function()
        return
    largest_first = sorted(work, key=lambda piece: -piece[0])
    done = [_pool(threads).submit(_without_grad, function) for _, function in largest_first]
    for future in done:  # all of them, before any error is raised: they write where others may read
        future.exception()
    for future in done:
        future.result()


def _without_grad(function: Callable[[], object]) -> None:
    with torch.no_grad():  # which each thread sets for itself
        function()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """So many threads in which torch uses one each; they end with the process."""
    ready = threading.Barrier(threads + 1)

    def use_one_core() -> None:
        torch.get_num_threads()  # a thread takes over the number of the others when it first asks
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, "ldadam_dist", use_one_core)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # here, and in threads to come: the last call counts for those
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
