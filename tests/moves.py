"""Runs that are saved, converted and taken up elsewhere: with the DeepSpeed engine, with FSDP2, in one process."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable
from typing import Any

import models
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from zero_runs import MODELS, PARAMS, Run, engine_of, train_step, whole_model

from ldadam_dist import LDAdamW, build_param_groups

AT, STEPS = 3, 3
"""Steps before the checkpoint and after it."""
Weights = dict[str, Tensor]


class MixedNet(nn.Module):
    """Experts, a convolution, a long matrix, and what is not trained like them: tied, frozen, unused, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(7, 6)
        self.embed = nn.Embedding(11, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.experts = models.Experts()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        self.long = nn.Linear(20, 3, bias=False)
        self.unused = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 7) to (batch, 3)."""
        self.calls += 1  # so that a lost buffer shows
        scale = (1 + self.calls / 10).to(x.dtype)
        tokens = (x[:, 0].abs() * 3).long() % 11
        hidden = self.frozen(torch.tanh(self.into(x * scale)) + self.embed(tokens))
        found = self.long(torch.tanh(self.conv(torch.tanh(self.experts(hidden)))).flatten(1))
        return found + self.head(hidden)[:, :3]


def mixed_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A `MixedNet` with fixed weights."""
    torch.manual_seed(0)
    return MixedNet().to(dtype)


MODELS["mixed"] = (mixed_net, models.odd_loss, models.odd_inputs)
UNCLIPPED = {"gradient_clipping": 0.0}


def other_weights(model: nn.Module) -> nn.Module:
    """The model as of another seed, so that what is not loaded shows."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1)
    return model


def saved_by_engine(run: Run, folder: str, universal: bool) -> Weights:
    """Weights `STEPS` after a checkpoint; which is made universal as well."""
    with engine_of(run) as (engine, model):
        for step in range(AT):
            train_step(run, engine, step)
        engine.save_checkpoint(folder, tag="saved")
        if universal and dist.get_rank() == 0:
            make_universal(folder)
        dist.barrier()
        return go_on(run, engine, model)


def loaded_by_engine(run: Run, folder: str, tag: str | None = None) -> Weights:
    """Weights `STEPS` after loading the universal checkpoint in another engine."""
    changed = Run(run.name, run.model, run.zero, {**run.config, **UNIVERSAL}, run.params, run.dtype)
    with changed_weights(), engine_of(changed) as (engine, model):
        engine.load_checkpoint(folder, tag=tag, load_lr_scheduler_states=False)
        return go_on(run, engine, model)


UNIVERSAL = {"checkpoint": {"load_universal": True}}


@contextlib.contextmanager
def changed_weights() -> Any:
    """Models are built with `other_weights` meanwhile."""
    before = dict(MODELS)
    for name, (build, loss, data) in before.items():
        MODELS[name] = (lambda dtype, build=build: other_weights(build(dtype)), loss, data)
    try:
        yield
    finally:
        MODELS.update(before)


def go_on(run: Run, engine: Any, model: nn.Module) -> Weights:
    for step in range(AT, AT + STEPS):
        train_step(run, engine, step)
    return whole_model(engine, model)


def make_universal(folder: str) -> None:
    """DeepSpeed's own conversion of FOLDER/saved to FOLDER/universal."""
    from deepspeed.checkpoint.ds_to_universal import main

    options = argparse.Namespace(
        input_folder=f"{folder}/saved",
        output_folder=f"{folder}/universal",
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(options)


def build(run: Run, sharded: bool) -> tuple[nn.Module, LDAdamW]:
    """The run's model and optimizer without an engine; over all ranks with FSDP2, or whole on each."""
    model = MODELS[run.model][0](run.dtype)
    if sharded:
        fully_shard(model)
    options = {**PARAMS, **run.params}
    convolutions = options.pop("convolutions", False)
    settings = {key: options[key] for key in ("rank", "lr", "weight_decay")}
    return model, LDAdamW(build_param_groups(model, convolutions=convolutions, **settings), **options)


def plain_steps(run: Run, model: nn.Module, optimizer: LDAdamW, steps: range) -> None:
    """Updates on the same data as `train_step`; FSDP2 averages the gradients over its ranks."""
    _, loss_of, data = MODELS[run.model]
    for step in steps:
        batch = data(step)
        batch = batch.to(run.dtype) if batch.is_floating_point() else batch
        sharded = any(hasattr(param, "device_mesh") for param in model.parameters())
        mine = batch.chunk(dist.get_world_size())[dist.get_rank()] if sharded else batch
        loss_of(model, mine).backward()
        for param in model.parameters():
            if param.requires_grad and param.grad is None:  # ZeRO steps it with zeros
                param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.zero_grad()


def whole_weights(model: nn.Module) -> Weights:
    whole: Callable[[Any], Tensor] = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p  # noqa: E731
    return {name: whole(param.detach()).clone() for name, param in model.named_parameters()}


def saved_plain(run: Run, folder: str, sharded: bool) -> Weights:
    """Weights `STEPS` after a DCP checkpoint."""
    model, optimizer = build(run, sharded)
    plain_steps(run, model, optimizer, range(AT))
    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    plain_steps(run, model, optimizer, range(AT, AT + STEPS))
    return whole_weights(model)


def loaded_plain(run: Run, folder: str, sharded: bool) -> Weights:
    """Weights `STEPS` after loading a DCP checkpoint into another model, as docs/checkpoints.md does."""
    with changed_weights():
        model, optimizer = build(run, sharded)
    weights, state = get_state_dict(model, optimizer)
    load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    plain_steps(run, model, optimizer, range(AT, AT + STEPS))
    return whole_weights(model)


def close(found: Weights, expected: Weights, within: float = 1e-5) -> None:
    """Raise AssertionError unless all weights agree, relative to the largest of each."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        difference = ((found[name] - weight).abs().max() / weight.abs().max().clamp(min=1e-3)).item()
        assert difference <= within, f"{name}: {difference:.1e}"
