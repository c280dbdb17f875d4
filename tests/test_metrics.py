"""What steps are like: the oracle's numbers on one device, and one device's numbers on any mesh."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from reference import Reference
from test_sharded import BUILD, Case, shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ldadam_dist import LDAdamW

Told = list[dict[str, dict[str, Any]]]
"""`Metrics` after each step, as dicts."""


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(found: Told, expected: Told, rel: float = 1e-9) -> None:
    for step, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert mine["matrices"].keys() == other["matrices"].keys()
        for name, values in other["matrices"].items():
            # What is zero but for rounding differs from mesh to mesh.
            assert mine["matrices"][name] == pytest.approx(values, rel=rel, abs=1e-12), (step, name)
        for total in (mine["total"], other["total"]):
            total.pop("wire_bytes", None)
        assert mine["total"] == pytest.approx(other["total"], rel=rel, abs=1e-12), step


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("options", [{}, {"error_feedback": False}], ids=str)
@pytest.mark.parametrize("shape", [(12, 20), (190, 210)], ids=["batched", "large"])
def test_are_those_of_the_oracle(left: bool, options: dict[str, Any], shape: tuple[int, int]) -> None:
    weights = [normal(shape, seed) for seed in range(2)]
    params = [(name, nn.Parameter(w.clone())) for name, w in zip("ab", weights, strict=True)]
    settings = {"lr": 1e-2, "weight_decay": 0.1, **options}
    optimizer = LDAdamW(params, rank=4, proj_type="left" if left else "right", metrics_every=1, **settings)
    oracles = [Reference(w, 4, left, **settings) for w in weights]
    for step in range(5):
        expected = {}
        for i, ((name, param), oracle) in enumerate(zip(params, oracles, strict=True)):
            grad, old_weight = normal(shape, 10 * step + i), oracle.weight
            accumulated, old_projector = grad + oracle.error, getattr(oracle, "U", None)
            param.grad = grad.clone()
            oracle.step(grad)
            energy = (oracle.U.mT @ (accumulated if left else accumulated.mT)).square().sum()
            expected[name] = {
                "grad_norm": grad.norm().item(),
                "update_norm": (oracle.weight - (1 - 1e-2 * 0.1) * old_weight).norm().item(),
                "error_norm": oracle.error.norm().item(),
                "captured_energy": (energy / accumulated.square().sum()).item(),
                "orthogonality": 0.0,
            }
            if old_projector is not None:
                expected[name]["subspace_overlap"] = (oracle.U.mT @ old_projector).square().sum().item() / 4
        optimizer.step()
        metrics = optimizer.metrics()
        for name, values in expected.items():
            assert metrics.matrices[name] == pytest.approx(values, rel=1e-8, abs=1e-12), (step, name)
        both = [expected[name] for name in "ab"]
        assert metrics.total["error_norm"] == pytest.approx(math.hypot(*(v["error_norm"] for v in both)))
        assert metrics.total["grad_norm"] == pytest.approx(math.hypot(*(v["grad_norm"] for v in both)))
        assert metrics.total["orthogonality"] == max(v["orthogonality"] for v in metrics.matrices.values())
        assert (metrics.total["skipped_steps"], metrics.total["wire_bytes"]) == (0, 0)


def followed(case: Case, single: bool) -> Told:
    """Metrics of a short run."""
    build, loss_of, data, rank = BUILD[case.model]
    module = model = build(case.dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1, "rank": rank, "metrics_every": 1, **dict(case.settings)}
    if not single:
        if case.layout == "replicas":
            parts, part = dist.get_world_size(), dist.get_rank()
            model = DistributedDataParallel(module, find_unused_parameters=True)
            options["process_group"] = dist.group.WORLD
        else:
            parts, part = shard(model, case.layout)
    optimizer = LDAdamW(module.named_parameters(), **options)
    told = []
    for step in range(4):
        batch = data(step)
        batch = batch.to(case.dtype) if batch.is_floating_point() else batch
        optimizer.zero_grad()
        loss_of(model, batch if single else batch.chunk(parts)[part]).backward()
        optimizer.step()
        told.append(asdict(optimizer.metrics()))
    return told


def stack(single: bool) -> Told:
    """A stack of matrices cut over its matrices: uneven, so that one rank has two of three and the other one."""
    values = normal((3, 8, 12), 0)
    mesh = None if single else init_device_mesh("cpu", (dist.get_world_size(),))
    param = nn.Parameter(values if mesh is None else distribute_tensor(values, mesh, [Shard(0)]))
    optimizer = LDAdamW([("experts", param)], rank=2, metrics_every=1)
    told = []
    for step in range(3):
        grad = normal((3, 8, 12), 1 + step)
        param.grad = grad if mesh is None else distribute_tensor(grad, mesh, [Shard(0)])
        optimizer.step()
        told.append(asdict(optimizer.metrics()))
    return told


def cases(world_size: int) -> list[Case]:
    how = [(("communication", c), ("proj_type", p)) for c in ("lowrank", "gather") for p in ("left", "right")]
    layouts = {2: ("rows", "replicas"), 4: ("hsdp",)}[world_size]
    found = [Case("llama" if layout == "hsdp" else "odd", layout, settings) for layout in layouts for settings in how]
    return found + ([Case("blocks", "fsdp-tp", settings) for settings in how] if world_size == 4 else [])


def on_a_mesh() -> tuple[list[Told], Told]:
    return [followed(case, single=False) for case in cases(dist.get_world_size())], stack(single=False)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_are_those_of_one_device_on_every_rank(world_size: int) -> None:
    expected = [followed(case, single=True) for case in cases(world_size)], stack(single=True)
    for runs, experts in run_ranks(world_size, on_a_mesh):
        for case, found, alone in zip(cases(world_size), runs, expected[0], strict=True):
            assert found[0]["matrices"], str(case)
            same(found, copy.deepcopy(alone), rel=1e-7)
        same(experts, copy.deepcopy(expected[1]))


def test_only_every_so_many_steps_and_nothing_when_off(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(normal((12, 20), 0))
    optimizer = LDAdamW([("w", param)], rank=4, metrics_every=3)
    seen = []
    for step in range(7):
        param.grad = normal((12, 20), step)
        optimizer.step()
        seen.append(optimizer.metrics().matrices.get("w", {}).get("grad_norm"))
    norms = [normal((12, 20), step).norm().item() for step in range(7)]
    assert seen[:2] == [None, None]
    assert seen[2:] == pytest.approx([norms[2]] * 3 + [norms[5]] * 2)

    optimizer.param_groups[0]["metrics_every"] = 0
    monkeypatch.setattr("ldadam_dist.step.measure", lambda *_: pytest.fail("measured"))
    for _ in range(3):
        optimizer.step()
    assert optimizer.metrics().total["skipped_steps"] == 0


def test_of_errors_in_gradients_there_is_no_norm_of_gradients() -> None:
    param = nn.Parameter(normal((12, 20), 0))
    optimizer = LDAdamW([("w", param)], rank=4, metrics_every=1, error_in_grad=True)
    for step in range(3):
        optimizer.zero_grad()
        param.backward(normal((12, 20), step))
        optimizer.step()
    metrics = optimizer.metrics()
    assert "grad_norm" not in metrics.matrices["w"]
    assert metrics.matrices["w"]["error_norm"] == pytest.approx(optimizer.state[param]["error"].norm().item())


def test_skipped_steps_are_told() -> None:
    param = nn.Parameter(normal((12, 20), 0))
    optimizer = LDAdamW([param], rank=4, metrics_every=1)
    param.grad = torch.full((12, 20), torch.nan, dtype=torch.float64)
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    assert optimizer.metrics().total == {"skipped_steps": 1, "wire_bytes": 0}


@pytest.mark.parametrize("value", [-1, 1.5, True, "10"])
def test_a_wrong_interval_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="metrics_every="):
        LDAdamW([nn.Parameter(torch.zeros(8, 8))], rank=2, metrics_every=value)


def test_a_captured_step_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="metrics_every=2: expected 0"):
        LDAdamW([nn.Parameter(torch.zeros(8, 8))], rank=2, metrics_every=2, capturable=True)
