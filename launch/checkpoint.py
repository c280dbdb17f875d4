"""Checkpoints: a folder step_NNN with model and optimizer as the engine saves them, and what the trainer knows.

    step_000400/
      .metadata, __0_0.distcp, ...   torch.distributed.checkpoint: loads on any number of ranks
      zero/, latest, ...             instead, under DeepSpeed: loads on as many ranks with the same JSON, or converted
      trainer.json                   step, tokens, schedule, position in the data, options
      tokenizer.json                 what the tokens mean
      rng_0.pt, ...                  random states, one file a rank
      SHA256SUMS                     of all the others

A folder is written under a temporary name, beside the others, and renamed when every rank is done: one that has the
final name was complete, and its checksums tell whether it still is. The run did not go on from a step_NNN.left.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from launch.checksums import synchronise, write_sums
from launch.distributed import FailedRankError, World
from launch.engine import Engine

TRAINER_FILE = "trainer.json"
TOKENIZER_FILE = "tokenizer.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, on any of the ranks; those before it are as they were."""


class Checkpointer:
    """Saves and restores a run.

    Args:
        folder: holds its checkpoints; the same for all ranks.
        keep_last: how many to keep; 0 keeps all.
        background: write while training goes on.
    """

    def __init__(self, folder: Path, engine: Engine, world: World, keep_last: int, background: bool) -> None:
        self.folder, self.engine, self.keep_last, self.background = folder, engine, keep_last, background
        self._world = world.apart()  # the thread communicates while training does
        self._launch = world.broadcast(uuid.uuid4().hex[:8])  # others may still write in the folder, behind a cut link
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def save(self, step: int, trainer: dict[str, Any], tokenizer: str) -> Path:
        """Begin to write step_NNN, and end it too without ``background``; collective.

        Args:
            trainer: plain data, the same on every rank.
            tokenizer: the tokenizer as JSON.
        Raises:
            CheckpointError: this one could not be written, or the one before it.
        """
        self.wait()
        final = self.path(step)
        temporary = self._temporary(final)
        try:
            self._world.attempt_on_main(self._begin, temporary, trainer, tokenizer)
            self._world.attempt(torch.save, rng_state(), temporary / f"rng_{self._world.dp_rank}.pt")
            written = self.engine.save(temporary, self._world, self.background)
        except Exception as error:
            raise self._failed(final, error) from error
        self._writing = self._thread.submit(self._finish, written, temporary, final)
        if not self.background:
            self.wait()
        return final

    def wait(self) -> None:
        """Until what is being written is complete; collective.

        Raises:
            CheckpointError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def failed(self) -> bool:
        """Whether writing in the background has failed, as `wait` would tell."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def close(self) -> None:
        """End the thread, when what it writes is written."""
        self._thread.shutdown()

    def load(self, checkpoint: Path, source: Path) -> None:
        """Restore model, optimizer and random state.

        Args:
            checkpoint: its folder.
            source: model and optimizer as the engine can load them; the same folder, or a conversion.
        """
        self.engine.load(source)
        saved = len(list(checkpoint.glob("rng_*.pt")))
        set_rng_state(torch.load(checkpoint / f"rng_{self._world.dp_rank % saved}.pt", weights_only=True))

    def start_from(self, checkpoint: Path | None) -> None:
        """Set aside the run's checkpoints that it does not go on from; this one may be another run's. Collective."""
        last = step_of(checkpoint) if checkpoint and checkpoint.parent == self.folder.resolve() else -1
        self._world.attempt_on_main(set_aside_after, self.folder, last)

    def _temporary(self, final: Path) -> Path:
        return self.folder / f".{final.name}.{self._launch}.tmp"

    def _begin(self, temporary: Path, trainer: dict[str, Any], tokenizer: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step_*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        (temporary / TRAINER_FILE).write_text(json.dumps(trainer, indent=1), encoding="utf-8")
        (temporary / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")

    def _finish(self, written: Callable[[], None], temporary: Path, final: Path) -> None:
        try:
            self._world.attempt(written)
            write_sums(temporary, self._world)
            self._world.attempt_on_main(self._publish, temporary, final)
        except Exception as error:
            raise self._failed(final, error) from error

    def _publish(self, temporary: Path, final: Path) -> None:
        temporary.rename(final)
        synchronise(self.folder)
        try:
            for path in checkpoints(self.folder)[: -self.keep_last] if self.keep_last else []:
                discard(path)
        except OSError as error:
            print(f"warning: an old checkpoint could not be deleted: {error}", flush=True)

    def _failed(self, final: Path, error: Exception) -> CheckpointError:
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(self.folder).free / 2**20:,.0f} MiB"
        if self._world.is_main:  # what is there of it takes the place that others need
            shutil.rmtree(self._temporary(final), ignore_errors=True)
        what = str(error) if isinstance(error, FailedRankError) else f"{type(error).__name__}: {error}"
        kept = [path for path in checkpoints(self.folder) if path != final]
        newest = f"the checkpoint before it is {kept[-1]}" if kept else "there is no checkpoint before it"
        return CheckpointError(
            f"{final} could not be written: {what}. Free disk space: {free}; {newest}. Mend the cause and start the "
            "same command again to go on from there"
        )


def checkpoints(folder: Path) -> list[Path]:
    """Those that were complete once, the oldest first."""
    return sorted((path for path in folder.glob("step_*") if step_of(path) >= 0 and path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in its name; -1 for a name that is no checkpoint's."""
    number = checkpoint.name.removeprefix("step_")
    return int(number) if number != checkpoint.name and number.isdecimal() else -1


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints of later steps, damaged or no longer wanted, so that nothing takes them for the run's."""
    for path in checkpoints(folder):
        if step_of(path) > step:
            names = (path.with_name(f"{path.name}.left{number or ''}") for number in itertools.count())
            path.rename(next(name for name in names if not name.exists()))


def discard(path: Path) -> None:
    """Delete a checkpoint; one that is deleted in part has no name that looks complete."""
    aside = path.with_name(f".{path.name}.old")
    path.rename(aside)
    shutil.rmtree(aside)


def rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
