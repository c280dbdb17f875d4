"""Where a run is written, and from which checkpoint it goes on: starting the same command again resumes by itself."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.checkpoint import TRAINER_FILE, checkpoints, step_of
from launch.checksums import find_damage
from launch.config import Config, expect
from launch.distributed import World
from launch.lock import hold
from launch.runlog import LOG_FILE

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.yaml"
# What a resumed run may change without becoming another run.
FREE_ON_RESUME = {
    *("steps", "micro_batch_size", "parallel", "deepspeed", "activation_checkpointing", "cache_dir"),
    *("eval_every", "log_every", "save_every", "save_minutes", "keep_last", "async_save", "timeout_minutes"),
    *("output_dir", "resume", "error_dtype", "state_dtype", "stochastic_rounding", "metrics_every"),
    *("replicas", "gradient_sync"),
}


@dataclass(frozen=True)
class Start:
    """Where a run is written, and how it begins.

    Attributes:
        folder: the run's.
        checkpoint: to go on from; None to start from the beginning.
        goes_on: it is the same run as before, complete or not, and not one that is asked to go on.
    """

    folder: Path
    checkpoint: Path | None
    goes_on: bool


def find_run(config: Config, world: World) -> Start:
    """What to start; collective.

    Raises:
        ConfigError: the folder holds another run, or the checkpoint cannot be used.
    """
    resume, output_dir = config.run.resume, config.run.output_dir
    named = None if resume in ("auto", "latest", "never") else named_checkpoint(resume, world)
    begun = world.recall()  # torchrun starts these processes in the place of others, which have begun there
    if begun or output_dir:
        folder = Path(begun or str(output_dir)).expanduser()
    elif named and named.parent.name == CHECKPOINTS:
        folder = named.parents[1]
    else:
        folder = Path(world.broadcast(default_folder(config)))
    hold(folder, world)
    if begun or resume in ("auto", "latest"):
        checkpoint = newest_complete(folder / CHECKPOINTS, world)
        if checkpoint is not None:
            return Start(folder, checkpoint, goes_on=bool(begun) or resume == "auto")
    expect(resume != "latest", f"resume=latest: no complete checkpoint in {folder / CHECKPOINTS}; give --resume auto")
    if named and folder.resolve() == named.parents[1]:
        return Start(folder, named, goes_on=False)
    has_run, other = world.attempt_on_main(lambda: ((folder / LOG_FILE).exists(), other_options(folder, config)))
    if has_run and (begun or resume == "auto"):  # it ended before its first checkpoint
        expect(not other, f"output_dir={str(folder)!r} holds a run with other options: {other}. Choose another folder")
    else:
        expect(not has_run, f"output_dir={str(folder)!r} holds a run: choose another, or go on with --resume auto")
    return Start(folder, named, goes_on=False)


def named_checkpoint(resume: str, world: World) -> Path:
    checkpoint = Path(resume).expanduser().resolve()
    is_one = world.attempt_on_main((checkpoint / TRAINER_FILE).is_file)
    expect(is_one, f"resume={resume!r}: expected auto, latest, never, or a folder step_NNN with {TRAINER_FILE}")
    expect(step_of(checkpoint) >= 0, f"resume={resume!r}: expected a folder with a name step_N: rename it to that")
    damage = find_damage(checkpoint, world)
    expect(damage is None, f"resume={resume!r} is damaged: {damage}. Take another one, or --resume auto")
    return checkpoint


def newest_complete(folder: Path, world: World) -> Path | None:
    """The newest checkpoint whose files are what was written; those that are passed over are named."""
    found = world.attempt_on_main(checkpoints, folder)
    for checkpoint in reversed(found):
        damage = find_damage(checkpoint, world)
        if damage is None:
            return checkpoint.resolve()
        if world.is_main:
            print(f"warning: {checkpoint} is damaged and passed over: {damage}", flush=True)
    expect(
        not found,
        f"{folder}: all {len(found)} checkpoint(s) are damaged, so nothing is left to go on from. Restore one, or "
        "start anew in another output_dir",
    )
    return None


def default_folder(config: Config) -> str:
    name = f"{config.optimizer.optimizer}-{config.model.model_path.stem}"
    return str(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def other_options(folder: Path, config: Config) -> str:
    """Options that a run in the folder was started with and that this one has otherwise; empty if there are none."""
    try:
        saved = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    return differences(saved, config)


def differences(saved: dict[str, Any], config: Config) -> str:
    current = config.flat()
    before = {"error_in_grad": False, **saved}  # older runs do not name it
    different = [key for key in current if key not in FREE_ON_RESUME and before.get(key) != current[key]]
    return ", ".join(f"{key}={current[key]!r} (was {before.get(key)!r})" for key in different)


def read_trainer_state(checkpoint: Path, config: Config) -> dict[str, Any]:
    """What the trainer saved, after checking that it belongs to a run with these options."""
    trainer: dict[str, Any] = json.loads((checkpoint / TRAINER_FILE).read_text(encoding="utf-8"))
    different = differences(trainer["config"], config)
    expect(not different, f"resume: {checkpoint} belongs to a run with other options: {different}. Give the same ones")
    return trainer
