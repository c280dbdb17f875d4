"""Training under DeepSpeed's ZeRO: its JSON, filled in from the run's options, and the engine that it makes.

The JSON is as Hugging Face's Trainer takes it: "auto" stands for what the run's options say.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from launch.config import Config, ConfigError, expect
from launch.distributed import World
from launch.engine import Engine, Update, uses_bf16
from launch.optim import build_groups, build_optimizer

TAG = "zero"
"""Folder of DeepSpeed's files within a checkpoint."""
FREE_ON_RESUME = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
"""Of the JSON; the batch itself is an option of the run."""
OPTIMIZERS = {"ldadamw": ("LDAdamW",), "adamw": ("LDAdamW", "AdamW")}
"""What the JSON may name for a run's optimizer. AdamW is built with LDAdamW's groups, and not from the JSON."""

SECTIONS = set(
    "zero_optimization activation_checkpointing flops_profiler comms_logger tensorboard wandb csv_monitor comet "
    "compile aio amp elasticity autotuning hybrid_engine pipeline curriculum_learning data_efficiency "
    "compression_training tensor_parallel timers nebula zenflow communication_options".split()
)
"""Of DeepSpeed's JSON, those that are not among its constants."""


class ZeroEngine(Engine):
    """A DeepSpeed engine; its checkpoints need as many ranks and the same JSON, or a conversion (launch/crossing.py).

    Args:
        settings: from `zero_settings`.
        universal: whether a universal checkpoint is going to be loaded.
        saved_groups: as in `build_groups`.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        config: Config,
        settings: dict[str, Any],
        world: World,
        universal: bool,
        saved_groups: int | None = None,
    ) -> None:
        super().__init__(model, config, world)
        self._universal = universal
        self.parallel = f"ZeRO-{settings['zero_optimization']['stage']}"
        prepare_deepspeed(world.local_rank, on_cpu=world.device.type == "cpu")
        import deepspeed

        from ldadam_dist.integrations.deepspeed import initialize

        refuse_misspelt(settings, str(config.model.deepspeed))
        settings = copy.deepcopy(settings)
        settings["checkpoint"]["load_universal"] = universal
        try:
            if config.optimizer.optimizer == "ldadamw":
                params = build_groups(model, config.optimizer, saved_groups)
                self.module, *_ = initialize(model=model, model_parameters=params, config=settings)
            else:
                optimizer = build_optimizer(model, config.optimizer, saved_groups)
                self.module, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        except ValueError as error:
            raise ConfigError(f"deepspeed={config.model.deepspeed}: {error}") from error
        self.optimizer = self.module.basic_optimizer
        self.module.train()

    def update(self, micro_batches: Sequence[torch.Tensor]) -> Update:
        total = torch.zeros((), device=self.world.device)
        for index, tokens in enumerate(micro_batches, start=1):
            total += self.module.backward(self.loss(tokens)).detach()  # divides by the number of micro-batches
            if index < len(micro_batches):
                self.module.step()  # counts
        seconds = self.seconds(self.module.step)  # clips, steps and clears the gradients
        norm = self.module.get_global_grad_norm()  # -1: not finite; None: the JSON has compute_grad_norm off
        return Update(total, torch.as_tensor(math.inf if norm is None or norm < 0 else norm), seconds)

    @property
    def skipped_steps(self) -> int:
        """Those that the engine did not hand to the optimizer, and those that the optimizer skipped."""
        return super().skipped_steps + int(self.module.skipped_steps)

    def save(self, folder: Path, world: World, background: bool) -> Callable[[], None]:
        self.module.save_checkpoint(str(folder), tag=TAG)  # training goes on when everything is written
        return lambda: None

    def load(self, folder: Path) -> None:
        if self._universal:  # the schedule is the trainer's
            self.module.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        else:
            self.module.load_checkpoint(str(folder), tag=TAG)


def prepare_deepspeed(local_rank: int, on_cpu: bool) -> None:
    """Import DeepSpeed for the run's device, and have it say no more than warnings.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ["LOCAL_RANK"] = str(local_rank)  # not set in a process that no launcher started
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError("deepspeed is not installed: pip install -e '.[deepspeed]'") from error
    if on_cpu:
        # When its communication starts, DeepSpeed would compile an operator for ranks that share memory, for minutes.
        # Without the operator it takes gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls functions of torch.distributed that newer versions of torch have under other names.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)


def zero_settings(config: Config, world: World, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON with the run's options in it; where it says otherwise, it is an error."""
    path, run, options = config.model.deepspeed, config.run, config.optimizer
    assert path is not None
    settings = read_json(path)
    given = dict(leaves(settings))
    expect(
        "scheduler" not in settings,
        f"deepspeed={path} has a scheduler, but the schedule is the run's (warmup_steps, min_lr_ratio): remove it",
    )
    stage = given.get("zero_optimization.stage", 0)
    expect(stage in (1, 2, 3), f"deepspeed={path}: zero_optimization.stage={stage!r}: expected 1, 2 or 3")
    named = given.get("optimizer.type", "LDAdamW")
    expect(
        named in OPTIMIZERS[options.optimizer],
        f"deepspeed={path}: optimizer.type={named!r}, but the run has optimizer={options.optimizer}: "
        f"expected {' or '.join(OPTIMIZERS[options.optimizer])}",
    )

    batch = f"batch_size={run.batch_size} over {world.size} rank(s), micro_batch_size={micro_batch_size}"
    precision = f"precision={config.model.precision} on {world.device.type}"
    wanted = {
        "train_batch_size": (run.batch_size, batch),
        "train_micro_batch_size_per_gpu": (micro_batch_size, batch),
        "gradient_accumulation_steps": (run.batch_size // world.size // micro_batch_size, batch),
        "gradient_clipping": (options.clip, f"clip={options.clip}"),
        "bf16.enabled": (uses_bf16(config.model, world), precision),
        "fp16.enabled": (False, precision),
        "checkpoint.load_universal": (False, "the trainer converts checkpoints by itself"),
        "optimizer.type": (named, f"optimizer={options.optimizer}"),
        "optimizer.params.betas": (list(options.resolved_betas), f"betas={list(options.resolved_betas)}"),
    }
    for name in "lr lr_other eps weight_decay rank rho proj_type proj_method error_feedback".split():
        value = getattr(options, name)
        wanted[f"optimizer.params.{name}"] = (value, f"{name}={value}")
    for name in "error_dtype state_dtype stochastic_rounding metrics_every".split():
        if value := getattr(options, name):  # else the JSON may have its own
            wanted[f"optimizer.params.{name}"] = (value, f"{name}={value}")
    for name, (value, option) in wanted.items():
        fill(settings, name, value, option, path)
    if options.optimizer == "adamw":
        del settings["optimizer"]

    left = [name for name, value in leaves(settings) if value == "auto"]
    expect(not left, f"deepspeed={path}: no option of the run says what 'auto' is for {', '.join(left)}: give a value")
    return settings


def fill(settings: dict[str, Any], name: str, value: Any, option: str, path: str) -> None:
    """Put a value where the JSON has "auto" or nothing.

    Args:
        name: its keys, joined by dots.
        option: where the run has it from, for an error.
    """
    *sections, key = name.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        expect(isinstance(settings, dict), f"deepspeed={path}: {section} is {settings!r}: expected a section")
    found = settings.get(key, "auto")
    expect(
        found in ("auto", value),
        f'deepspeed={path}: {name}={found!r}, but the run needs {value!r} ({option}): make them agree, or write "auto"',
    )
    settings[key] = value


def read_json(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed={path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ConfigError(f"deepspeed={path} is not JSON: {error}") from error
    expect(isinstance(settings, dict), f"deepspeed={path}: expected an object, found {type(settings).__name__}")
    return settings


def refuse_misspelt(settings: Mapping[str, Any], path: str) -> None:
    """Refuse keys that look like one of DeepSpeed's: it reads those that it knows, and says nothing of others.

    Within most sections it looks for itself. DeepSpeed must be imported already (`prepare_deepspeed`).
    """
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)} | SECTIONS
    for key in settings.keys() - known:
        if near := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            raise ConfigError(f"deepspeed={path}: unknown key {key!r}: did you mean {near[0]!r}?")


def leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(keys joined by dots, value)"""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
