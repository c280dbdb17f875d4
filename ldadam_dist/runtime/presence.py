"""Finds a process that steps alone where another has named it as a replica; the others would wait for it in vain.

Ranks build their optimizers in the same order. One with a process group writes into the store of the world, under its
number in that order, which ranks it expects. One without looks there whether it is expected. That needs no collective,
in which programs that build an optimizer on one rank only could not take part.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

_built: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()
"""Optimizers built so far in a world; by rank, as threads may be ranks."""


class Presence:
    """One optimizer among those of the other ranks.

    Args:
        parameters: names and shapes.
        group: the processes it shares them with, if any.
    """

    def __init__(self, parameters: Sequence[tuple[str, tuple[int, ...]]], group: Any | None) -> None:
        self._key = ""
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if world is None or dist.get_world_size() == 1 or dist.get_backend() == "fake":
            return
        counts = _built.setdefault(world, {})
        number = counts[dist.get_rank()] = counts.get(dist.get_rank(), 0) + 1
        told = hashlib.sha256(repr(parameters).encode()).hexdigest()[:16]
        self._key, self._world = f"ldadam_dist/optimizer {number}/{told}", weakref.ref(world)
        if group is not None:
            ranks = dist.get_process_group_ranks(group)
            for rank in ranks:
                _store().set(f"{self._key}/{rank}", f"{dist.get_rank()} {ranks}")
            self._key = ""

    def check(self, step: int) -> None:
        """Raise RuntimeError if another rank expects this one to share the parameters; looks at steps 0, 1, 2, 4, 8 …

        Args:
            step: steps taken.
        """
        if not self._key or step & (step - 1) or self._world() is not dist.group.WORLD:
            return
        key = f"{self._key}/{dist.get_rank()}"
        try:
            if not _store().check([key]):
                return
        except RuntimeError:  # the rank that serves the store has ended, and this one may go on by itself
            return
        other, ranks = _store().get(key).decode().split(" ", 1)
        raise RuntimeError(
            f"rank {other} has built this optimizer with process_group= (or replicate_mesh=) of ranks {ranks}, and "
            f"rank {dist.get_rank()} has built its own without: expected the same arguments on every rank. It would "
            f"train alone, and rank {other} would wait for it. If some ranks build one optimizer more than others, "
            f"build it after those that all ranks build."
        )


def _store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
