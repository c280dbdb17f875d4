"""gradient_sync="lowrank": what cannot work is refused, and nothing has changed then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ldadam_dist import LDAdamW
from ldadam_dist.integrations.ddp import keep_matrices_local


def refused() -> None:
    world, matrix = dist.group.WORLD, nn.Parameter(torch.randn(8, 9))
    lowrank: dict[str, Any] = dict(gradient_sync="lowrank", process_group=world, rank=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("replicate",))
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    for match, options in (
        ("expected 'full' or 'lowrank'", dict(gradient_sync="low")),
        ("none are named", dict(gradient_sync="lowrank")),
        ("names the same", lowrank | dict(replicate_mesh=mesh)),
        ("expected it with gradient_sync='lowrank'", dict(replicate_mesh=mesh)),
        ("expected one, such as", dict(gradient_sync="lowrank", replicate_mesh=square)),
        ("expected 'power_iteration'", lowrank | dict(proj_method="svd")),
        ("expected 'auto'", lowrank | dict(communication="gather")),
        ("Leave one of the two out", lowrank | dict(error_in_grad=True)),
        ("without capturable", lowrank | dict(capturable=True)),
        ("check_replicas_every=-1", lowrank | dict(check_replicas_every=-1)),
        ("check_replicas_every=2", dict(check_replicas_every=2)),
    ):
        with pytest.raises(ValueError, match=match):
            LDAdamW([matrix], **({"rank": 2} | options))
    sharded = nn.Linear(8, 9)
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(ValueError, match="share this rank only"):
        LDAdamW(sharded.parameters(), gradient_sync="lowrank", replicate_mesh=mesh, rank=2)
    module = nn.Linear(8, 9)
    optimizer = LDAdamW(module.parameters(), **lowrank)
    with pytest.raises(ValueError, match="expected DistributedDataParallel"):
        keep_matrices_local(module, optimizer)
    model = DistributedDataParallel(module)
    with pytest.raises(ValueError, match="steps averaged gradients"):
        keep_matrices_local(model, LDAdamW(module.parameters(), rank=2))
    alone = [dist.new_group([r]) for r in range(2)][dist.get_rank()]
    with pytest.raises(ValueError, match="expected the same"):
        keep_matrices_local(model, LDAdamW(module.parameters(), gradient_sync="lowrank", process_group=alone, rank=2))


def test_what_cannot_work_is_refused() -> None:
    run_ranks(2, refused)
