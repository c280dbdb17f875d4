"""LDAdamW in Lightning's Trainer: on one device, under DDP, FSDP2 and DeepSpeed; docs/lightning.md has the recipe.

trainer = Trainer(callbacks=[LDAdamWMonitor()])
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy

from ldadam_dist.optimizer import LDAdamW


class LDAdamWMonitor(Callback):  # type: ignore[misc]
    """Logs what `optimizer.metrics()` tells to all loggers of the Trainer, as "ldadamw/error_norm" and so on.

    The module's optimizer is `LDAdamW(..., metrics_every=100)`: every 100 steps of the Trainer that step is logged,
    whatever `log_every_n_steps` is. Under DeepSpeed it also attaches LDAdamW to the engine, which training needs.

    Args:
        matrices: log those of each matrix too, as "ldadamw/model.layers.0.mlp.up_proj.weight/error_norm".
    """

    def __init__(self, matrices: bool = False) -> None:
        self._matrices = matrices
        self._logged_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find LDAdamW, before a checkpoint is loaded.

        Raises:
            ValueError: the Trainer has another optimizer, or more than one, LDAdamW measures nothing, or there is no
                logger.
        """
        optimizer = optimizer_of(trainer)
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            from ldadam_dist.integrations.deepspeed import attach

            attach(trainer.strategy.deepspeed_engine)
        if not _metrics_every(optimizer):
            raise ValueError("LDAdamWMonitor has nothing to log: metrics_every is 0. Build LDAdamW(metrics_every=100).")
        if not trainer.loggers:
            raise ValueError("LDAdamWMonitor has nowhere to log: the Trainer has no logger. Give it one, or remove it.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step of the checkpoint."""
        self._logged_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a measured step; collective, as all ranks are at the same step."""
        optimizer, step = optimizer_of(trainer), trainer.global_step
        every = _metrics_every(optimizer)
        if step == self._logged_step or not every or step % every:
            return
        self._logged_step = step
        metrics = optimizer.metrics()
        values = {f"ldadamw/{name}": value for name, value in metrics.total.items()}
        if self._matrices:
            values |= {
                f"ldadamw/{matrix}/{name}": value
                for matrix, measured in metrics.matrices.items()
                for name, value in measured.items()
            }
        for logger in trainer.loggers:  # each writes on rank 0 alone
            logger.log_metrics(values, step=step - 1)  # Lightning logs the first step as 0


def optimizer_of(trainer: Trainer) -> LDAdamW:
    """The Trainer's LDAdamW, which DeepSpeed may have wrapped.

    Raises:
        ValueError: it has another optimizer, or more than one.
    """
    names = [type(optimizer).__name__ for optimizer in trainer.optimizers]
    if len(names) != 1:
        raise ValueError(f"the Trainer's optimizers are {names}: expected LDAdamW alone, from configure_optimizers.")
    found: Any = trainer.optimizers[0]
    while not isinstance(found, LDAdamW):
        inner = getattr(found, "optimizer", None)
        if inner is None:
            raise ValueError(f"the Trainer's optimizer is {type(found).__name__}: expected LDAdamW.")
        found = inner
    return found


def _metrics_every(optimizer: LDAdamW) -> int:
    """After how many steps some matrix is measured; 0 for never."""
    said = [group["metrics_every"] for group in optimizer.param_groups if group["enable_lowrank"]]
    return min((every for every in said if every), default=0)
