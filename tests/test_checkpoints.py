"""Checkpoints by torch.distributed.checkpoint: exact on the same mesh, and the same run on any other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import run_ranks
from test_sharded import BUILD, shard
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ldadam_dist import LDAdamW

SAVE_EVERY = 5
"""Steps of each leg of a run."""

Leg = tuple[int, str]
"""Number of ranks and layout, as in `test_sharded.shard`; "plain" is one process without a process group's help."""

CHAINS: dict[str, tuple[str, list[Leg]]] = {
    "FSDP2 on 4, 2, 1 and 3 ranks": ("odd", [(4, "rows"), (2, "rows"), (1, "rows"), (3, "rows")]),
    "rows, plain, columns": ("odd", [(3, "rows"), (1, "plain"), (2, "rows")]),
    "FSDP2, HSDP, DDP": ("odd", [(2, "rows"), (4, "hsdp"), (2, "replicas"), (3, "rows")]),
    "whole replicas, FSDP2": ("odd", [(2, "ddp"), (3, "rows"), (1, "plain")]),
    "TP, FSDP2 x TP, plain": ("blocks", [(2, "tp"), (4, "fsdp-tp"), (1, "plain"), (2, "sp"), (4, "fsdp-sp")]),
    "HSDP x TP, rows": ("blocks", [(8, "hsdp-tp"), (2, "rows"), (4, "hsdp")]),
}


def build(model_name: str, layout: str, dtype: torch.dtype) -> tuple[nn.Module, LDAdamW, int, int]:
    """A model, its optimizer, and the number of parts of the batch and this rank's."""
    make, _, _, rank = BUILD[model_name]
    module = model = make(dtype)
    parts, part, group = 1, 0, None
    if layout in ("ddp", "replicas"):
        parts, part = dist.get_world_size(), dist.get_rank()
        model = DistributedDataParallel(module, find_unused_parameters=True)
        group = dist.group.WORLD if layout == "replicas" else None
    elif layout != "plain":
        parts, part = shard(model, layout)
    optimizer = LDAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, rank=rank, process_group=group)
    return model, optimizer, parts, part


def leg(
    model_name: str,
    layout: str,
    steps: tuple[int, int],
    load: str | None,
    save: str | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Train from one checkpoint to the next; the whole weights, and errors, at the end."""
    model, optimizer, parts, part = build(model_name, layout, dtype)
    _, loss_of, data, _ = BUILD[model_name]
    if load is not None:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=load)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for step in range(*steps):
        batch = data(step)
        batch = (batch.to(dtype) if batch.is_floating_point() else batch).chunk(parts)[part]
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    if save is not None:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=save)
    found = {}
    for name, param in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = whole(param)
        if "error" in optimizer.state[param]:
            found[f"error of {name}"] = whole(optimizer.state[param]["error"])
    return found


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def run_chain(
    model_name: str, legs: list[Leg], folder: Path, dtype: torch.dtype = torch.float64
) -> list[dict[str, Tensor]]:
    """What rank 0 has at the end of each leg, which goes on from the checkpoint of the one before."""
    found, load = [], None
    for number, (ranks, layout) in enumerate(legs):
        save = str(folder / str(number))
        steps = (number * SAVE_EVERY, (number + 1) * SAVE_EVERY)
        found.append(run_ranks(ranks, leg, model_name, layout, steps, load, save, dtype)[0])
        load = save
    return found


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(((found[n] - t).abs().max() / t.abs().max().clamp(min=1e-3)).item() for n, t in expected.items())


QUICK = ("FSDP2, HSDP, DDP",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in CHAINS])
def test_a_run_goes_on_anywhere(name: str, tmp_path: Path) -> None:
    model_name, legs = CHAINS[name]
    for number, found in enumerate(run_chain(model_name, legs, tmp_path)):
        expected = leg(model_name, "plain", (0, (number + 1) * SAVE_EVERY), None, None, torch.float64)
        assert worst(found, expected) <= 1e-10, f"after leg {number}, {legs[number]}"


REST = ("replicas", "hsdp", "ddp", "fsdp-tp")


@pytest.mark.parametrize("layout", ["rows", *(pytest.param(s, marks=pytest.mark.slow) for s in REST)])
def test_the_same_mesh_goes_on_exactly(layout: str, tmp_path: Path) -> None:
    model_name, ranks = "blocks" if "tp" in layout else "odd", 4
    legs = [(ranks, layout)] * 2
    again = run_chain(model_name, legs, tmp_path, torch.float32)[-1]
    through = run_ranks(ranks, leg, model_name, layout, (0, 2 * SAVE_EVERY), None, None, torch.float32)[0]
    for name, tensor in through.items():
        assert torch.equal(tensor, again[name]), name


def test_float32_goes_on_elsewhere_as_close_as_it_computes(tmp_path: Path) -> None:
    legs = [(3, "rows"), (1, "plain"), (4, "hsdp")]
    found = run_chain("odd", legs, tmp_path, torch.float32)[-1]
    expected = leg("odd", "plain", (0, len(legs) * SAVE_EVERY), None, None, torch.float32)
    weights = {name: tensor for name, tensor in expected.items() if not name.startswith("error")}
    assert worst({name: found[name] for name in weights}, weights) <= 1e-5


OPTIONS = {
    "sharded": StateDictOptions(),
    "full": StateDictOptions(full_state_dict=True),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}


def oddities(options_name: str) -> list[str]:
    """What does not come back exactly through state dicts in memory, at awkward moments."""
    options, wrong = OPTIONS[options_name], []
    for moment in ("before the first step", "while accumulating", "after a group was added"):
        model, optimizer = awkward()
        if moment != "before the first step":
            advance(model, optimizer, range(3))
        if moment == "while accumulating":
            BUILD["odd"][1](model, BUILD["odd"][2](50)).backward()
            gradients = [None if p.grad is None else whole(p.grad) for p in model.parameters()]
        if moment == "after a group was added":
            model.late.requires_grad_(True)
            optimizer.add_param_group({"params": [("late.weight", model.late.weight)], "rank": 3})
            advance(model, optimizer, range(3, 5))
        weights, state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
        if moment == "while accumulating":
            kept = [None if p.grad is None else whole(p.grad) for p in model.parameters()]
            if not all(a is b or torch.equal(a, b) for a, b in zip(gradients, kept, strict=True)):
                wrong.append("gradients were lost")
        optimizer.zero_grad()
        advance(model, optimizer, range(5, 8))
        other, fresh = awkward()
        if moment == "after a group was added":
            other.late.requires_grad_(True)
            fresh.add_param_group({"params": [("late.weight", other.late.weight)], "rank": 3})
        set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=state, options=options)
        advance(other, fresh, range(5, 8))
        for name, param in model.named_parameters():
            mine, its = optimizer.state.get(param, {}), fresh.state.get(other.get_parameter(name), {})
            same = torch.equal(whole(param), whole(other.get_parameter(name))) and mine.keys() == its.keys()
            if not same or not all(torch.equal(whole(mine[key]), whole(its[key])) for key in mine):
                wrong.append(f"{moment}: {name}")
    return wrong


def awkward() -> tuple[nn.Module, LDAdamW]:
    """A sharded model with a frozen layer and one that never gets a gradient; bfloat16 errors, several ranks."""
    model = BUILD["odd"][0](torch.float64)
    model.late = nn.Linear(8, 5, bias=False, dtype=torch.float64)
    model.late.requires_grad_(False)
    fully_shard(model)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first = {"params": [(n, p) for n, p in params.items() if "wide" in n], "rank": 3, "error_dtype": "bfloat16"}
    rest = {"params": [(n, p) for n, p in params.items() if "wide" not in n]}
    return model, LDAdamW([first, rest], lr=1e-2, rank=2)


def advance(model: nn.Module, optimizer: LDAdamW, steps: range) -> None:
    for step in steps:
        BUILD["odd"][1](model, BUILD["odd"][2](step)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", ["sharded", *(pytest.param(o, marks=pytest.mark.slow) for o in ("full", "flat"))])
def test_state_dicts_come_back_exactly_at_awkward_moments(options: str) -> None:
    for wrong in run_ranks(3, oddities, options):
        assert wrong == []


def asynchronous(folder: str) -> bool:
    """An asynchronous save holds the moment at which it was asked for, though training goes on meanwhile."""
    model, optimizer = awkward()
    advance(model, optimizer, range(3))
    weights, state = get_state_dict(model, optimizer)
    before = {name: whole(p) for name, p in model.named_parameters()}
    pending = dcp.async_save(
        {"model": weights, "optimizer": state}, checkpoint_id=folder, process_group=dist.new_group()
    )
    advance(model, optimizer, range(3, 6))
    pending.result()
    other, fresh = awkward()
    weights, state = get_state_dict(other, fresh)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=state)
    exact = all(torch.equal(whole(p), before[name]) for name, p in other.named_parameters())
    advance(other, fresh, range(3, 6))
    return exact and all(
        torch.equal(whole(p), whole(q)) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_an_asynchronous_save_holds_its_moment(tmp_path: Path) -> None:
    assert run_ranks(2, asynchronous, str(tmp_path / "checkpoint")) == [True, True]


def misfits() -> dict[str, tuple[str, bool]]:
    """The error of loading what another optimizer saved, and whether everything is as it was."""
    model, optimizer = awkward()
    advance(model, optimizer, range(2))
    saved = get_state_dict(model, optimizer)[1]
    found = {}
    for what, options in {
        "rank": {"rank": 1},
        "proj_type": {"proj_type": "left"},
        "flatten": {"flatten": True},
    }.items():
        other = BUILD["odd"][0](torch.float64)
        other.late = nn.Linear(8, 5, bias=False, dtype=torch.float64)
        fully_shard(other)
        groups = [
            {**{k: v for k, v in group.items() if k not in ("params", "param_names")}, **options, "params": []}
            for group in optimizer.param_groups
        ]
        names = {name: p for name, p in other.named_parameters() if "late" not in name}
        for group, mine in zip(groups, optimizer.param_groups, strict=True):
            group["params"] = [(name, names[name]) for name in mine["param_names"]]
        fresh = LDAdamW(groups, lr=1e-2)
        advance(other, fresh, range(1))
        before = {name: whole(t) for name, p in names.items() for name, t in fresh.state[p].items()}
        try:
            set_optimizer_state_dict(other, fresh, saved)
            message = "accepted"
        except ValueError as error:
            message = str(error)
        after = {name: whole(t) for name, p in names.items() for name, t in fresh.state[p].items()}
        found[what] = message, all(torch.equal(t, after[name]) for name, t in before.items())
    return found


def test_a_state_of_other_settings_is_refused_and_nothing_is_loaded() -> None:
    for found in run_ranks(2, misfits):
        for what, (message, unchanged) in found.items():
            assert f"saved with {what}=" in message
            assert unchanged


def test_a_state_dict_is_tensors_and_plain_data(tmp_path: Path) -> None:
    """It loads with weights_only=True, and exactly."""
    model = BUILD["odd"][0](torch.float32)
    optimizer = LDAdamW(model.named_parameters(), lr=1e-2, rank=2, error_dtype=torch.bfloat16)
    loss_of, data = BUILD["odd"][1:3]
    for step in range(3):
        loss_of(model, data(step).float()).backward()
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    for state in loaded["state"].values():
        assert all(isinstance(value, Tensor) for value in state.values())
    for group in loaded["param_groups"]:
        plain = (int, float, bool, str, type(None), list, tuple)
        assert all(isinstance(value, plain) for value in group.values())
    other = BUILD["odd"][0](torch.float32)
    fresh = LDAdamW(other.named_parameters(), lr=1e-2, rank=2, error_dtype=torch.bfloat16)
    fresh.load_state_dict(loaded)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == fresh.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, fresh.state[q][key])
            assert value.dtype == fresh.state[q][key].dtype
