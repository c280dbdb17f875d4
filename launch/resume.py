"""Where a run is written, and from which checkpoint it goes on: starting the same command again resumes by itself."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml

from launch.checkpoint import TRAINER_FILE, checkpoints
from launch.checksums import find_damage
from launch.config import Config, expect
from launch.distributed import World
from launch.runlog import LOG_FILE

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.yaml"
LAUNCH_FILE = "launch_id"
# What a resumed run may change without becoming another run.
FREE_ON_RESUME = {
    *("steps", "micro_batch_size", "parallel", "deepspeed", "activation_checkpointing", "cache_dir"),
    *("eval_every", "log_every", "save_every", "save_minutes", "keep_last", "async_save", "timeout_minutes"),
    *("output_dir", "resume"),
}


def find_run(config: Config, world: World) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to go on from, None to start from the beginning; collective.

    Raises:
        ConfigError: the folder holds another run, or the checkpoint cannot be used.
    """
    resume, output_dir = config.run.resume, config.run.output_dir
    named = None if resume in ("auto", "latest", "never") else named_checkpoint(resume, world)
    if output_dir:
        folder = Path(output_dir).expanduser()
    else:
        folder = named.parents[1] if named else Path(world.attempt_on_main(default_folder, config))
    goes_on = resume in ("auto", "latest") or was_restarted()
    if goes_on:
        checkpoint = newest_complete(folder / CHECKPOINTS, world)
        if checkpoint is not None:
            return folder, checkpoint
    expect(resume != "latest", f"resume=latest: no complete checkpoint in {folder / CHECKPOINTS}; give --resume auto")
    if named and folder.resolve() == named.parents[1]:
        return folder, named
    has_run, other = world.attempt_on_main(lambda: ((folder / LOG_FILE).exists(), other_options(folder, config)))
    if has_run and goes_on:  # it ended before its first checkpoint
        expect(not other, f"output_dir={str(folder)!r} holds a run with other options: {other}. Choose another folder")
    else:
        expect(not has_run, f"output_dir={str(folder)!r} holds a run: choose another, or go on with --resume auto")
    return folder, named


def was_restarted() -> bool:
    """Whether torchrun starts this command again, after a failure or for another number of hosts."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def named_checkpoint(resume: str, world: World) -> Path:
    checkpoint = Path(resume).expanduser().resolve()
    is_one = world.attempt_on_main((checkpoint / TRAINER_FILE).is_file)
    expect(is_one, f"resume={resume!r}: expected auto, latest, never, or a folder step_NNN with {TRAINER_FILE}")
    damage = find_damage(checkpoint, world)
    expect(damage is None, f"resume={resume!r} is damaged: {damage}. Take another one, or --resume auto")
    return checkpoint


def newest_complete(folder: Path, world: World) -> Path | None:
    """The newest checkpoint whose files are what was written; those that are passed over are named."""
    for checkpoint in reversed(world.attempt_on_main(checkpoints, folder)):
        damage = find_damage(checkpoint, world)
        if damage is None:
            return checkpoint.resolve()
        if world.is_main:
            print(f"warning: {checkpoint} is damaged and passed over: {damage}", flush=True)
    return None


def default_folder(config: Config) -> str:
    """A new folder under runs/; the one that it already has for a run that torchrun starts again."""
    name = f"{config.optimizer.optimizer}-{config.model.model_path.stem}"
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    if launch and was_restarted():
        for path in sorted(Path("runs").glob(f"{name}-*/{LAUNCH_FILE}"), reverse=True):
            if path.read_text(encoding="utf-8") == launch:
                return str(path.parent)
    folder = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if launch:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LAUNCH_FILE).write_text(launch, encoding="utf-8")
    return str(folder)


def other_options(folder: Path, config: Config) -> str:
    """Options that a run in the folder was started with and that this one has otherwise; empty if there are none."""
    try:
        saved = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    return differences(saved, config)


def differences(saved: dict[str, Any], config: Config) -> str:
    current = config.flat()
    different = [key for key in current if key not in FREE_ON_RESUME and saved.get(key) != current[key]]
    return ", ".join(f"{key}={current[key]!r} (was {saved.get(key)!r})" for key in different)


def read_trainer_state(checkpoint: Path, config: Config) -> dict[str, Any]:
    """What the trainer saved, after checking that it belongs to a run with these options."""
    trainer: dict[str, Any] = json.loads((checkpoint / TRAINER_FILE).read_text(encoding="utf-8"))
    different = differences(trainer["config"], config)
    expect(not different, f"resume: {checkpoint} belongs to a run with other options: {different}. Give the same ones")
    return trainer
