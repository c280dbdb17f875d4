"""The training loop: batches, steps, validation, logs and checkpoints of one run."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.checkpoint import Checkpointer, find_checkpoint, read_trainer_state
from launch.config import Config, expect
from launch.data import Sequences, local_slice, training_sequences, validation_sequences
from launch.distributed import World
from launch.engine import Engine, TorchEngine
from launch.model import build_model
from launch.optim import build_scheduler
from launch.runlog import LOG_FILE, PLOT_FILE, RunLog, plot, read_log
from launch.sources import open_source
from launch.tokenizer import load_tokenizer
from launch.zero import ZeroEngine, zero_settings


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    elapsed_seconds: float = 0.0


class Trainer:
    """One run: what it trains, on what, and where it writes."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.micro_batch_size = micro_batch_size(config, world)
        self.zero = zero_settings(config, world, self.micro_batch_size) if config.model.deepspeed else None
        self.folder, checkpoint = output_folder(config, world)
        saved = read_trainer_state(checkpoint, config, self.zero, world) if checkpoint else None

        source = open_source(config.data)
        encoder = load_tokenizer(config.data, source, world)
        self.tokenizer_fingerprint = encoder.fingerprint
        self.data: Sequences = training_sequences(config.data, source, encoder, config.run.seed, world)
        self.validation_data: np.ndarray = validation_sequences(config.data, source, encoder, world)
        model = build_model(config, encoder)
        self.engine: Engine = (
            ZeroEngine(model, config, self.zero, world) if self.zero else TorchEngine(model, config, world)
        )
        self.scheduler = build_scheduler(self.engine.optimizer, config.optimizer, config.run.steps)
        self.checkpointer = Checkpointer(self.folder / "checkpoints", self.engine, world)

        self.progress = Progress()
        if checkpoint and saved:
            expect(
                saved["tokenizer"] == encoder.fingerprint,
                f"resume: {checkpoint} was trained with another tokenizer: restore the data it was trained on",
            )
            self.checkpointer.load(checkpoint)
            self.scheduler.load_state_dict(saved["scheduler"])
            self.data.load_state_dict(saved["data"])
            self.progress = Progress(saved["step"], saved["tokens"], saved["elapsed_seconds"])
        self.log: RunLog | None = None
        if world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            self.log = RunLog(self.folder, steps=config.run.steps, start_step=self.progress.step)
            self.log.say(
                f"{config.optimizer.optimizer}: {self.engine.parameter_count:,} parameters, {self.engine.parallel} on "
                f"{world.size} x {world.device.type}, {'bf16' if self.engine.bf16 else 'fp32'}; output in {self.folder}"
            )

    def train(self) -> None:
        """All steps that are left, then the summary."""
        try:
            self.run_steps()
        finally:
            if self.log:
                self.log.close()
        if self.world.is_main:
            self.summarize()

    def run_steps(self) -> None:
        run, progress = self.config.run, self.progress
        started = time.perf_counter() - progress.elapsed_seconds
        window_loss = torch.zeros((), device=self.world.device)
        window_start, window_time = progress.step, time.perf_counter()
        while progress.step < run.steps:
            is_last = progress.step + 1 == run.steps
            due = {name: is_last or (every > 0 and (progress.step + 1) % every == 0) for name, every in self._cycles()}
            lr = self.config.optimizer.lr * self.scheduler.lr_lambdas[0](progress.step)
            sequences = local_slice(self.data.take(run.batch_size), self.world)
            update = self.engine.update(sequences.split(self.micro_batch_size))
            window_loss += update.loss
            self.scheduler.step()
            progress.step += 1
            progress.tokens += run.batch_size * self.config.data.seq_len
            if not any(due.values()):
                continue

            steps = progress.step - window_start
            loss = (self.world.sum(window_loss) / (self.world.size * steps)).item()
            self.check_finite(loss, steps)
            norm = update.grad_norm.item()
            window_seconds = time.perf_counter() - window_time
            record: dict[str, Any] = {
                "step": progress.step,
                "tokens": progress.tokens,
                "loss": loss,
                "val_loss": self.validate() if due["eval"] else None,
                "lr": lr,
                "grad_norm": norm if math.isfinite(norm) else None,
                "tokens_per_second": steps * run.batch_size * self.config.data.seq_len / window_seconds,
                "elapsed_seconds": time.perf_counter() - started,
                "optimizer_step_seconds": update.seconds,
                "skipped_steps": self.engine.skipped_steps,
            }
            progress.elapsed_seconds = record["elapsed_seconds"]
            if self.log:
                self.log.write(record)
                self.log.progress(record)
                if record["val_loss"] is not None:
                    self.log.say(f"step {progress.step}: validation loss {record['val_loss']:.4f}")
            if due["save"]:
                self.save()
            window_loss.zero_()
            window_start, window_time = progress.step, time.perf_counter()

    def _cycles(self) -> list[tuple[str, int]]:
        run = self.config.run
        return [("log", run.log_every), ("eval", run.eval_every), ("save", run.save_every)]

    def check_finite(self, loss: float, steps: int) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss} within the last {steps} step(s) before step {self.progress.step}; expected a finite "
                f"number. Lower lr ({self.config.optimizer.lr}) and lr_other ({self.config.optimizer.lr_other}), "
                "lengthen warmup_steps, or set clip; --resume takes up the last checkpoint"
            )

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over all validation tokens, whatever the number of ranks."""
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)  # sum of losses, sequences
        self.engine.module.eval()
        chunk = self.micro_batch_size * self.world.size
        for start in range(0, len(self.validation_data), chunk):
            rows = np.array(self.validation_data[start : start + chunk][self.world.dp_rank :: self.world.size])
            weight = len(rows)
            # A rank without rows takes part all the same: forward gathers the weights from all ranks.
            tokens = torch.from_numpy((rows if weight else self.validation_data[:1]).astype(np.int64))
            loss = self.engine.loss(tokens.to(self.world.device))
            total += torch.stack([loss.double() * weight, torch.tensor(weight, device=loss.device)])
        self.engine.module.train()
        loss_sum, count = self.world.sum(total).tolist()
        return loss_sum / count

    def save(self) -> Path:
        state = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "elapsed_seconds": self.progress.elapsed_seconds,
            "scheduler": self.scheduler.state_dict(),
            "data": self.data.state_dict(),
            "tokenizer": self.tokenizer_fingerprint,
            "config": self.config.flat(),
            "deepspeed": self.zero,
            "ranks": self.world.size,
        }
        return self.checkpointer.save(self.progress.step, state)

    def summarize(self) -> None:
        """The picture of the curves, and where everything is."""
        records = read_log(self.folder)
        picture = self.folder / PLOT_FILE
        plot({self.config.optimizer.optimizer: records}, picture)
        last = records[-1]
        speed = statistics.median(record["tokens_per_second"] for record in records)
        print(
            f"\nfinal validation loss {last['val_loss']:.4f}, perplexity {math.exp(last['val_loss']):.2f}, after "
            f"{last['tokens']:,} tokens in {last['elapsed_seconds']:.0f} s ({speed:,.0f} tokens/s)\n"
            f"  curves      {picture}\n"
            f"  log         {self.folder / LOG_FILE}\n"
            f"  tensorboard {self.folder / 'tensorboard'}\n"
            f"  checkpoint  {self.checkpointer.path(last['step'])}",
            flush=True,
        )


def micro_batch_size(config: Config, world: World) -> int:
    """Sequences in one forward pass of one rank."""
    batch_size = config.run.batch_size
    expect(
        batch_size % world.size == 0,
        f"batch_size={batch_size} sequences cannot be split evenly over {world.size} ranks: choose a multiple",
    )
    share = batch_size // world.size
    size = config.run.micro_batch_size or share
    expect(
        share % size == 0,
        f"micro_batch_size={size} does not divide the {share} sequences of one rank "
        f"(batch_size={batch_size} over {world.size} ranks)",
    )
    return size


def output_folder(config: Config, world: World) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint it goes on from; a folder with another run's log is refused."""
    folder = Path(config.run.output_dir).expanduser() if config.run.output_dir else None
    checkpoint = find_checkpoint(config.run.resume, folder).resolve() if config.run.resume else None
    if checkpoint and (folder is None or folder.resolve() == checkpoint.parents[1]):
        return folder or checkpoint.parents[1], checkpoint
    if folder is None:
        name = f"{config.optimizer.optimizer}-{config.model.model_path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path("runs") / world.broadcast(name)
    has_run = world.broadcast((folder / LOG_FILE).exists())
    expect(not has_run, f"output_dir={str(folder)!r} holds a run: choose another, or go on with --resume latest")
    return folder, checkpoint
