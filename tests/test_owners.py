"""Who computes what: owners by work, batches and windows by metadata that is equal on all ranks."""

from __future__ import annotations

import models
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import ldadam_dist.step
from ldadam_dist import LDAdamW
from ldadam_dist.buckets import BATCH_ELEMENTS, STACK_ELEMENTS, batches
from ldadam_dist.layout import Axis, MatrixLayout, chunk_bounds
from ldadam_dist.plan import assign_owners, make_plan

LLAMA_60M = [(512, 512)] * 32 + [(512, 1376)] * 24
"""(projected, kept) dimensions of its matrices."""


def layout(m: int, n: int, shards: int = 4, index: int = 0, rank: int = 16) -> MatrixLayout:
    return MatrixLayout(m, n, rank, over_n=Axis((shards,), index, "group"))


def owners_of(layouts: list[MatrixLayout]) -> list[int]:
    return assign_owners([(where, "lowrank") for where in layouts])


def test_chunks_are_those_of_torch() -> None:
    for length in range(12):
        for parts in range(1, 7):
            sizes = [stop - start for start, stop in chunk_bounds(length, parts)]
            expected = [len(piece) for piece in torch.arange(length).chunk(parts)] if length else []
            assert sizes == expected + [0] * (parts - len(expected))


def test_owners_share_the_work() -> None:
    layouts = [layout(m, n) for m, n in LLAMA_60M] + [layout(2048, 4096, rank=128)]  # one that outweighs many
    owners = owners_of(layouts[:-1])
    assert sorted(owners.count(rank) for rank in range(4)) == [14] * 4
    owners = owners_of(layouts)
    alone = owners[-1]
    assert owners.count(alone) == 1  # whoever has the large one has nothing else
    assert len({owners.count(rank) for rank in range(4)} - {1}) <= 2


def test_owners_batches_and_windows_are_the_same_on_every_rank() -> None:
    """Shards of 5, 5, 5, 1 columns: what is chosen by a shard's own size would differ."""
    seen = []
    for index in range(4):
        layouts = [layout(40, 16, index=index), layout(40, 16, index=index), layout(30, 17, index=index)] * 3
        plan = make_plan([(where, 1, how) for where in layouts for how in ("lowrank", "gather")], 1500)
        units = [[[(u.entry, u.communication, u.owner) for u in window] for window in windows] for windows in plan]
        seen.append((batches([((w.m, w.n), w, 1) for w in layouts]), units))
    assert all(rank == seen[0] for rank in seen)
    assert seen[0][0] == [[0, 1, 3, 4, 6, 7], [2, 5, 8]]


def test_only_small_matrices_are_copied_into_batches() -> None:
    small, large = layout(16, STACK_ELEMENTS // 4), layout(16, STACK_ELEMENTS)
    assert small.shard_elements == STACK_ELEMENTS
    fitting = BATCH_ELEMENTS // STACK_ELEMENTS
    assert [len(b) for b in batches([("small", small, 1)] * (fitting + 3))] == [fitting, 3]
    assert [len(b) for b in batches([("large", large, 2)] * 3)] == [2, 1]


def count_orthonormalised() -> int:
    """Matrices whose basis this rank computed in three steps after the first."""
    model = models.odd_net()
    fully_shard(model)
    optimizer = LDAdamW(model.parameters(), rank=2)
    counted, original = 0, ldadam_dist.step.orthonormalize

    def counting(matrices: Tensor, *floor: Tensor) -> Tensor:
        nonlocal counted
        counted += len(matrices)
        return original(matrices, *floor)

    for step in range(4):
        optimizer.zero_grad()
        models.odd_loss(model, models.odd_inputs(step)).backward()
        if step == 1:
            ldadam_dist.step.orthonormalize = counting
        optimizer.step()
    dist.barrier()
    return counted


def test_each_projector_is_computed_once_by_its_owner() -> None:
    """Four matrices with gradients on two ranks, three steps."""
    counts = run_ranks(2, count_orthonormalised)
    assert sum(counts) == 4 * 3
    assert min(counts) == 2 * 3
