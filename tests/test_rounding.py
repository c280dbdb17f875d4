"""Stochastic rounding of weights and states: the same on any mesh, and small updates add up."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from test_checkpoints import whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ldadam_dist import LDAdamW
from ldadam_dist.adapters import FlatAdapter, adapter_for
from ldadam_dist.adapters.flat import FlatRange
from ldadam_dist.buckets import Matrix, store_block
from ldadam_dist.layout import Axis, MatrixLayout
from ldadam_dist.step import Block
from ldadam_dist.weights import Weights

BF16 = torch.bfloat16


@pytest.mark.parametrize(("over_m", "over_n", "replicas"), [(3, 1, 1), (1, 3, 1), (2, 2, 1), (1, 4, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_shards_are_rounded_like_the_whole(over_m: int, over_n: int, replicas: int, transposed: bool) -> None:
    """To the bit, where what is stored is equal to the bit: weights, errors and moments in bfloat16."""
    m, n, r = 7, 40, 3
    whole_layout = MatrixLayout(m, n, r)
    torch.manual_seed(0)
    dense, factors = torch.randn(1, m, n), torch.randn(1, r, n)

    def store(layout: MatrixLayout) -> dict[str, tuple[tuple[slice, slice], Tensor]]:
        rows, columns = slice(*layout.m_range), slice(*layout.n_range)
        held, first = slice(*layout.weight_range), layout.n_range[0] + layout.stored_columns[0]
        moments = slice(first, layout.n_range[0] + layout.stored_columns[1])
        at = {
            "weight": ((rows, held), dense[:, rows, held]),
            "error": ((rows, columns), dense[:, rows, columns]),
            "exp_avg": ((slice(0, r), moments), factors[..., moments]),
            "exp_avg_sq": ((slice(0, r), moments), factors[..., moments]),
        }
        stored = {key: empty_like(part[0], transposed and key in ("weight", "error")) for key, (_, part) in at.items()}
        projector = torch.zeros(1, m, r)
        matrix = Matrix(layout, dense[0], **stored, projector=projector[0], stochastic=True)
        states = (projector, at["exp_avg"][1], at["exp_avg_sq"][1])
        block = Block(at["error"][1], Weights(at["weight"][1]), projector, states[1], states[2])
        store_block([matrix], block, states, [4])
        return {key: (where, stored[key]) for key, (where, _) in at.items()}

    expected = store(whole_layout)
    assert not torch.equal(expected["weight"][1], expected["error"][1])  # each has bits of its own
    for i in range(over_m):
        for j in range(over_n):
            cuts = (over_n // replicas, replicas) if replicas > 1 else (over_n,)
            layout = MatrixLayout(
                *(m, n, r),
                over_m=Axis((over_m,), i, "m") if over_m > 1 else Axis(),
                over_n=Axis(cuts, j, "n") if over_n > 1 else Axis(),
                replicas=Axis((replicas,), j % replicas, "r") if replicas > 1 else Axis(),
            )
            for key, (where, part) in store(layout).items():
                assert torch.equal(part, expected[key][1][where]), key


def empty_like(part: Tensor, transposed: bool) -> Tensor:
    return torch.empty(part.mT.shape, dtype=BF16).mT if transposed else torch.empty(part.shape, dtype=BF16)


def places_here() -> list[str]:
    """The layouts of a parameter on which this rank does not know where its elements are."""
    wrong = []
    world = dist.get_world_size()
    meshes = {1: init_device_mesh("cpu", (world,)), 2: init_device_mesh("cpu", (2, world // 2))}
    for shape in ((), (9,), (5, 7), (3, 5, 4), (2, 3, 4, 5)):
        elements = torch.arange(torch.Size(shape).numel()).view(shape)
        for placements in ([Shard(0)], [Shard(1)], [Replicate(), Shard(0)], [Shard(1), Shard(0)], [Shard(0), Shard(0)]):
            if any(p.is_shard() and p.dim >= len(shape) for p in placements):
                continue
            param = distribute_tensor(elements.float(), meshes[len(placements)], placements)
            local = param.to_local()
            adapter = adapter_for(param, None, True, "it", False)
            rows, columns = adapter.places(param, shape, 0, len(local) if shape else 1)
            found = rows * elements[:1].numel() + columns if shape else rows + columns
            if not torch.equal(found.view(local.shape), local.long()):
                wrong.append(f"{shape}, {placements}")
    return wrong


def test_every_element_knows_its_place() -> None:
    assert run_ranks(4, places_here) == [[]] * 4
    shape, starts = (6, 5), (0, 13, 13, 30)
    for index in range(3):
        run = FlatRange(starts, index, 4)
        adapter = FlatAdapter(torch.empty(40), run, [0, 1, 2], None, torch.device("cpu"), 0)
        rows, columns = adapter.places(torch.empty(40), shape, 0, run.length)
        assert (rows * 5 + columns).flatten().tolist() == list(range(*starts[index : index + 2]))


def test_adamw_of_shards_is_that_of_the_whole() -> None:
    """bfloat16 weights and moments, to the bit, in parts of the parameter."""
    for found in run_ranks(2, sharded_adamw):
        assert found


def sharded_adamw() -> bool:
    torch.manual_seed(0)
    start, grads = torch.randn(5, 40, dtype=BF16), [torch.randn(5, 40, dtype=BF16) for _ in range(6)]
    mesh, results = init_device_mesh("cpu", (2,)), []
    for placement in (None, Shard(0), Shard(1)):
        place = partial(placed, mesh=mesh, placement=placement)
        param, matrix = nn.Parameter(place(start.clone())), nn.Parameter(torch.randn(6, 6))
        groups = [{"params": [param], "enable_lowrank": False}, {"params": [matrix], "rank": 2}]
        optimizer = LDAdamW(groups, lr=1e-4, stochastic_rounding=True)
        for grad in grads:
            param.grad = place(grad)
            optimizer.step()
        state = optimizer.state[param]
        results.append([whole(t) for t in (param, state["exp_avg"], state["exp_avg_sq"])])
    one, *others = results
    return all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


def placed(tensor: Tensor, mesh: DeviceMesh, placement: Shard | None) -> Tensor:
    return tensor if placement is None else distribute_tensor(tensor, mesh, [placement])


@pytest.mark.parametrize("enable_lowrank", [True, False])
def test_small_updates_of_bfloat16_weights_add_up(enable_lowrank: bool) -> None:
    """Each is a small part of the distance of two weights: rounded to nearest they are all lost."""
    moved = {}
    for stochastic in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.full((96, 160), 1.0, dtype=BF16))  # so many that the mean is sharp
        other = nn.Parameter(torch.randn(8, 8))
        groups = [{"params": [param], "enable_lowrank": enable_lowrank}, {"params": [other]}]
        optimizer = LDAdamW(groups, lr=1.6e-4, rank=2, betas=(0.0, 0.99), stochastic_rounding=stochastic)
        for _ in range(50):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[stochastic] = (1 - param.detach().float()).mean().item()
    assert moved[False] == 0
    step = 1.6e-4 * (96**-0.5 if enable_lowrank else 1)  # an element of a direction of 96 equal ones
    assert abs(moved[True] / (50 * step) - 1) < 0.1


def test_the_mathematics_of_adamw_is_in_float32_whatever_is_stored() -> None:
    """With a second moment that bfloat16 cannot move, by 1 in 1,000, only stochastic rounding follows."""
    found = {}
    for stochastic in (False, True):
        param, matrix = nn.Parameter(torch.zeros(20, 30)), nn.Parameter(torch.randn(6, 6))
        groups = [{"params": [param], "enable_lowrank": False}, {"params": [matrix], "rank": 2}]
        settings = {"state_dtype": "bfloat16", "stochastic_rounding": stochastic}
        optimizer = LDAdamW(groups, lr=0.0, betas=(0.9, 0.999), **settings)
        for size in [1.0] * 2 + [2.0] * 200:
            param.grad = torch.full_like(param, size)
            optimizer.step()
        state = optimizer.state[param]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == BF16
        found[stochastic] = state["exp_avg_sq"].float().mean().item()
    exact = 4.0 * (1 - 0.999**200) + (1 - 0.999**2) * 0.999**200
    assert abs(found[True] / exact - 1) < 0.01
    assert abs(found[False] / exact - 1) > 0.05


def test_a_float16_parameter_is_rounded_too() -> None:
    param = nn.Parameter(torch.full((8, 8), 1000.0, dtype=torch.float16))
    optimizer = LDAdamW([param], lr=0.05, rank=2, stochastic_rounding=True)
    for _ in range(40):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert param.isfinite().all()
    assert abs(param.float().mean() - (1000 - 40 * 0.05 * 8**-0.5)) < 0.1
