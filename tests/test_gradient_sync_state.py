"""gradient_sync="lowrank": checkpoints, clipping, gradients that cannot be used, bytes on the wire."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from ldadam_dist import LDAdamW, Traffic, build_param_groups, clip_grad_norm_

SETTINGS = dict(lr=1e-2, rank=4, weight_decay=0.01)


def whole_model(model: nn.Module) -> list[dict[str, Any]]:
    """One group of all parameters, that are projected on purpose."""
    return [{"params": list(model.named_parameters()), "rank": SETTINGS["rank"]}]


def build(layout: str, **settings: Any) -> tuple[nn.Module, LDAdamW, int, int]:
    """A model, its optimizer, the number of this replica and of all; "one", "lowrank", "full" or "hsdp"."""
    model, world = models.tiny_llama(), dist.get_world_size() if dist.is_initialized() else 1
    options = SETTINGS | settings
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        options |= dict(gradient_sync="lowrank", replicate_mesh=mesh["replicate"])
        return model, LDAdamW(whole_model(model), **options), mesh["replicate"].get_local_rank(), world // 2
    if layout != "one":
        options |= dict(gradient_sync=layout, process_group=dist.group.WORLD)
    number = dist.get_rank() if layout != "one" else 0
    return model, LDAdamW(whole_model(model), **options), number, world if layout != "one" else 1


def train(model: nn.Module, optimizer: LDAdamW, number: int, count: int, steps: range) -> None:
    for step in steps:
        models.llama_loss(model, models.llama_tokens(step).chunk(count)[number]).backward()
        if count > 1 and optimizer.replicas.averaged:
            for param in model.parameters():
                dist.all_reduce(param.grad.div_(count))
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(model: nn.Module) -> list[Tensor]:
    return [whole(param) for param in model.parameters()]


def save(model: nn.Module, optimizer: LDAdamW, folder: str, own: bool) -> None:
    made, states = get_state_dict(model, optimizer)
    more = {"own": optimizer.own_errors()} if own else {}
    dcp.save({"model": made, "optimizer": states, **more}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: LDAdamW, folder: str, own: bool) -> None:
    made, states = get_state_dict(model, optimizer)
    dcp.load({"model": made, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=made, optim_state_dict=states)
    if own:
        errors = optimizer.own_errors()
        dcp.load({"own": errors}, checkpoint_id=folder)
        optimizer.load_own_errors(errors)


def resumed_exactly(folder: str, layout: str, settings: dict[str, Any]) -> None:
    model, optimizer, *place = build(layout, **settings)
    train(model, optimizer, *place, range(5))
    save(model, optimizer, folder, own=True)
    other, another, *_ = build(layout, **settings)
    load(other, another, folder, own=True)
    train(model, optimizer, *place, range(5, 10))
    train(other, another, *place, range(5, 10))
    for mine, theirs in zip(weights(model), weights(other), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(optimizer.own_errors().values(), another.own_errors().values(), strict=True):
        assert torch.equal(whole(mine), whole(theirs))


@pytest.mark.parametrize("settings", [{}, {"error_dtype": "int8"}, {"proj_type": "right"}], ids=str)
def test_a_resume_on_the_same_replicas_is_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    run_ranks(3, resumed_exactly, str(tmp_path), "lowrank", settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"proj_type": "left"}, {"proj_type": "right"}], ids=str)
def test_a_resume_of_hsdp_is_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    run_ranks(4, resumed_exactly, str(tmp_path), "hsdp", settings)


def part_of_a_run(source: str | None, layout: str, steps: range, target: str | None) -> list[Tensor]:
    model, optimizer, *place = build(layout)
    if source is not None:
        load(model, optimizer, source, own=False)
    train(model, optimizer, *place, steps)
    if target is not None:
        save(model, optimizer, target, own=False)
    return weights(model)


@pytest.mark.parametrize(
    "legs",
    [
        pytest.param((("lowrank", 2), ("lowrank", 3), ("one", 1)), id="fewer-and-more-replicas"),
        pytest.param((("lowrank", 3), ("full", 2), ("lowrank", 2)), id="to-full-and-back"),
        pytest.param((("hsdp", 4), ("lowrank", 2), ("hsdp", 4)), id="to-hsdp-and-back", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_from_the_mean_error_on_any_mesh(tmp_path: Path, legs: tuple[tuple[str, int], ...]) -> None:
    """Rows of the batch are shared out anew, so the averaged gradients, and the trajectory, are those of one device."""
    source, start = None, 0
    for i, (layout, ranks) in enumerate(legs):
        target = str(tmp_path / str(i))
        found = run_ranks(ranks, part_of_a_run, source, layout, range(start, start + 6), target)
        source, start = target, start + 6
    expected = part_of_a_run(None, "one", range(start), None)
    for rank in found:
        for tensor, wanted in zip(rank, expected, strict=True):
            assert (tensor - wanted).abs().max() < 1e-10


def wrong_errors() -> None:
    model, optimizer, *place = build("lowrank")
    train(model, optimizer, *place, range(2))
    own = optimizer.own_errors()
    name = next(iter(own))
    with pytest.raises(ValueError, match=f"nothing for parameter {name}"):
        optimizer.load_own_errors({key: value for key, value in own.items() if key != name})
    fewer = {key: value.redistribute(placements=[Replicate()])[:1] for key, value in own.items()}
    with pytest.raises(ValueError, match="number of replicas"):
        optimizer.load_own_errors(fewer)


def test_errors_of_other_replicas_are_refused() -> None:
    run_ranks(2, wrong_errors)


def clipped() -> None:
    rank, count = dist.get_rank(), dist.get_world_size()
    model, optimizer, *_ = build("lowrank")
    whole_model, other, *_ = build("one")
    for step in range(4):
        for number in range(count):
            tokens = models.llama_tokens(step).chunk(count)[number]
            if number == rank:
                models.llama_loss(model, tokens).backward()
            (models.llama_loss(whole_model, tokens) / count).backward()
        own = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        everyone = [torch.zeros_like(own) for _ in range(count)]
        dist.all_gather(everyone, own)
        if step == 3:
            assert clip_grad_norm_(optimizer, 1e9, math.inf) == max_norm(model, count)
        expected = torch.stack(everyone).square().mean().sqrt()
        norm = clip_grad_norm_(optimizer, 0.1)
        torch.testing.assert_close(norm, expected)
        averaged = torch.nn.utils.get_total_norm([p.grad for p in whole_model.parameters()])
        assert averaged <= norm
        for param in whole_model.parameters():  # the same factor for the averaged gradients is the same step
            param.grad.mul_(0.1 / (expected + 1e-6))
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
        for mine, theirs in zip(weights(model), weights(whole_model), strict=True):
            assert (mine - theirs).abs().max() < 1e-10


def max_norm(model: nn.Module, count: int) -> Tensor:
    own = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], math.inf)
    everyone = [torch.zeros_like(own) for _ in range(count)]
    dist.all_gather(everyone, own)
    return torch.stack(everyone).max()


def test_replicas_are_clipped_alike_by_the_root_mean_square_of_their_norms() -> None:
    run_ranks(3, clipped)


def unusable() -> None:
    model, optimizer, number, count = build("lowrank")
    train(model, optimizer, number, count, range(2))
    before, errors = weights(model), [whole(e) for e in optimizer.own_errors().values()]
    models.llama_loss(model, models.llama_tokens(2).chunk(count)[number]).backward()
    if number == 1:
        next(model.parameters()).grad[0, 0] = math.nan
    with pytest.warns(UserWarning, match="skipped this step"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert all(torch.equal(a, whole(b)) for a, b in zip(errors, optimizer.own_errors().values(), strict=True))
    optimizer.zero_grad()
    train(model, optimizer, number, count, range(2, 4))


def test_a_gradient_that_is_not_finite_on_one_replica_skips_the_step_on_all() -> None:
    run_ranks(2, unusable)


def came_apart() -> None:
    model, optimizer, *place = build("lowrank", check_replicas_every=2)
    train(model, optimizer, *place, range(3))
    with torch.no_grad():
        if dist.get_rank() == 1:
            last = list(model.parameters())[-1]
            last.view(-1)[0] = torch.nextafter(last.view(-1)[0], torch.tensor(9.0, dtype=last.dtype))
    with pytest.raises(RuntimeError, match=r"differ in 1 of \d+ weights, first in lm_head"):
        train(model, optimizer, *place, range(3, 4))


def test_a_weight_that_differs_in_one_bit_is_found() -> None:
    run_ranks(2, came_apart)


def started_apart() -> None:
    """As plain modules do whose seeds differ; nobody has broadcast their weights."""
    model, optimizer, *place = build("lowrank")
    with torch.no_grad():
        next(model.parameters()).add_(dist.get_rank())
    before = weights(model)
    with pytest.raises(RuntimeError, match="must start with the same weights"):
        train(model, optimizer, *place, range(1))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_replicas_that_start_with_other_weights_are_refused() -> None:
    run_ranks(2, started_apart)


def one_replica_without_a_gradient() -> None:
    """As of an expert whose tokens all went to another replica: what is missing is zero in the mean."""
    torch.manual_seed(0)
    param, rank = nn.Parameter(torch.randn(2, 6, 8, dtype=torch.float64)), dist.get_rank()
    bias = nn.Parameter(torch.randn(6, dtype=torch.float64))
    copies = [nn.Parameter(p.detach().clone()) for p in (param, bias)]
    optimizer = LDAdamW([param, bias], gradient_sync="lowrank", process_group=dist.group.WORLD, lr=0.1, rank=2)
    other = LDAdamW(copies, lr=0.1, rank=2)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        grad = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
        grad[1] *= step > 1  # the second expert starts later
        param.grad, bias.grad = (grad.clone(), torch.ones_like(bias)) if rank == step % 2 else (None, None)
        copies[0].grad, copies[1].grad = grad / 2, torch.ones_like(bias) / 2
        optimizer.step()
        other.step()
        assert (param - copies[0]).abs().max() < 1e-12
        assert (bias - copies[1]).abs().max() < 1e-12


def test_a_gradient_that_one_replica_does_not_have_counts_as_zero() -> None:
    run_ranks(2, one_replica_without_a_gradient)


def floats(traffic: Traffic) -> int:
    return sum(record.elements for record in traffic.records if record.dtype.is_floating_point)


def bytes_of_a_step(shape: tuple[int, int], rank: int) -> tuple[int, int]:
    param = nn.Parameter(torch.randn(*shape))
    optimizer = LDAdamW([param], gradient_sync="lowrank", process_group=dist.group.WORLD, rank=rank)
    for _ in range(2):  # the first finds the projector
        param.grad = torch.randn(*shape)
        with Traffic() as traffic:
            optimizer.step()
    return floats(traffic), optimizer.placement()[0].wire_bytes


def test_a_step_moves_factors_and_never_a_matrix() -> None:
    """3·m·r + 5·r·n, and r + 1 sizes, where an all-reduce of the gradient counts 2·m·n."""
    m, n, r = 48, 96, 4
    for elements, wire_bytes in run_ranks(2, bytes_of_a_step, (m, n), r):
        assert elements == 3 * m * r + 5 * r * n + r + 1
        assert wire_bytes == 4 * elements


def first_step(size: int) -> int:
    param = nn.Parameter(torch.randn(size, size))
    optimizer = LDAdamW([param], gradient_sync="lowrank", process_group=dist.group.WORLD, rank=8)
    param.grad = torch.randn(size, size)
    with Traffic() as traffic:
        optimizer.step()
    return floats(traffic)


def test_the_first_projector_of_a_large_matrix_needs_no_gradient_whole() -> None:
    """With randomised subspace iteration; 24 columns: rank and 16 more."""
    size, columns = 384, 24
    for elements in run_ranks(2, first_step, size):
        assert elements < 12 * size * columns < size * size


def measured() -> None:
    model, optimizer, *place = build("lowrank", metrics_every=1)
    train(model, optimizer, *place, range(3))
    models.llama_loss(model, models.llama_tokens(3).chunk(place[1])[place[0]]).backward()
    squares = sum(float(p.grad.square().sum()) for p in model.parameters() if id(p) in optimizer.matrices())
    everyone: list[Any] = [None] * place[1]
    dist.all_gather_object(everyone, squares)
    optimizer.step()
    told = optimizer.metrics()
    assert math.isclose(told.total["grad_norm"], math.sqrt(sum(everyone) / place[1]), rel_tol=1e-6)
    errors = [e.square().sum((-2, -1)).mean() for e in map(whole, optimizer.own_errors().values())]
    assert math.isclose(told.total["error_norm"], float(sum(errors) ** 0.5), rel_tol=1e-6)
    assert 0 < told.total["captured_energy"] < 1
    assert told.total["orthogonality"] < 1e-10


def test_norms_are_root_mean_squares_over_the_replicas() -> None:
    run_ranks(2, measured)


def group_of_one() -> None:
    model = models.tiny_llama()
    groups = build_param_groups(model, rank=4)
    optimizer = LDAdamW(groups, gradient_sync="lowrank", process_group=dist.group.WORLD)
    train(model, optimizer, 0, 1, range(3))
    assert optimizer.own_errors() == {}


def test_a_single_replica_is_one_device() -> None:
    run_ranks(1, group_of_one)
