"""error_in_grad on real gloo ranks: the numbers of a separate gradient, clipping, checkpoints, and what is refused."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from test_error_in_grad import backward, in_place, local
from test_sharded import BUILD, shard
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from ldadam_dist import LDAdamW, clip_grad_norm_


def on_ranks(layout: str) -> dict[str, Any]:
    """What a rank sees of one layout, next to a separate gradient, and of what is refused there."""
    model_name = "blocks" if layout in ("tp", "fsdp-tp", "fsdp-sp") else "odd"
    build, loss_of, data, rank = BUILD[model_name]
    world, me = dist.get_world_size(), dist.get_rank()

    def start(error_in_grad: bool) -> tuple[nn.Module, LDAdamW, int, int]:
        model = build(torch.float64)
        if layout.startswith("ddp"):
            view = layout == "ddp-view"
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view, find_unused_parameters=True)
            return wrapped, LDAdamW(model.named_parameters(), rank=rank, error_in_grad=error_in_grad), world, me
        parts, part = shard(model, layout)
        return model, LDAdamW(model.named_parameters(), rank=rank, error_in_grad=error_in_grad), parts, part

    def train_one(model: nn.Module, optimizer: LDAdamW, parts: int, part: int, step: int) -> None:
        first, second = data(step).chunk(parts)[part].chunk(2)
        with model.no_sync() if layout == "ddp" and step % 2 else contextlib.nullcontext():
            (loss_of(model, first) / 2).backward()
        (loss_of(model, second) / 2).backward()

    runs = [start(True), start(False)]
    differ, found = 0.0, {}
    try:
        for step in range(4):
            for run in runs:
                train_one(*run, step)
                run[1].step()
                run[1].zero_grad()
            for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
                errors = [o.state[x].get("error") for x, (_, o, *_) in zip((p, q), runs, strict=True)]
                pairs = [(p, q), tuple(errors)] if errors[0] is not None else [(p, q)]
                for ours, theirs in pairs:
                    difference = local(ours.detach()) - local(theirs.detach())
                    differ = max(differ, difference.abs().max().item() if difference.numel() else 0.0)
        started = [bool(s["step"]) for s in runs[0][1].state.values() if "error" in s and local(s["error"]).numel()]
        found["differ"], found["in place"] = differ, in_place(runs[0][1]) == started
    except RuntimeError as error:
        found["refused"] = str(error)
        return found
    model, optimizer, parts, part = runs[0]
    train_one(model, optimizer, parts, part, 9)
    if me == 0 or layout == "ddp":  # under DDP nobody tells
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None and p.ndim == 2], 0.5)
    before = [local(p).detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    found["spoilt"] = str(raised.value)
    found["unchanged"] = all(torch.equal(a, local(b).detach()) for a, b in zip(before, model.parameters(), strict=True))
    return found


def clipped_and_saved() -> dict[str, float]:
    """Under FSDP2: clipping next to torch's, and a checkpoint before the first step and in the middle."""
    build, loss_of, data, rank = BUILD["odd"]
    runs = []
    for error_in_grad in (True, False):
        model = build(torch.float64)
        parts, part = shard(model, "rows")
        runs.append((model, LDAdamW(model.named_parameters(), rank=rank, error_in_grad=error_in_grad)))

    def advance(steps: range, clip: float | None) -> float:
        for step in steps:
            for model, optimizer in runs:
                loss_of(model, data(step).chunk(parts)[part]).backward()
                if clip:
                    norm = clip_grad_norm_(optimizer, clip)
                optimizer.step()
                optimizer.zero_grad()
        differences = [
            local(p.detach() - q.detach())
            for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True)
        ]
        assert clip is None or norm.full_tensor() > clip
        return max(d.abs().max().item() for d in differences if d.numel())

    get_optimizer_state_dict(*runs[0])  # a step with zero gradients
    found = {"after a state dict": advance(range(3), None)}
    assert any(in_place(runs[0][1]))
    weights, state = copy.deepcopy(get_state_dict(*runs[0]))
    advance(range(3, 4), None)
    backward(runs[0][0], 4)
    set_state_dict(*runs[0], model_state_dict=weights, optim_state_dict=state)
    set_state_dict(*runs[1], model_state_dict=weights, optim_state_dict=copy.deepcopy(state))
    for p, q in zip(*(run[0].parameters() for run in runs), strict=True):
        p.grad = q.grad = None
    found["resumed"] = advance(range(5, 7), None)
    runs[0][1].keep_gradients_apart()
    found["clipped"] = advance(range(7, 10), 0.05)
    return found


def everything(layouts: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, float]]:
    return {layout: on_ranks(layout) for layout in layouts}, clipped_and_saved() if dist.get_world_size() < 4 else {}


LAYOUTS = [
    (2, ("rows", "ddp")),
    pytest.param(2, ("tp", "ddp-view"), marks=pytest.mark.slow),
    pytest.param(3, ("rows", "ddp"), marks=pytest.mark.slow),
    pytest.param(4, ("rows", "fsdp-tp", "fsdp-sp"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "layouts"), LAYOUTS)
def test_ranks_see_the_numbers_of_a_separate_gradient(ranks: int, layouts: tuple[str, ...]) -> None:
    """5 and 3 rows are uneven on 2 and 3 ranks; on 4 ranks the last has nothing."""
    for found, saved in run_ranks(ranks, everything, layouts):
        assert max(saved.values(), default=0.0) <= 1e-12, saved
        for layout in layouts:
            if layout == "ddp-view":
                assert "was replaced by another tensor" in found[layout]["refused"]
                continue
            assert found[layout]["differ"] <= 1e-12, layout
            assert found[layout]["in place"]
            assert "error" in found[layout]["spoilt"]
            assert found[layout]["unchanged"]


def replicas() -> str:
    model = models.odd_net()
    shard(model, "hsdp")
    with pytest.raises(ValueError) as raised:
        LDAdamW(model.named_parameters(), rank=2, error_in_grad=True)
    return str(raised.value)


@pytest.mark.slow
def test_replicas_of_a_mesh_are_refused() -> None:
    for message in run_ranks(4, replicas):
        assert "expected no replicas" in message
