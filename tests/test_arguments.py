"""Every refused input: a ValueError that says what was found, what was expected and what to do."""

from __future__ import annotations

import re
from typing import Any

import models
import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Placement, Shard, distribute_tensor

from ldadam_dist import LDAdamW


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (12, 20))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0: expected a number ≥ 0"),
        ({"lr": float("nan")}, r"lr=nan"),
        ({"lr": "fast"}, r"lr='fast'"),
        ({"lr": None}, r"lr=None: expected a number"),
        ({"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\): expected a number ≥ 0, or a tensor of one element"),
        ({"eps": torch.tensor(1e-8)}, r"eps is tensor.*: expected a number ≥ 0, not a tensor"),
        ({"rho": torch.tensor(0.9)}, r"rho is tensor"),
        ({"rank": torch.tensor(4)}, r"rank=tensor\(4\): expected a positive integer"),
        ({"weight_decay": "0.1"}, r"weight_decay='0\.1'"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1\.0: expected a number in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\]=-0\.1"),
        ({"betas": (0.9,)}, r"expected two numbers"),
        ({"betas": 0.9}, r"expected two numbers"),
        ({"eps": -1e-8}, r"eps=-1e-08"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"rho": 1.0}, r"rho=1\.0: expected a number in \[0, 1\)"),
        ({"rho": -0.1}, r"rho=-0\.1"),
        ({"rank": 0}, r"rank=0: expected a positive integer"),
        ({"rank": 2.5}, r"rank=2\.5: expected a positive integer"),
        ({"rank": True}, r"rank=True"),
        ({"proj_type": "lefty"}, r"proj_type='lefty': expected one of .*Did you mean 'left'\?"),
        ({"proj_type": "full"}, r"proj_type='full': expected one of 'std'"),
        ({"proj_method": "qr"}, r"proj_method='qr': expected one of 'power_iteration'"),
        ({"projector_init": "random"}, r"projector_init='random'.*Did you mean 'randomized'"),
        ({"error_feedback": 1}, r"error_feedback=1: expected True or False"),
        ({"error_dtype": "int2"}, r"error_dtype='int2': expected one of .*'int8', 'int4'\. Did you mean"),
        ({"error_dtype": torch.uint8}, r"error_dtype='uint8': expected one of"),
        ({"state_dtype": "float16"}, r"state_dtype='float16': expected one of 'float64', 'float32', 'bfloat16'"),
        ({"state_dtype": torch.int8}, r"state_dtype='int8': expected one of"),
        ({"stochastic_rounding": 1}, r"stochastic_rounding=1: expected True or False"),
        ({"error_dtype": torch.int64}, r"error_dtype='int64': expected one of"),
        ({"communication": "low"}, r"communication='low': expected one of 'auto', 'lowrank', 'gather'"),
        ({"update_proj_gap": 200}, r"'update_proj_gap' is an argument of GaLore.*every step"),
        ({"scale": 0.25}, r"'scale' is an argument of GaLore"),
    ],
    ids=str,
)
def test_constructor_and_group_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LDAdamW([weight()], **{"rank": 4, **options})
    with pytest.raises(ValueError, match=message):
        LDAdamW([{"params": [weight()], "rank": 4, **options}])


def test_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="'amsgrad'"):
        LDAdamW([weight()], amsgrad=True)


def test_misspelt_group_key() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'weight_decai'.*did you mean 'weight_decay'"):
        LDAdamW([{"params": [weight()], "weight_decai": 0.1}])


def test_rank_larger_than_the_matrix_allows() -> None:
    groups = [{"params": [("down_proj", weight(8, 64))], "enable_lowrank": True, "rank": 8}]
    with pytest.raises(ValueError, match=r"rank=8 does not fit parameter down_proj of shape \(8, 64\).*Lower rank"):
        LDAdamW(groups)


def test_matrix_not_larger_than_its_rank_gets_adamw() -> None:
    small, large = weight(8, 64), weight(9, 64)
    optimizer = LDAdamW([small, large], rank=8)
    for p in (small, large):
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert "projector" not in optimizer.state[small]
    assert "projector" in optimizer.state[large]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([weight().requires_grad_(False)], r"nothing to train: none of its parameters requires a gradient"),
        ([weight(7)], r"would project nothing: none of its 1 parameters is a matrix"),
        ([("head", weight(8, 64))], r"largest matrix is head of shape \(8, 64\), in a group with rank=16"),
        ([{"params": [weight(64, 64)], "enable_lowrank": False}], r"enable_lowrank=False"),
    ],
)
def test_nothing_to_project(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LDAdamW(params)


def test_refused_group_leaves_the_optimizer_as_it_was() -> None:
    optimizer = LDAdamW([weight()], rank=4)
    with pytest.raises(ValueError, match="rho"):
        optimizer.add_param_group({"params": [weight()], "rho": 2.0})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters() -> None:
    with pytest.raises(ValueError, match=r"dtype torch\.complex64: expected a real floating dtype"):
        LDAdamW([weight(), nn.Parameter(torch.randn(12, 20, dtype=torch.complex64))])


def test_frozen_parameters_may_be_anything() -> None:
    """As in a model whose frozen weights are quantised."""
    packed = nn.Parameter(torch.ones(8, 8, dtype=torch.uint8), requires_grad=False)
    optimizer = LDAdamW([{"params": [packed, weight()], "enable_lowrank": True, "rank": 9}])
    optimizer.step()
    assert packed not in optimizer.state


@pytest.mark.parametrize("key", ["maximize", "amsgrad", "fused"])
def test_options_of_torch_that_would_be_ignored(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}=True in a parameter group: LDAdamW has no such option"):
        LDAdamW([{"params": [weight()], "rank": 4, key: True}])


def test_aliases_and_own_keys() -> None:
    with pytest.raises(ValueError, match="did you mean 'proj_type'"):
        LDAdamW([{"params": [weight()], "rank": 4, "projection_type": "right"}])
    optimizer = LDAdamW([{"params": [weight()], "rank": 4, "weight_decay_mult": 2.0, "initial_lr": 1.0}])
    assert optimizer.param_groups[0]["weight_decay_mult"] == 2.0


def test_lr_scale_out_of_range() -> None:
    for scale in (-1.0, None, torch.ones(1)):
        with pytest.raises(ValueError, match="lr_scale"):
            LDAdamW([{"params": [weight()], "rank": 4, "lr_scale": scale}])


def test_numpy_numbers() -> None:
    optimizer = LDAdamW([weight()], lr=np.float32(1e-3), rank=np.int64(4))
    assert type(optimizer.param_groups[0]["rank"]) is int


def test_parameters_without_values() -> None:
    optimizer = LDAdamW([nn.Parameter(torch.empty(12, 20, device="meta"))], rank=4)
    with pytest.raises(ValueError, match=r"is on the meta device.*build the optimizer after it"):
        optimizer.step()


def test_rank_changed_after_the_first_step() -> None:
    param = weight()
    optimizer = LDAdamW([param], rank=4)
    param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.param_groups[0]["rank"] = 6
    with pytest.raises(ValueError, match=r"has a projector of rank 4, its group now asks for 6"):
        optimizer.step()


def test_sparse_gradient_changes_nothing() -> None:
    embedding, linear = nn.Embedding(9, 6, sparse=True), nn.Linear(6, 8)
    optimizer = LDAdamW([*embedding.named_parameters(), *linear.named_parameters()], rank=2)
    before = linear.weight.detach().clone()
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of parameter weight has layout torch\.sparse_coo"):
        optimizer.step()
    assert torch.equal(linear.weight, before)
    assert not optimizer.state


def refuse_layouts() -> list[str]:
    def message(build: Any) -> str:
        with pytest.raises(ValueError) as caught:
            LDAdamW(list(build().named_parameters()), rank=2)
        return str(caught.value)

    cpu = torch.device("cpu")
    flat = message(lambda: FullyShardedDataParallel(models.odd_net(torch.float32), device_id=cpu))
    views = message(
        lambda: FullyShardedDataParallel(models.odd_net(torch.float32), device_id=cpu, use_orig_params=True)
    )
    mesh = torch.distributed.init_device_mesh("cpu", (2,))

    def lying(placement: Placement, mesh: DeviceMesh = mesh, rows: int = 4) -> nn.Module:
        module, whole, local = nn.Module(), torch.ones(7, 8), torch.ones(rows, 8)
        shape = {"shape": whole.shape, "stride": whole.stride()}
        module.weight = nn.Parameter(DTensor.from_local(local, mesh, [placement], run_check=False, **shape))
        return module

    partial = message(lambda: lying(Partial()))
    uneven = message(lambda: lying(Shard(0), rows=3 + dist.get_rank()))
    backwards = message(lambda: lying(Shard(0), mesh=DeviceMesh("cpu", [1, 0])))
    return [flat, views, partial, uneven, backwards]


def test_unsupported_layouts() -> None:
    for flat, views, partial, uneven, backwards in run_ranks(2, refuse_layouts):
        for text in (flat, views):
            assert re.search(r"FullyShardedDataParallel \(FSDP1\).*fully_shard", text)
        assert re.search(r"weight lies on a mesh \(2,\).*Partial.*expected Shard\(dim\) or Replicate", partial), partial
        assert re.search(r"weight of shape \(7, 8\) has a shard of \([34], 8\).*Give DTensor.from_local", uneven), (
            uneven
        )
        assert re.search(r"mesh \(2,\) of ranks \[1, 0\].*irregular.*init_device_mesh", backwards), backwards


def refuse_cut_kernels() -> str:
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    kernel = nn.Parameter(distribute_tensor(torch.ones(8, 6, 3), mesh, [Shard(1)]))
    with pytest.raises(ValueError) as caught:
        LDAdamW([{"params": [("kernel", kernel)], "flatten": True}], rank=2)
    return str(caught.value)


def test_a_flattened_kernel_may_be_cut_along_its_rows_only() -> None:
    for text in run_ranks(2, refuse_cut_kernels):
        assert re.search(r"kernel of shape \(8, 6, 3\).*flatten=True.*Shard dimension 0", text), text


def test_a_flattened_kernel_must_be_contiguous() -> None:
    kernel = nn.Parameter(torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last))
    optimizer = LDAdamW([{"params": [("kernel", kernel)], "flatten": True}], rank=2)
    kernel.grad = torch.randn_like(kernel)
    with pytest.raises(ValueError, match=r"kernel of shape \(8, 6, 3, 3\) has strides.*channels_last"):
        optimizer.step()
    assert not optimizer.state


def test_state_of_other_settings_is_refused_and_nothing_loaded() -> None:
    def trained(**options: Any) -> tuple[nn.Parameter, LDAdamW]:
        param = weight(*options.pop("shape", (12, 20)))
        optimizer = LDAdamW([param], **{"rank": 4, **options})
        param.grad = torch.randn_like(param)
        optimizer.step()
        return param, optimizer

    param, optimizer = trained()
    before = optimizer.state[param]["projector"].clone()
    for other, message in (
        ({"rank": 5}, "saved with rank=5, this optimizer has rank=4"),
        ({"proj_type": "right"}, "saved with proj_type='right'"),
        ({"shape": (12, 24)}, r"'exp_avg' of parameter #0 of group 0 of shape \(12, 20\) is \(4, 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(trained(**other)[1].state_dict())
        assert torch.equal(optimizer.state[param]["projector"], before)
        assert optimizer.param_groups[0]["rank"] == 4
