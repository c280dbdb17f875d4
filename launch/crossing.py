"""Checkpoints that another engine takes up: DeepSpeed's by PyTorch's and back, or by other ranks or stages of ZeRO."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.distributed import World
from launch.zero import FREE_ON_RESUME, TAG, leaves


def needs_conversion(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether a checkpoint must be converted; both say ``ranks`` and ``deepspeed``, its settings, None without it.

    torch.distributed.checkpoint loads on any number of ranks; ZeRO's own checkpoints with the same settings only.
    """
    before, now = saved["deepspeed"], current["deepspeed"]
    if before is None or now is None:
        return before is not now
    was, has = ({"ranks": which["ranks"], **dict(leaves(which["deepspeed"]))} for which in (saved, current))
    return any(was.get(key) != has.get(key) for key in {**was, **has} if key not in FREE_ON_RESUME)


@contextlib.contextmanager
def converted(checkpoint: Path, folder: Path, from_zero: bool, to_zero: bool, world: World) -> Iterator[Path]:
    """The checkpoint as the engine can load it, for as long as this is entered; collective.

    Args:
        checkpoint: a folder step_NNN.
        folder: where there is room for a copy, for all ranks to see.
        from_zero, to_zero: whether DeepSpeed has written it, and is to load it, as a universal checkpoint.
    Raises:
        FailedRankError: it cannot be converted.
    """
    copy = folder / f".{checkpoint.name}.converted"
    world = world.apart(timeout=timedelta(days=1))  # it takes as long as the checkpoint is large

    def convert_all() -> Path:
        from ldadam_dist.convert import convert

        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(parents=True)
        source = checkpoint
        if from_zero:
            convert(checkpoint / TAG, copy / "torch")
            source = copy / "torch"
        if to_zero:
            convert(source, copy / "universal")
            source = copy / "universal"
        return source

    try:
        if world.is_main:
            print(f"converting {checkpoint} for this run's ranks and engine", flush=True)
        yield world.attempt_on_main(convert_all)
        world.barrier()
    finally:
        if world.is_main:
            shutil.rmtree(copy, ignore_errors=True)
