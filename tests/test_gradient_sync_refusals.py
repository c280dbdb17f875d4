"""gradient_sync="lowrank": what cannot work is refused, and layouts at the edge of what can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from ldadam_dist import LDAdamW
from ldadam_dist.integrations.ddp import keep_matrices_local


def refused() -> None:
    world, matrix = dist.group.WORLD, nn.Parameter(torch.randn(8, 9))
    lowrank: dict[str, Any] = dict(gradient_sync="lowrank", process_group=world, rank=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("replicate",))
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    outside = [dist.new_group([1 - rank]) for rank in range(2)][dist.get_rank()]
    for match, options in (
        ("expected 'full' or 'lowrank'", dict(gradient_sync="low")),
        ("none are named", dict(gradient_sync="lowrank")),
        ("names the same", lowrank | dict(replicate_mesh=mesh)),
        ("expected it with gradient_sync='lowrank'", dict(replicate_mesh=mesh)),
        ("expected one, such as", dict(gradient_sync="lowrank", replicate_mesh=square)),
        ("given as process_group=", dict(gradient_sync="lowrank", replicate_mesh=world)),
        ("expected a DeviceMesh", dict(gradient_sync="lowrank", replicate_mesh="replicate")),
        ("expected a process group", lowrank | dict(process_group=mesh)),
        ("expected a process group", lowrank | dict(process_group=[0, 1])),
        ("gives a number to processes that are not in it", lowrank | dict(process_group=outside)),
        ("expected a process group", dict(process_group=[0, 1])),
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
    with pytest.raises(ValueError, match="none of the optimizer's matrices"):
        keep_matrices_local(model, LDAdamW([matrix], **lowrank))


def test_what_cannot_work_is_refused() -> None:
    run_ranks(2, refused)


def differently_on_each_rank(setting: str) -> None:
    choices: dict[str, tuple[Any, Any]] = {
        "gradient_sync": ("lowrank", "full"),
        "check_replicas_every": (2, 3),
        "keep_matrices_local": (False, True),
    }
    chosen, param = choices[setting][dist.get_rank()], nn.Parameter(torch.ones(8, 9))
    model = DistributedDataParallel(nn.ParameterList([param]))
    options = {} if setting == "keep_matrices_local" else {setting: chosen}
    optimizer = LDAdamW([param], **{"gradient_sync": "lowrank", "process_group": dist.group.WORLD, "rank": 2} | options)
    if chosen is True:
        keep_matrices_local(model, optimizer)
    param.grad = torch.randn(8, 9)
    with pytest.raises(RuntimeError, match=f"(?s)ranks 0 and 1 differ in parameter 0.*{setting}"):
        optimizer.step()
    assert torch.equal(param, torch.ones(8, 9))


@pytest.mark.parametrize("setting", ["gradient_sync", "check_replicas_every", "keep_matrices_local"])
def test_settings_that_differ_between_ranks_are_refused(setting: str) -> None:
    run_ranks(2, differently_on_each_rank, setting)


def other_errors() -> None:
    param = nn.Parameter(torch.ones(8, 9))
    options: dict[str, Any] = dict(gradient_sync="lowrank", process_group=dist.group.WORLD, rank=2)
    optimizer = LDAdamW([("w", param)], **options)
    with pytest.raises(ValueError, match="load_state_dict before"):
        optimizer.load_own_errors({"w": torch.zeros(2, 8, 9)})
    torch.manual_seed(dist.get_rank())
    param.grad = torch.randn(8, 9)
    optimizer.step()
    own = optimizer.own_errors()["w"]
    assert isinstance(own, DTensor)
    other = DTensor.from_local(own.to_local(), DeviceMesh("cpu", [1, 0]), own.placements, run_check=False)
    for match, errors in (
        ("expected DTensor|plain tensor", own.full_tensor()),
        (r"placements \(Replicate", own.redistribute(placements=[Replicate()])),
        (r"is the part that rank", other),  # whose first part is that of rank 1
        ("another number of replicas", own.full_tensor()[:1]),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.load_own_errors({"w": errors})
        assert torch.equal(optimizer.own_errors()["w"].full_tensor(), own.full_tensor())


def test_errors_that_are_not_this_replicas_own_are_refused() -> None:
    run_ranks(2, other_errors)


def same_names() -> None:
    modules = [nn.Linear(8, 9, bias=False) for _ in range(2)]  # each has a "weight"
    groups = [{"params": list(module.named_parameters())} for module in modules]
    optimizer = LDAdamW(groups, gradient_sync="lowrank", process_group=dist.group.WORLD, rank=2, metrics_every=1)
    for number, module in enumerate(modules):
        torch.manual_seed(0)
        module.weight.data.zero_()
        module.weight.grad = torch.randn(9, 8) * (1 + number + dist.get_rank())
    optimizer.step()
    own = {name: error.full_tensor().clone() for name, error in optimizer.own_errors().items()}
    assert list(own) == ["weight", "weight (#0 of group 1)"]
    assert list(optimizer.metrics().matrices) == list(own)
    optimizer.load_own_errors(optimizer.own_errors())
    for name, error in optimizer.own_errors().items():
        assert torch.equal(error.full_tensor(), own[name])


def test_matrices_of_the_same_name_keep_their_own_errors() -> None:
    run_ranks(2, same_names)


def scaled() -> None:
    param = nn.Parameter(torch.randn(8, 9))
    optimizer = LDAdamW([param], gradient_sync="lowrank", process_group=dist.group.WORLD, rank=2)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(param.square().sum()).backward()
    with pytest.raises(RuntimeError, match="each replica would decide by its own gradients"):
        scaler.step(optimizer)
    assert not optimizer.state


def test_a_scaled_loss_is_refused() -> None:
    run_ranks(2, scaled)


def shards_of_one_replica() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model, other = nn.Linear(8, 9), nn.Linear(8, 9)
    other.load_state_dict(model.state_dict())
    fully_shard(model, mesh=mesh["shard"])
    options: dict[str, Any] = dict(lr=0.1, rank=2)
    mine = LDAdamW(model.parameters(), gradient_sync="lowrank", replicate_mesh=mesh["replicate"], **options)
    theirs = LDAdamW(other.parameters(), **options)
    for _ in range(3):
        x = torch.randn(5, 8)  # a gradient of a rank above 2: else the second moment direction is that of rounding
        for module, optimizer in ((model, mine), (other, theirs)):
            module(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert mine.own_errors() == {}
    torch.testing.assert_close(model.weight.full_tensor(), other.weight)


def test_a_single_replica_in_shards_is_as_without_replicas() -> None:
    run_ranks(2, shards_of_one_replica)


def with_empty_shards(side: str, error_dtype: str | None) -> None:
    mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = nn.Linear(7, 4, bias=False)  # 4 rows on three ranks: 2, 2, 0
    fully_shard(model, mesh=mesh["shard"])
    options: dict[str, Any] = dict(rank=2, proj_type=side, error_dtype=error_dtype)
    optimizer = LDAdamW(
        model.parameters(), gradient_sync="lowrank", replicate_mesh=mesh["replicate"], check_replicas_every=1, **options
    )
    for step in range(3):
        torch.manual_seed(10 * dist.get_rank() + step)
        model(torch.randn(5, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved, own = optimizer.state_dict(), optimizer.own_errors()
    errors = own["#0 of group 0"].full_tensor()
    mean = saved["state"][0]["error"].full_tensor()
    assert errors.shape == (2, 4, 7)
    torch.testing.assert_close(errors.mean(0).to(mean.dtype), mean)
    optimizer.load_state_dict(saved)
    for each in optimizer.own_errors()["#0 of group 0"].full_tensor():
        assert error_dtype is not None or torch.equal(each, mean)
    optimizer.load_own_errors(own)
    assert torch.equal(optimizer.own_errors()["#0 of group 0"].full_tensor(), errors)


@pytest.mark.slow
@pytest.mark.parametrize("error_dtype", [None, "int8"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_shards_without_any_row_are_saved_and_loaded(side: str, error_dtype: str | None) -> None:
    run_ranks(6, with_empty_shards, side, error_dtype)
