"""gradient_sync="lowrank": replicas with gradients of their own take the steps of the averaged gradients."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import once, run_ranks, slice_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ldadam_dist import LDAdamW
from ldadam_dist.integrations.ddp import keep_matrices_local

STEPS = 12
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ERROR_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""The error sums up what each step rounds; see tests/test_sharded.py."""
BUILD = {
    "llama": (models.tiny_llama, models.llama_loss, models.llama_tokens),
    "odd": (models.odd_net, models.odd_loss, models.odd_inputs),
    "blocks": (models.block_net, models.block_loss, models.block_tokens),
    "experts": (models.expert_net, models.odd_loss, models.odd_inputs),
}

Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Case:
    """Replicas of a model, and how they are spread."""

    model: str
    layout: str  # "plain", "ddp", "hsdp" of two shards each, "hsdp-tp" of two shards each by tensor parallelism
    settings: Settings = field(default=())
    dtype: torch.dtype = torch.float64
    micro_batches: int = 1

    def __str__(self) -> str:
        settings = ",".join(f"{value}" for _, value in self.settings)
        return f"{self.model}-{self.layout}-{settings or 'default'}-{str(self.dtype)[6:]}-{self.micro_batches}"


SIDES = [(("proj_type", "left"),), (("proj_type", "right"),)]


def cases(world_size: int) -> list[Case]:
    if world_size == 2:
        found = [Case("llama", "plain", side) for side in SIDES]
        found += [Case("llama", "ddp", SIDES[0], micro_batches=3), Case("llama", "ddp", dtype=torch.float32)]
        found += [Case("odd", "plain", (("error_feedback", False), *side)) for side in SIDES]
        found += [Case("experts", "plain", (("rank", 2),))]  # stacked matrices, and a convolution
        found += [Case("odd", "plain", (("window_elements", 60),))]  # several windows, a matrix or two in each
        found += [Case("odd", "plain", (("error_dtype", "float32"),))]  # narrower than the mathematics
    elif world_size == 3:  # 5 rows and 7 columns do not divide: states have uneven and empty slices
        found = [Case("odd", layout, side) for layout in ("plain", "ddp") for side in SIDES]
        found += [Case("odd", "plain", (how, *side)) for how in INITS for side in SIDES]
    else:
        found = [Case(model, "hsdp", side) for model in ("llama", "odd") for side in SIDES]
        found += [Case("llama", "hsdp", (("projector_init", "randomized"), *side)) for side in SIDES]
        found += [Case("llama", "hsdp", (("error_feedback", False),)), Case("llama", "hsdp", dtype=torch.float32)]
        found += [Case("blocks", "hsdp-tp", side) for side in SIDES]
        found += [Case("llama", "plain"), Case("odd", "ddp", SIDES[1], micro_batches=2)]
    return found


INITS = (("projector_init", "randomized"), ("proj_method", "svd_lowrank"))


def batch(case: Case, step: int) -> Tensor:
    data = BUILD[case.model][2](step)
    return data.to(case.dtype) if data.is_floating_point() else data


def spread(case: Case, model: nn.Module) -> tuple[nn.Module, dict[str, Any], int, int]:
    """The model of this rank, how LDAdamW is told of the replicas, the number of this one and of all."""
    world = dist.get_world_size()
    if case.layout == "plain":
        return model, dict(process_group=dist.group.WORLD), dist.get_rank(), world
    if case.layout == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=case.model == "odd", bucket_cap_mb=0.01)
        return wrapped, dict(process_group=wrapped.process_group), dist.get_rank(), world
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    if case.layout == "hsdp":
        fully_shard(model, mesh=mesh["shard"])
    else:
        for block in model.blocks:
            parallelize_module(block, mesh["shard"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model, dict(replicate_mesh=mesh["replicate"]), mesh["replicate"].get_local_rank(), world // 2


def differences(
    case: Case, ours: nn.Module, theirs: nn.Module, mine: LDAdamW, other: LDAdamW, whole: bool, drift: float
) -> dict[str, float]:
    """The largest difference of weights and of each state, relative to the tolerance.

    Of this rank's part: bringing all parts together takes several times what the training takes. `whole` does it.
    `drift` is how far the weights of one process are from its own with gradients disturbed by half a unit of rounding:
    no run is held to agree better than twice that.
    """
    worst: dict[str, float] = {}

    def compare(what: str, found: Tensor, expected: Tensor) -> None:
        assert found.shape == expected.shape, (what, found.shape, expected.shape)
        tolerance = (ERROR_TOLERANCE if what == "error" else TOLERANCE)[case.dtype]
        if case.settings == (("error_dtype", "float32"),):
            tolerance = 1e-5
        if what == "weight":
            tolerance = max(tolerance, 2 * drift)
        if isinstance(found, DTensor):
            expected = expected if whole else slice_of(expected, found)
            found = found.full_tensor() if whole else found.to_local()
            assert found.shape == expected.shape, (what, found.shape, expected.shape)
        difference = float((found.double() - expected.double()).abs().max()) / tolerance if found.numel() else 0.0
        worst[what] = max(worst.get(what, 0.0), difference)

    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        compare("weight", found.detach(), expected.detach())
    if case.dtype == torch.float32:  # a direction turns by what is rounded over the gap of singular values
        keys = {"step", "error"}
    else:
        keys = {"step", "error", "projector", "exp_avg", "exp_avg_sq"}
    states, expected_states = mine.state_dict()["state"], other.state_dict()["state"]
    assert states.keys() == expected_states.keys()
    for number, state in states.items():
        assert state.keys() == expected_states[number].keys()
        for key in state.keys() & keys:
            compare(key, state[key], expected_states[number][key])
    return worst


class Control:
    """The run of one process once more, with each of its gradients disturbed by half a unit of rounding."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        self.params = [nn.Parameter(param.detach().clone()) for param in model.parameters()]
        self.optimizer = LDAdamW(self.params, **settings)
        self.random = torch.Generator().manual_seed(0)

    def step(self, model: nn.Module, grads: list[Tensor]) -> float:
        """Step with gradients of the model; how far the weights are apart then."""
        for param, grad in zip(self.params, grads, strict=True):
            signs = torch.randint(0, 2, grad.shape, generator=self.random) * 2 - 1
            param.grad = grad * (1 + signs * torch.finfo(grad.dtype).eps / 2)
        self.optimizer.step()
        pairs = zip(self.params, model.parameters(), strict=True)
        return max(float((one.detach() - other.detach()).abs().max()) for one, other in pairs)


def train(all_cases: list[Case]) -> dict[str, list[dict[str, float]]]:
    torch.manual_seed(0)
    return {str(case): train_case(case) for case in all_cases}


def train_case(case: Case) -> list[dict[str, float]]:
    build, loss_of, _ = BUILD[case.model]
    torch.manual_seed(1)
    theirs, model = build().to(case.dtype), build().to(case.dtype)
    model.load_state_dict(theirs.state_dict())
    ours, replicas, number, count = spread(case, model)
    settings = dict(lr=1e-2, rank=4 if case.model == "llama" else 2, weight_decay=0.01) | dict(case.settings)
    mine = LDAdamW(ours.parameters(), gradient_sync="lowrank", check_replicas_every=1, **replicas, **settings)
    other = LDAdamW(theirs.parameters(), **settings)
    control = Control(theirs, settings) if case.dtype == torch.float32 else None
    if case.layout == "ddp":
        keep_matrices_local(ours, mine)
    history = []
    for step in range(STEPS):
        numbers = [(step * count + r) * case.micro_batches + i for r in range(count) for i in range(case.micro_batches)]
        for i, n in enumerate(numbers):
            if i // case.micro_batches == number:
                last = i % case.micro_batches == case.micro_batches - 1
                with ours.no_sync() if case.layout == "ddp" and not last else contextlib.nullcontext():
                    (loss_of(ours, batch(case, n)) / case.micro_batches).backward()
            (loss_of(theirs, batch(case, n)) / len(numbers)).backward()
        disturbed = [p.grad.clone() for p in theirs.parameters() if p.grad is not None] if control else []
        for optimizer in (mine, other):
            optimizer.step()
            optimizer.zero_grad()
        drift = control.step(theirs, disturbed) if control else 0.0
        history.append(differences(case, model, theirs, mine, other, whole=step == STEPS - 1, drift=drift))
    return history


@once
def trained(world_size: int) -> list[dict[str, list[dict[str, float]]]]:
    return run_ranks(world_size, train, cases(world_size))


def slow(world_size: int) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if world_size > 3 else []


@pytest.mark.parametrize(
    ("world_size", "case"), [pytest.param(n, c, id=f"{n}-{c}", marks=slow(n)) for n in (2, 3, 4) for c in cases(n)]
)
def test_every_step_is_that_of_the_averaged_gradients(world_size: int, case: Case) -> None:
    for rank, histories in enumerate(trained(world_size)):
        for step, worst in enumerate(histories[str(case)], start=1):
            assert max(worst.values()) < 1, f"rank {rank}, step {step}: {worst} tolerances"
