"""Checkpoints: a folder step_NNN with model and optimizer as the engine saves them, and what the trainer knows.

    step_000400/
      .metadata, __0_0.distcp, ...   torch.distributed.checkpoint: loads on any number of ranks
      zero/, latest, ...             instead, under DeepSpeed: loads on as many ranks with the same JSON
      trainer.json                   step, tokens, schedule, position in the data, options
      rng_0.pt, ...                  random states, one file a rank

A folder is written under a temporary name and renamed when every rank is done: one that has the final name is whole.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch.config import Config, ConfigError
from launch.distributed import World
from launch.engine import Engine
from launch.zero import check_resume

TRAINER_FILE = "trainer.json"
# What a resumed run may change without becoming another run.
FREE_ON_RESUME = {
    *("steps", "micro_batch_size", "parallel", "activation_checkpointing", "cache_dir"),
    "deepspeed",  # its contents are compared
    *("eval_every", "log_every", "save_every", "output_dir", "resume"),
}


@dataclass
class Checkpointer:
    """Saves and restores a run; ``folder`` holds its checkpoints."""

    folder: Path
    engine: Engine
    world: World

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def save(self, step: int, trainer: dict[str, Any]) -> Path:
        """Write step_NNN; ``trainer`` is plain data, the same on every rank."""
        final = self.path(step)
        temporary = self.folder / f".{final.name}.tmp"
        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            (temporary / TRAINER_FILE).write_text(json.dumps(trainer, indent=1), encoding="utf-8")
        self.world.barrier()
        torch.save(rng_state(), temporary / f"rng_{self.world.dp_rank}.pt")
        self.engine.save(temporary)
        self.world.barrier()
        if self.world.is_main:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        self.world.barrier()
        return final

    def load(self, checkpoint: Path) -> None:
        """Restore model, optimizer and random state."""
        self.engine.load(checkpoint)
        saved = len(list(checkpoint.glob("rng_*.pt")))
        set_rng_state(torch.load(checkpoint / f"rng_{self.world.dp_rank % saved}.pt", weights_only=True))


def find_checkpoint(resume: str, output_dir: Path | None) -> Path:
    """The folder that ``resume`` names; latest is the one of the highest step in the run's folder."""
    if resume != "latest":
        path = Path(resume).expanduser()
        if not (path / TRAINER_FILE).is_file():
            raise ConfigError(f"resume={resume!r}: expected latest or a folder step_NNN with {TRAINER_FILE}")
        return path
    assert output_dir is not None
    found = (output_dir / "checkpoints").glob("step_[0-9]*")
    complete = sorted(found, key=lambda path: int(path.name.removeprefix("step_")))
    if not complete:
        raise ConfigError(f"resume=latest: no checkpoint in {output_dir / 'checkpoints'}; start without --resume")
    return complete[-1]


def read_trainer_state(checkpoint: Path, config: Config, zero: dict[str, Any] | None, world: World) -> dict[str, Any]:
    """What the trainer saved, after checking that it belongs to a run with these options and DeepSpeed's settings."""
    trainer: dict[str, Any] = json.loads((checkpoint / TRAINER_FILE).read_text(encoding="utf-8"))
    saved, current = trainer["config"], config.flat()
    different = [key for key in current if key not in FREE_ON_RESUME and saved.get(key) != current[key]]
    if different:
        found = ", ".join(f"{key}={current[key]!r} (was {saved.get(key)!r})" for key in different)
        raise ConfigError(f"resume: {checkpoint} belongs to a run with other options: {found}. Give the same ones")
    check_resume(checkpoint, trainer, {"deepspeed": zero, "ranks": world.size})
    if trainer["step"] >= config.run.steps:
        raise ConfigError(
            f"resume: {checkpoint} is at step {trainer['step']} of steps={config.run.steps}: "
            "nothing is left to do, raise steps"
        )
    return trainer


def rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
