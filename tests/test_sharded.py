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
from distributed import once, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ldadam_dist import LDAdamW

STEPS = 12
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ERROR_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""The error sums up, undamped, 1/(1−β1) ≈ 11 times what each step rounds. In float32 one process differs from itself by
up to 7e-5 within 20 steps if its gradients are disturbed by half a unit of rounding (benchmarks/rounding.py).
"""
BUILD = {
    "llama": (models.tiny_llama, models.llama_loss, models.llama_tokens, 4),
    "odd": (models.odd_net, models.odd_loss, models.odd_inputs, 2),
    "blocks": (models.block_net, models.block_loss, models.block_tokens, 3),
}

Settings = tuple[tuple[str, Any], ...]
Parts = dict[str, tuple[Tensor, tuple[int, ...]]]
"""One rank's part of each weight and state, and where in the whole it begins."""
History = list[Parts]


@dataclass(frozen=True)
class Case:
    """One training run: on a sharded layout and, for comparison, in one process."""

    model: str
    layout: str  # what `shard` does; "ddp": states whole; "replicas": DDP with states split
    settings: Settings = field(default=())
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        settings = ",".join(f"{value}" for _, value in self.settings)
        return f"{self.model}-{self.layout}-{settings or 'default'}-{str(self.dtype)[6:]}"


def cases(world_size: int) -> list[Case]:
    sides = [(("proj_type", p),) for p in ("std", "reverse_std", "left", "right")]
    found = [Case("odd", "rows", side) for side in sides]
    found += [Case("llama", "rows", side) for side in (sides if world_size == 2 else sides[2:])]
    found += [Case("llama", "rows", side, torch.float32) for side in sides[:2]]
    found += [Case("odd", "replicas", side) for side in sides[2:]]
    if world_size < 4:  # fully_shard cuts columns only into equal parts: 24 and 42 columns
        found += [Case("llama", "columns", side) for side in sides[2:]]
    if world_size == 2:
        found += [Case("llama", "offload"), *(Case("blocks", how, side) for how in ("tp", "sp") for side in sides[2:])]
        found += [Case("odd", "ddp"), Case("llama", "replicas", dtype=torch.float32)]
    if world_size == 3:
        methods = [(("proj_method", "svd"),), (("proj_method", "svd_lowrank"),), (("projector_init", "randomized"),)]
        found += [Case("odd", "rows", m + side) for m in methods for side in sides[2:]]
        found += [Case("odd", "replicas", m) for m in methods]
        found += [Case("odd", "rows", (("error_feedback", False),))]
    if world_size == 4:
        found += [Case("llama", "hsdp", side) for side in sides[2:]]
        found += [Case("blocks", layout, side) for layout in ("fsdp-tp", "fsdp-sp") for side in sides[2:]]
        found += [Case("llama", "hsdp", dtype=torch.float32), Case("blocks", "fsdp-tp", dtype=torch.float32)]
    if world_size == 8:
        found = [Case("blocks", "hsdp-tp", side) for side in sides[2:]]
    return found


def train(case: Case, single: bool) -> History:
    """Train and return this rank's part of all weights and states after every step."""
    build, loss_of, data, rank = BUILD[case.model]
    module = model = build(case.dtype)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "rank": rank, **dict(case.settings)}
    if not single:
        if case.layout not in ("ddp", "replicas"):
            parts, part = shard(model, case.layout)
        else:
            parts, part = dist.get_world_size(), dist.get_rank()
            model = DistributedDataParallel(module, find_unused_parameters=True)
            options["process_group"] = dist.group.WORLD if case.layout == "replicas" else None
    optimizer = LDAdamW(module.named_parameters(), **options)
    history = []
    for step in range(STEPS):
        batch = data(step)
        batch = batch.to(case.dtype) if batch.is_floating_point() else batch
        if not single:
            batch = batch.chunk(parts)[part]
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        found = {name: local(p) for name, p in module.named_parameters()}
        for name, p in module.named_parameters():
            found |= {f"{key} of {name}": local(t) for key, t in optimizer.state[p].items() if key != "step"}
        history.append(found)
    return history


def shard(model: nn.Module, layout: str) -> tuple[int, int]:
    """Shard a model; returns into how many parts the batch is cut, and which is this rank's.

    "rows", "columns", "offload"    fully_shard on every block and the root; over rows, columns, with CPUOffloadPolicy
    "hsdp"                          the same over two replicas
    "tp", "sp"                      tensor parallelism of all ranks, sequence parallelism
    "fsdp-tp", "fsdp-sp"            fully_shard around tensor parallelism of two ranks: norms on the first mesh
                                    dimension only, or on both (sequence parallelism)
    "hsdp-tp"                       two replicas of that
    """
    world = dist.get_world_size()
    extents = {
        "hsdp": {"replicate": 2, "shard": world // 2},
        "tp": {"tp": world},
        "sp": {"tp": world},
        "fsdp-tp": {"shard": world // 2, "tp": 2},
        "fsdp-sp": {"shard": world // 2, "tp": 2},
        "hsdp-tp": {"replicate": 2, "shard": world // 4, "tp": 2},
    }.get(layout, {"shard": world})
    mesh = init_device_mesh("cpu", tuple(extents.values()), mesh_dim_names=tuple(extents))
    parts = world // extents.get("tp", 1)
    if "tp" in extents:
        parallelize(model, mesh["tp"], sequence=layout.endswith("sp"))
    data_dims = tuple(name for name in extents if name != "tp")
    if not data_dims:
        return parts, 0
    options: dict[str, Any] = {"mesh": mesh[data_dims]}
    if layout == "columns":
        options["shard_placement_fn"] = lambda p: Shard(1 if p.ndim == 2 else 0)
    if layout == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for block in model.model.layers if hasattr(model, "model") else getattr(model, "blocks", []):
        fully_shard(block, **options)
    fully_shard(model, **options)
    return parts, dist.get_rank() // (world // parts)


def parallelize(model: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    """Tensor parallelism of a `BlockNet`: embedding and `down` by rows, head and `up` by columns."""
    between = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {"embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=between)}
    for i in range(len(model.blocks)):
        if sequence:
            plan[f"blocks.{i}.norm"] = SequenceParallel()
        plan[f"blocks.{i}.up"] = ColwiseParallel(input_layouts=between)
        plan[f"blocks.{i}.down"] = RowwiseParallel(output_layouts=between)
    plan["head"] = ColwiseParallel(input_layouts=between, output_layouts=Replicate())
    parallelize_module(model, mesh, plan)


def local(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part, and where it begins; gathering it here would cost more than the training."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone(), (0,) * tensor.ndim
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach().clone(), tuple(offsets)


def train_all(world_size: int) -> dict[str, History]:
    return {str(case): train(case, single=False) for case in cases(world_size)}


@functools.cache
def in_one_process(model: str, settings: Settings, dtype: torch.dtype) -> History:
    return train(Case(model, "", settings, dtype), single=True)


@once
def sharded(world_size: int) -> list[dict[str, History]]:
    """What each rank saw."""
    found: list[dict[str, History]] = run_ranks(world_size, train_all, world_size)
    return found


def slow(world_size: int) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if world_size > 3 else []


@pytest.mark.parametrize(
    ("world_size", "case"), [pytest.param(w, c, id=f"{w}-{c}", marks=slow(w)) for w in (2, 3, 4, 8) for c in cases(w)]
)
def test_equals_one_process_after_every_step(world_size: int, case: Case) -> None:
    expected = in_one_process(case.model, case.settings, case.dtype)
    ranks = [histories[str(case)] for histories in sharded(world_size)]
    for step, (single, *parts) in enumerate(zip(expected, *ranks, strict=True), start=1):
        assert all(part.keys() == single.keys() for part in parts)
        for name, (tensor, _) in single.items():
            if name.startswith(("projector of", "exp_avg of", "exp_avg_sq of")):
                continue  # the sign of a direction is free
            tolerance = (ERROR_TOLERANCE if name.startswith("error") else TOLERANCE)[case.dtype]
            seen, scale = torch.zeros(tensor.shape, dtype=torch.bool), tensor.abs().max().clamp(min=1e-3)
            for piece, begins in (part[name] for part in parts):
                where = tuple(slice(at, at + extent) for at, extent in zip(begins, piece.shape, strict=True))
                seen[where] = True
                difference = ((piece - tensor[where]).abs().max() / scale).item() if piece.numel() else 0.0
                assert difference <= tolerance, f"step {step}, {name}: {difference:.1e}"
            assert seen.all(), f"step {step}, {name}: no rank has all of it"


@pytest.mark.parametrize("world_size", [pytest.param(w, marks=slow(w)) for w in (2, 3, 4, 8)])
def test_states_are_partitioned(world_size: int) -> None:
    """No rank holds a whole projector, moment or error, and together they hold each element once."""
    ranks = sharded(world_size)
    for case in cases(world_size):
        name, expected = str(case), in_one_process(case.model, case.settings, case.dtype)
        matrices = [key.removeprefix("projector of ") for key in expected[-1] if key.startswith("projector of ")]
        assert len(matrices) >= 4
        for key in (f"{state} of {m}" for state in ("projector", "exp_avg", "exp_avg_sq", "error") for m in matrices):
            if key not in expected[-1]:  # no error feedback
                continue
            held = [histories[name][-1][key][0].numel() for histories in ranks]
            whole = expected[-1][key][0].numel()
            if case.layout == "ddp":
                assert held == [whole] * len(held)
            else:
                assert sum(held) == whole
                assert max(held) < whole
