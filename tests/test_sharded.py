"""Real gloo ranks: the numbers of one process after every step, with every state partitioned.

All cases of one world size run in one set of processes, as starting them costs more than a case.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ldadam_dist import LDAdamW

STEPS = 20
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
BUILD = {
    "llama": (models.tiny_llama, models.llama_loss, models.llama_tokens, 4),
    "odd": (models.odd_net, models.odd_loss, models.odd_inputs, 2),
}

Settings = tuple[tuple[str, Any], ...]
History = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One training run: on a sharded layout and, for comparison, in one process."""

    model: str
    layout: str  # "rows" and "columns" under fully_shard; "ddp", states whole; "replicas", DDP with states split
    settings: Settings = field(default=())
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        settings = ",".join(f"{value}" for _, value in self.settings)
        return f"{self.model}-{self.layout}-{settings or 'default'}-{str(self.dtype)[6:]}"


def cases(world_size: int) -> list[Case]:
    sides = [(("proj_type", p),) for p in ("std", "reverse_std", "left", "right")]
    found = [Case(model, "rows", side) for model in BUILD for side in sides]
    found += [Case("llama", "rows", side, torch.float32) for side in sides[:2]]
    found += [Case("odd", "replicas", side) for side in sides[2:]]
    if world_size < 4:  # fully_shard cuts columns only into equal parts: 24 and 42 columns
        found += [Case("llama", "columns", side) for side in sides[2:]]
    if world_size == 2:
        found += [Case("odd", "ddp"), Case("llama", "replicas", dtype=torch.float32)]
    if world_size == 3:
        methods = [(("proj_method", "svd"),), (("proj_method", "svd_lowrank"),), (("projector_init", "randomized"),)]
        found += [Case("odd", "rows", m + side) for m in methods for side in sides[2:]]
        found += [Case("odd", "replicas", m) for m in methods]
        found += [Case("odd", "rows", (("error_feedback", False),))]
    return found


def train(case: Case, single: bool) -> History:
    """Train and return all weights and errors after every step, whole."""
    build, loss_of, data, rank = BUILD[case.model]
    module = model = build(case.dtype)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "rank": rank, **dict(case.settings)}
    if not single:
        if case.layout in ("rows", "columns"):
            shard(model, cut=1 if case.layout == "columns" else 0)
        else:
            model = DistributedDataParallel(module, find_unused_parameters=True)
            options["process_group"] = dist.group.WORLD if case.layout == "replicas" else None
    optimizer = LDAdamW(module.named_parameters(), **options)
    history = []
    for step in range(STEPS):
        batch = data(step)
        batch = batch.to(case.dtype) if batch.is_floating_point() else batch
        if not single:
            batch = batch.chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        weights = {name: whole(p) for name, p in module.named_parameters()}
        errors = {name: optimizer.state[p].get("error") for name, p in module.named_parameters()}
        history.append(weights | {f"error of {k}": whole(e) for k, e in errors.items() if e is not None})
        if not single and case.layout != "ddp":
            check_partition(module, optimizer)
    return history


def shard(model: nn.Module, cut: int) -> None:
    """`fully_shard` on every block and the root; matrices are cut along dimension `cut`."""
    placement = (lambda p: Shard(1 if p.ndim == 2 else 0)) if cut else None
    for block in model.model.layers if hasattr(model, "model") else []:
        fully_shard(block, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def check_partition(model: nn.Module, optimizer: LDAdamW) -> None:
    """Between steps no rank holds a whole projector, moment or error, and together they hold each element once."""
    for p in model.parameters():
        state = optimizer.state[p]
        for key in state.keys() - {"step"} if "projector" in state else ():
            assert isinstance(state[key], DTensor)
            held = torch.tensor(state[key].to_local().numel())
            assert held < state[key].numel(), key
            dist.all_reduce(held)
            assert held == state[key].numel(), key


def train_all(world_size: int) -> dict[str, History]:
    return {str(case): train(case, single=False) for case in cases(world_size)}


@functools.cache
def in_one_process(model: str, settings: Settings, dtype: torch.dtype) -> History:
    return train(Case(model, "", settings, dtype), single=True)


@pytest.fixture(scope="module")
def sharded(request: pytest.FixtureRequest) -> list[dict[str, History]]:
    """What each rank of a world of `request.param` saw."""
    return run_ranks(request.param, train_all, request.param)


@pytest.mark.parametrize(
    ("sharded", "case"),
    [pytest.param(w, c, id=f"{w}-{c}") for w in (2, 3, 4) for c in cases(w)],
    indirect=["sharded"],
)
def test_equals_one_process_after_every_step(sharded: list[dict[str, History]], case: Case) -> None:
    expected = in_one_process(case.model, case.settings, case.dtype)
    for rank, histories in enumerate(sharded):
        for step, (found, single) in enumerate(zip(histories[str(case)], expected, strict=True), start=1):
            assert found.keys() == single.keys()
            for name, tensor in single.items():
                difference = ((found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-3)).item()
                assert difference <= TOLERANCE[case.dtype], f"rank {rank}, step {step}, {name}: {difference:.1e}"
