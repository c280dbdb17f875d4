"""Matrices on every kind of mesh, by their placements: each step equals the step on one process.

Every placement of every shape is a parameter of one optimizer, so that a world is started once. Each rank compares what
it holds with its slice of a run on whole tensors, after every step.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks, slice_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ldadam_dist import LDAdamW

STEPS = 12
RANK = 2
SHAPES = [
    (8, 12),  # even on 2 and 4
    (12, 9),  # more rows than columns, uneven columns
    (5, 7),  # 2, 2, 1, 0 rows on four ranks; 3, 2 and 2, 2 columns
    (3, 16),  # one row each, and an empty shard on four ranks
    (16, 3),  # one column each
]
STACKS = [
    (4, 5, 6),  # whole matrices on 2 and 4 ranks
    (3, 6, 4),  # 2 and 1 matrices; 1, 1, 1, 0 on four ranks
    (1, 5, 7),  # one matrix: only one rank has it if the stack is cut
]
SOME = (SHAPES[2], SHAPES[3], STACKS[1])
"""The shapes for meshes of several dimensions, where there are many placements."""

RUNS = [
    *((world, (world,), how) for world in (2, 3, 4) for how in ("lowrank", "gather")),
    *((4, (2, 2), how) for how in ("lowrank", "gather")),
    (8, (2, 4), "gather"),
    (8, (2, 2, 2), "lowrank"),
]


def cases(mesh_shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], tuple[Any, ...], str]]:
    """(shape, placements, proj_type) by name."""
    found = {}
    for shape in SHAPES + STACKS if len(mesh_shape) == 1 else SOME[:: len(mesh_shape) - 1]:
        kinds = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
        for number, placements in enumerate(itertools.product(kinds, repeat=len(mesh_shape))):
            if len(mesh_shape) == len(shape) == 3 and Shard(0) not in placements:
                continue  # as the matrices, which take all placements
            sides = ("left", "right")
            for side in sides if len(mesh_shape) < 3 else sides[number % 2 :][:1]:
                words = [p.__class__.__name__[0] + str(getattr(p, "dim", "")) for p in placements]
                found[f"{'x'.join(map(str, shape))}-{'.'.join(words)}-{side}"] = shape, placements, side
    return found


def shard(whole: Tensor, mesh: DeviceMesh, placements: tuple[Any, ...]) -> DTensor:
    return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)


def groups(params: dict[str, nn.Parameter], sides: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"params": [(name, p) for name, p in params.items() if sides[name] == side], "proj_type": side}
        for side in ("left", "right")
    ]


def train(
    mesh_shape: tuple[int, ...], communication: str, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, int]]:
    """The largest difference from one process in weights and errors, and the elements of state held here."""
    mesh = init_device_mesh("cpu", mesh_shape)
    found = cases(mesh_shape)
    generator = torch.Generator().manual_seed(0)
    whole = {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, (s, _, _) in found.items()}
    one = {name: nn.Parameter(tensor.clone()) for name, tensor in whole.items()}
    many = {name: nn.Parameter(shard(tensor, mesh, found[name][1])) for name, tensor in whole.items()}
    sides = {name: side for name, (_, _, side) in found.items()}
    settings = {"lr": 1e-2, "rank": RANK, "weight_decay": 0.1}
    single = LDAdamW(groups(one, sides), **settings)
    sharded = LDAdamW(groups(many, sides), **settings, communication=communication)
    worst = dict.fromkeys(found, 0.0)
    for step in range(STEPS):
        for name, (shape, placements, _) in found.items():
            grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if len(shape) == 3 and step % 3 == 0:
                grad[0] = 0  # an expert without a token, at first and later
            one[name].grad, many[name].grad = grad, shard(grad, mesh, placements)
        single.step()
        sharded.step()
        for name in found:
            for mine, expected in (
                (many[name], one[name]),
                (sharded.state[many[name]]["error"], single.state[one[name]]["error"]),
            ):
                expected = slice_of(expected.detach(), mine)
                assert mine.to_local().shape == expected.shape, name
                if expected.numel():
                    worst[name] = max(worst[name], (mine.to_local().detach() - expected).abs().max().item())
            assert torch.equal(sharded.state[many[name]]["step"], single.state[one[name]]["step"])
    states = ("projector", "exp_avg", "exp_avg_sq", "error")
    held = {n: sum(sharded.state[p][key].to_local().numel() for key in states) for n, p in many.items()}
    return worst, held


@pytest.mark.parametrize(
    ("world_size", "mesh", "communication"),
    [pytest.param(*run, id="-".join(map(str, run)), marks=[pytest.mark.slow] if run[0] == 8 else []) for run in RUNS],
)
def test_every_placement_equals_one_process(world_size: int, mesh: tuple[int, ...], communication: str) -> None:
    found = run_ranks(world_size, train, mesh, communication, torch.float64)
    worst = {name: max(rank[name] for rank, _ in found) for name in found[0][0]}
    assert {name: value for name, value in worst.items() if not value <= 1e-10} == {}
    for name, (shape, _, side) in cases(mesh).items():  # every state is held once
        number, (rows, columns) = shape[0] if len(shape) == 3 else 1, shape[-2:]
        m, n = (rows, columns) if side == "left" else (columns, rows)
        assert sum(held[name] for _, held in found) == number * (m * RANK + 2 * RANK * n + m * n), name


def train_kernels() -> None:
    """Convolution kernels, seen as matrices, under every layout that may cut them; a gradient in channels_last."""
    layouts = (Shard(0), Replicate())
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(9, 4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # 9 × 24
    for side in ("left", "right"):
        settings = {"lr": 1e-2, "rank": RANK, "weight_decay": 0.1, "proj_type": side}
        matrix = nn.Parameter(whole.reshape(9, 24).clone())
        plain, rows, copies = (nn.Parameter(t) for t in (whole.clone(), *(shard(whole, mesh, [p]) for p in layouts)))
        replica = nn.Parameter(whole.clone())
        groups = [{"params": [plain, rows, copies], "flatten": True}]
        optimizers = [
            LDAdamW([matrix], **settings),
            LDAdamW(groups, **settings),
            LDAdamW([{"params": [replica], "flatten": True}], **settings, process_group=dist.group.WORLD),
        ]
        for step in range(STEPS):
            grad = torch.randn(whole.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step + 1))
            matrix.grad, plain.grad, replica.grad = (
                grad.reshape(9, 24),
                grad.to(memory_format=torch.channels_last),
                grad,
            )
            rows.grad, copies.grad = (shard(grad, mesh, [placement]) for placement in layouts)
            for optimizer in optimizers:
                optimizer.step()
            for kernel in (plain, rows, copies, replica):
                expected = slice_of(matrix.detach().view_as(whole), kernel)
                found = kernel.to_local() if isinstance(kernel, DTensor) else kernel
                torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-10)
        error = optimizers[2].state[replica]["error"]
        assert error.shape == (9, 24)
        assert error.to_local().numel() < 9 * 24  # partitioned along the kept dimension


def test_a_convolution_is_stepped_like_its_matrix() -> None:
    run_ranks(2, train_kernels)
