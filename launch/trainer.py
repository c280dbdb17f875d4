"""The training loop: batches, steps, validation, logs and checkpoints of one run."""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from launch.checkpoint import TOKENIZER_FILE, Checkpointer
from launch.config import Config, expect
from launch.crossing import converted, needs_conversion
from launch.data import Sequences, local_slice, training_sequences, validation_sequences
from launch.distributed import World
from launch.engine import Engine, TorchEngine
from launch.model import build_model
from launch.optim import build_scheduler
from launch.resume import CHECKPOINTS, CONFIG_FILE, find_run, read_trainer_state
from launch.runlog import PLOT_FILE, RunLog, replace_text
from launch.sources import open_source
from launch.stopping import StopRequest
from launch.tokenizer import load_tokenizer
from launch.zero import ZeroEngine, zero_settings
from ldadam_dist.curves import LOG_FILE, draw, read_log


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
        start = find_run(config, world)
        self.folder, checkpoint = start.folder, start.checkpoint
        saved = read_trainer_state(checkpoint, config) if checkpoint else None
        crosses = saved is not None and needs_conversion(saved, {"deepspeed": self.zero, "ranks": world.size})

        source = open_source(config.data)
        encoder = load_tokenizer(config.data, source, world, checkpoint / TOKENIZER_FILE if checkpoint else None)
        self.tokenizer = encoder
        self.data: Sequences = training_sequences(config.data, source, encoder, config.run.seed, world)
        self.validation_data: np.ndarray = validation_sequences(config.data, source, encoder, world)
        self.held_out = hashlib.sha256(np.ascontiguousarray(self.validation_data)).hexdigest()
        model = build_model(config, encoder)
        groups = len(saved["scheduler"]["base_lrs"]) if saved else None
        self.engine: Engine = (
            ZeroEngine(model, config, self.zero, world, crosses, groups)
            if self.zero
            else TorchEngine(model, config, world, groups)
        )
        self.scheduler = build_scheduler(self.engine.optimizer, config.optimizer, config.run.steps)
        run = config.run
        self.checkpointer = Checkpointer(self.folder / CHECKPOINTS, self.engine, world, run.keep_last, run.async_save)

        self.progress, self.saved_at = Progress(), time.monotonic()
        if checkpoint and saved:
            expect(
                start.goes_on or saved["step"] < run.steps,
                f"resume: {checkpoint} is at step {saved['step']} of steps={run.steps}: nothing is left, raise steps",
            )
            expect(
                saved["tokenizer"] == encoder.fingerprint,
                f"resume: {checkpoint} was trained with another tokenizer: restore the data it was trained on",
            )
            expect(
                saved["held_out"] == self.held_out,
                f"resume: {checkpoint} was trained on other data: the held-out documents are not what they were. "
                "Restore them, or start a run of its own",
            )
            from_zero, to_zero = saved["deepspeed"] is not None, self.zero is not None
            copy = converted(checkpoint, self.checkpointer.folder, from_zero, to_zero, world)
            with copy if crosses else contextlib.nullcontext(checkpoint) as source:
                self.checkpointer.load(checkpoint, source)
            self.scheduler.load_state_dict(saved["scheduler"])
            self.data.load_state_dict(saved["data"])
            self.progress = Progress(saved["step"], saved["tokens"], saved["elapsed_seconds"])
        self.checkpointer.start_from(checkpoint)
        world.remember(str(self.folder.resolve()))
        self.log: RunLog | None = None
        if world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.folder / CONFIG_FILE, config.to_yaml())
            self.log = RunLog(self.folder, steps=run.steps, start_step=self.progress.step)
            self.log.say(
                f"{config.optimizer.optimizer}: {self.engine.parameter_count:,} parameters, {self.engine.parallel} on "
                f"{world.size} x {world.device.type}, {'bf16' if self.engine.bf16 else 'fp32'}; output in {self.folder}"
            )
            if config.optimizer.warmup_steps > run.steps:
                self.log.say(f"warmup_steps={config.optimizer.warmup_steps} is cut to steps={run.steps}")
            if self.progress.step >= run.steps:
                self.log.say(f"this run is complete: step {self.progress.step} of steps={run.steps}, nothing to train")

    def train(self) -> None:
        """All steps that are left, then the summary; fewer if SIGTERM, SIGUSR1 or SIGINT asks to stop.

        Raises:
            FloatingPointError: the loss is not finite.
            CheckpointError: a checkpoint could not be written.
        """
        try:
            with StopRequest() as request:
                stopped_by = self.run_steps(request)
                self.checkpointer.wait()
        except FloatingPointError:  # on every rank, so that what is being written can be waited for
            self.checkpointer.close()
            raise
        finally:
            if self.log:
                self.log.close()
        if self.world.is_main:
            if stopped_by:
                self.say_how_to_go_on(stopped_by)
            else:
                self.summarize()

    def run_steps(self, request: StopRequest) -> int:
        """Train; the number of the signal that ended it, 0 after the last step."""
        run, progress = self.config.run, self.progress
        started = time.perf_counter() - progress.elapsed_seconds
        window_loss = torch.zeros((), device=self.world.device)
        window_start, window_time = progress.step, time.perf_counter()
        while progress.step < run.steps:
            lr = self.config.optimizer.lr * self.scheduler.lr_lambdas[0](progress.step)
            sequences = local_slice(self.data.take(run.batch_size), self.world)
            update = self.engine.update(sequences.split(self.micro_batch_size))
            window_loss += update.loss
            self.scheduler.step()
            progress.step += 1
            progress.tokens += run.batch_size * self.config.data.seq_len
            due, stopped_by = self.due(request)
            if not due:
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
                "val_loss": self.validate() if "eval" in due else None,
                "lr": lr,
                "grad_norm": norm if math.isfinite(norm) else None,
                "tokens_per_second": steps * run.batch_size * self.config.data.seq_len / window_seconds,
                "elapsed_seconds": time.perf_counter() - started,
                "optimizer_step_seconds": update.seconds,
                "skipped_steps": self.engine.skipped_steps,
            }
            record |= {f"ldadamw/{name}": value for name, value in self.engine.metrics().items()}
            progress.elapsed_seconds = record["elapsed_seconds"]
            if self.log:
                self.log.write(record)
                self.log.progress(record)
                if record["val_loss"] is not None:
                    self.log.say(f"step {progress.step}: validation loss {record['val_loss']:.4f}")
            if "save" in due:
                self.save()
            if stopped_by:
                return stopped_by
            window_loss.zero_()
            window_start, window_time = progress.step, time.perf_counter()
        return 0

    def due(self, request: StopRequest) -> tuple[set[str], int]:
        """What is to be done after this step, of log, eval and save; and the signal that asks to stop, 0 if none did.

        Signals and clocks differ from rank to rank, so the ranks agree.
        """
        run, step = self.config.run, self.progress.step
        cycles = {"log": run.log_every, "eval": run.eval_every, "save": run.save_every}
        due = {name for name, every in cycles.items() if step == run.steps or (every and step % every == 0)}
        is_time = 0 < run.save_minutes * 60 <= time.monotonic() - self.saved_at
        stopped_by, is_time, failed = self.world.largest([request.signal, is_time, self.checkpointer.failed()])
        if failed:
            self.checkpointer.wait()
        if is_time or stopped_by:
            due.add("save")
        return due, 0 if step == run.steps else stopped_by

    def check_finite(self, loss: float, steps: int) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss} within the last {steps} step(s) before step {self.progress.step}; expected a finite "
                f"number. Lower lr ({self.config.optimizer.lr}) and lr_other ({self.config.optimizer.lr_other}), "
                "lengthen warmup_steps, or set clip, and start anew"
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

    def save(self) -> None:
        state = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "elapsed_seconds": self.progress.elapsed_seconds,
            "scheduler": self.scheduler.state_dict(),
            "data": self.data.state_dict(),
            "tokenizer": self.tokenizer.fingerprint,
            "held_out": self.held_out,
            "config": self.config.flat(),
            "deepspeed": self.zero,
            "ranks": self.world.size,
        }
        self.checkpointer.save(self.progress.step, state, self.tokenizer.json)
        self.saved_at = time.monotonic()

    def say_how_to_go_on(self, stopped_by: int) -> None:
        by, step = signal.Signals(stopped_by).name, self.progress.step
        folder = "" if self.config.run.output_dir else f" with --output_dir {self.folder}"
        print(
            f"\nstopped by {by} after step {step} of {self.config.run.steps}; saved {self.checkpointer.path(step)}\n"
            f"Start the same command again{folder} to go on from there.",
            flush=True,
        )

    def summarize(self) -> None:
        """The picture of the curves, and where everything is."""
        records = read_log(self.folder)
        picture = self.folder / PLOT_FILE
        draw({self.config.optimizer.optimizer: records}, picture)
        if not records:  # somebody has removed the log
            return
        last = records[-1]
        loss = next((record["val_loss"] for record in reversed(records) if record["val_loss"] is not None), math.nan)
        speed = statistics.median(record["tokens_per_second"] for record in records)
        print(
            f"\nfinal validation loss {loss:.4f}, perplexity {math.exp(loss):.2f}, after "
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
    below = batch_size // world.size * world.size
    near = " or ".join(str(size) for size in (below, below + world.size) if size)
    ranks = max(size for size in range(1, min(world.size, batch_size) + 1) if batch_size % size == 0)
    expect(
        batch_size == below,
        f"batch_size={batch_size} sequences cannot be split evenly over {world.size} ranks: choose {near}, "
        f"or start {ranks} rank(s)",
    )
    share = batch_size // world.size
    at_most = min(config.run.micro_batch_size or share, share)
    return max(size for size in range(1, at_most + 1) if share % size == 0)
