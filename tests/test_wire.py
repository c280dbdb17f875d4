"""What one step sends, counted: low-rank factors only, as the formulas say, in calls that do not grow.

The fake process group counts truly, as what is sent follows from metadata; the numbers that arrive are meaningless.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ldadam_dist import LDAdamW, Traffic

M, N, R = 96, 160, 8
"""Projected and kept dimension of the matrices, and the rank."""


def step_traffic(
    mesh_shape: tuple[int, ...],
    placements: tuple[Any, ...],
    side: str,
    communication: str = "lowrank",
    count: int | None = None,
    shape: tuple[int, ...] = (),
    **options: Any,
) -> tuple[Traffic, LDAdamW, int]:
    """What the third step of `count` equal matrices sends (by default one owned by each rank), without the agreement.

    `shape` is (rows, columns); by default M × N or N × M, so that `side` projects M.
    """
    mesh = init_device_mesh("cpu", mesh_shape)
    count = count or dist.get_world_size()
    shape = shape or ((M, N) if side == "left" else (N, M))
    generator = torch.Generator().manual_seed(0)

    def param() -> nn.Parameter:
        whole = torch.randn(shape, generator=generator)
        return nn.Parameter(distribute_tensor(whole, mesh, placements, src_data_rank=None))

    params = [param() for _ in range(count)]
    optimizer = LDAdamW(params, **{"rank": R, "proj_type": side, "communication": communication, **options})
    for _ in range(3):
        for p in params:
            whole = torch.randn(shape, generator=generator)
            p.grad = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        with Traffic() as traffic:
            optimizer.step()
    agreement = [c for c in traffic.records if c.dtype == torch.int32]
    assert [c.kind for c in agreement] == ["all_reduce"] * sum(size > 0 for size in mesh_shape)
    traffic.records[:] = [c for c in traffic.records if c.dtype != torch.int32]
    return traffic, optimizer, count


BOUNDS: dict[str, tuple[tuple[Any, ...], str, float]] = {
    "rows, right": ((Shard(0),), "right", 3 * M * R),
    "rows, left": ((Shard(0),), "left", 2 * R * (M + 3 * N)),
    "columns, left": ((Shard(1),), "left", 3 * M * R),
    "columns, right": ((Shard(1),), "right", 2 * R * (M + 3 * N)),
    "replicas, right": ((Replicate(),), "right", R * (3 * M + N)),
    "replicas, left": ((Replicate(),), "left", R * (3 * M + N)),
}


@pytest.mark.parametrize("world_size", [2, 4, 8, 32])
@pytest.mark.parametrize("name", BOUNDS)
def test_low_rank_bounds(name: str, world_size: int, fake_world: Callable[..., None]) -> None:
    placements, side, bound = BOUNDS[name]
    fake_world(world_size)
    traffic, _, count = step_traffic((world_size,), placements, side)
    assert traffic.elements / count <= 1.05 * bound
    assert max(c.largest for c in traffic.records) < M * N or count > 1  # coalesced: many factors in one
    single, *_ = step_traffic((world_size,), placements, side, count=1)
    assert max(c.largest for c in single.records) < M * N
    assert single.elements <= 1.05 * bound


LAYOUTS = [
    ((4,), (Shard(0),)),
    ((4,), (Shard(1),)),
    ((4,), (Replicate(),)),
    ((2, 4), (Replicate(), Shard(0))),
    ((2, 2), (Shard(0), Shard(1))),
    ((4, 2), (Shard(0), Shard(0))),
    ((2, 2, 2), (Replicate(), Shard(0), Shard(1))),
]


@pytest.mark.parametrize("communication", ["lowrank", "gather"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("mesh", "placements"), LAYOUTS, ids=str)
def test_placement_foretells_what_is_sent(
    mesh: tuple[int, ...], placements: tuple[Any, ...], side: str, communication: str, fake_world: Callable[..., None]
) -> None:
    """One matrix for each owner, so that all-to-alls are balanced as the formulas assume."""
    fake_world(torch.Size(mesh).numel())
    traffic, optimizer, _ = step_traffic(mesh, placements, side, communication)
    foretold = sum(row.wire_bytes for row in optimizer.placement())
    assert {row.communication for row in optimizer.placement()} == {communication}
    assert traffic.bytes == pytest.approx(foretold, rel=0.02)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
@pytest.mark.parametrize("rank", [4, 40])
def test_auto_sends_the_least(placement: Any, side: str, rank: int, fake_world: Callable[..., None]) -> None:
    """A small rank sends factors; a large one on many ranks gathers the matrix on its owner."""
    fake_world(16)
    sent = {
        how: step_traffic((16,), (placement,), side, how, rank=rank)[0].elements
        for how in ("lowrank", "gather", "auto")
    }
    assert sent["auto"] == min(sent.values())
    if placement == Shard(0):
        assert sent["auto"] == sent["gather" if rank == 40 or side == "left" else "lowrank"]


def test_auto_leaves_a_matrix_that_is_larger_than_the_window(fake_world: Callable[..., None]) -> None:
    fake_world(16)
    _, optimizer, _ = step_traffic((16,), (Shard(0),), "left", "auto", rank=40)
    assert {row.communication for row in optimizer.placement()} == {"gather"}
    _, optimizer, _ = step_traffic((16,), (Shard(0),), "left", "auto", rank=40, window_elements=M * N - 1)
    assert {row.communication for row in optimizer.placement()} == {"lowrank"}


@pytest.mark.parametrize("communication", ["lowrank", "gather"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("mesh", "placements"), LAYOUTS, ids=str)
def test_calls_do_not_grow_with_equal_matrices(
    mesh: tuple[int, ...], placements: tuple[Any, ...], side: str, communication: str, fake_world: Callable[..., None]
) -> None:
    """From one matrix for each owner on, as long as they are in one window."""
    world_size = torch.Size(mesh).numel()
    fake_world(world_size)
    some, *_ = step_traffic(mesh, placements, side, communication, count=world_size)
    many, *_ = step_traffic(mesh, placements, side, communication, count=5 * world_size + 1)
    assert many.calls == some.calls


def real_traffic(side: str, layout: str) -> tuple[float, int]:
    """Elements per matrix in the third step, and the largest collective."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*((N, M) if side == "left" else (M, N)), bias=False) for _ in range(4)))
    options: dict[str, Any] = {"rank": R, "proj_type": side, "communication": "lowrank"}
    if layout == "ddp":
        DistributedDataParallel(model)
        options["process_group"] = dist.group.WORLD
    else:
        fully_shard(model)
    optimizer = LDAdamW(model.parameters(), **options)
    for step in range(3):
        for p in model.parameters():
            grad = torch.randn(*p.shape, generator=torch.Generator().manual_seed(step))
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        with Traffic() as traffic:
            optimizer.step()
    factors = [c for c in traffic.records if c.dtype == torch.float32]
    return sum(c.elements for c in factors) / 4, max(c.largest for c in factors)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_real_ranks_send_low_rank_factors(side: str, layout: str) -> None:
    bound = BOUNDS[f"{'replicas' if layout == 'ddp' else 'rows'}, {side}"][2]
    for elements, largest in run_ranks(4, real_traffic, side, layout):
        assert elements <= 1.05 * bound
        assert largest < M * N  # of four matrices together
