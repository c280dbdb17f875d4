"""Whole state dicts that rank 0 hands out: `full_state_dict`, and `broadcast_from_rank0`, on every layout."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from test_checkpoints import advance, awkward, build, whole
from test_sharded import BUILD
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ldadam_dist import LDAdamW

FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def differing(model: nn.Module, optimizer: LDAdamW, other: nn.Module, fresh: LDAdamW) -> list[str]:
    """The weights and states that are not the same, bit for bit, kind and dtype included."""
    found = []
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        mine, its = optimizer.state.get(p, {}), fresh.state.get(q, {})
        if mine.keys() != its.keys() or not torch.equal(whole(p), whole(q)):
            found.append(name)
        for key, value in mine.items():
            got = its.get(key)
            same_kind = isinstance(got, DTensor) == isinstance(value, DTensor) and got.dtype == value.dtype
            if not same_kind or getattr(got, "placements", None) != getattr(value, "placements", None):
                found.append(f"kind of {key} of {name}")
            elif not torch.equal(whole(value), whole(got)):
                found.append(f"{key} of {name}")
    return found


def hand_out(model_name: str, layout: str) -> list[str]:
    """What does not come back exactly if rank 0 hands out a whole state, which it alone has or all have."""
    wrong = []
    model, optimizer, parts, part = build(model_name, layout, torch.float64)

    def train(model: nn.Module, optimizer: LDAdamW, steps: range) -> None:
        _, loss_of, data, _ = BUILD[model_name]
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, data(step).chunk(parts)[part]).backward()
            optimizer.step()

    train(model, optimizer, range(3))
    sharded = layout not in ("ddp", "replicas")
    for offloaded, stepped in itertools.product((False, True), (False, True)):
        # With cpu_offload torch gives the whole state to rank 0 alone, and the others an empty one.
        options = StateDictOptions(full_state_dict=True, cpu_offload=offloaded)
        # What is loaded may be what was saved, not a copy, as with torch's own optimizers.
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        if offloaded and sharded and dist.get_rank() > 0 and state.get("state"):
            wrong.append(f"the states of {list(state['state'])} are not on rank 0 alone")
        other, fresh, *_ = build(model_name, layout, torch.float64)
        if stepped:
            train(other, fresh, range(1))
        other.load_state_dict(model.state_dict())
        set_optimizer_state_dict(other, fresh, state, options=FROM_RANK_0)
        wrong += [f"{name}, {offloaded=}, {stepped=}" for name in differing(model, optimizer, other, fresh)]
    train(model, optimizer, range(3, 5))
    train(other, fresh, range(3, 5))
    return wrong + [f"{name} afterwards" for name in differing(model, optimizer, other, fresh)]


@pytest.mark.parametrize(
    ("ranks", "model_name", "layout"),
    [
        (2, "odd", "rows"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (4, "odd", "rows"),  # uneven and empty shards
                (2, "llama", "rows"),  # even ones
                (4, "llama", "hsdp"),
                (2, "odd", "replicas"),
                (2, "odd", "ddp"),
                (2, "blocks", "tp"),
                (4, "blocks", "fsdp-tp"),
                (4, "blocks", "fsdp-sp"),
                (8, "blocks", "hsdp-tp"),
            )
        ),
    ],
)
def test_rank_0_hands_out_a_whole_state(ranks: int, model_name: str, layout: str) -> None:
    for wrong in run_ranks(ranks, hand_out, model_name, layout):
        assert wrong == []


def hand_out_awkwardly() -> list[str]:
    """The same with a frozen layer, groups of two ranks of projection, and errors in bfloat16."""
    model, optimizer = awkward()
    advance(model, optimizer, range(3))
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    other, fresh = awkward()
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=state, options=FROM_RANK_0)
    return differing(model, optimizer, other, fresh)


@pytest.mark.slow
def test_rank_0_hands_out_a_state_with_a_frozen_layer_and_two_groups() -> None:
    assert run_ranks(3, hand_out_awkwardly) == [[]] * 3


def files_of_all_ranks(model_name: str, layout: str, folder: str) -> tuple[list[str], str, list[str]]:
    """What differs after torch.load of this rank's own file, the error of another's, and what differs then."""
    model, optimizer, parts, part = build(model_name, layout, torch.float64)
    _, loss_of, data, _ = BUILD[model_name]
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, data(step).chunk(parts)[part]).backward()
        optimizer.step()
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.save(optimizer.state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()
    other, fresh, *_ = build(model_name, layout, torch.float64)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(torch.load(f"{folder}/{rank}.pt", weights_only=True))
    own = differing(model, optimizer, other, fresh)
    try:
        fresh.load_state_dict(torch.load(f"{folder}/{(rank + 1) % size}.pt", weights_only=True))
        message = "accepted"
    except ValueError as error:
        message = str(error)
    return own, message, differing(model, optimizer, other, fresh)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "model_name", "layout"),
    [(2, "odd", "rows"), (2, "odd", "replicas"), (4, "odd", "hsdp"), (2, "blocks", "tp"), (4, "blocks", "fsdp-tp")],
)
def test_torch_save_keeps_a_ranks_part_and_no_other_rank_takes_it(
    ranks: int, model_name: str, layout: str, tmp_path: Path
) -> None:
    for rank, found in enumerate(run_ranks(ranks, files_of_all_ranks, model_name, layout, str(tmp_path))):
        own, message, after = found
        assert own == after == []
        assert f"is the part that rank {(rank + 1) % ranks} had of it" in message
        assert f"expected that of rank {rank}" in message


def load_from_a_mesh_of_another_name() -> bool:
    """Whether a state that was saved on a mesh with names loads on the same one without."""
    optimizers = []
    for names in (("shards",), None):
        model = nn.Linear(7, 5, bias=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=names))
        optimizers.append(LDAdamW(model.parameters(), rank=2))
        model(torch.ones(4, 7)).square().mean().backward()
        optimizers[-1].step()
    named, nameless = optimizers
    nameless.load_state_dict(named.state_dict())
    (state,), (loaded,) = named.state.values(), nameless.state.values()
    return all(torch.equal(local(state[key]), local(loaded[key])) for key in state)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_names_of_a_mesh_do_not_matter() -> None:
    assert all(run_ranks(2, load_from_a_mesh_of_another_name))


def load_flattened(optimizer_name: str) -> str:
    """What torch raises for a whole state that is flattened as well."""
    model = nn.Linear(7, 5, bias=False)
    fully_shard(model)
    kinds = {"AdamW": torch.optim.AdamW, "LDAdamW": lambda params: LDAdamW(params, rank=2)}
    optimizer = kinds[optimizer_name](model.parameters())
    model(torch.ones(4, 7)).square().mean().backward()
    optimizer.step()
    options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    try:
        set_optimizer_state_dict(model, optimizer, state, options=options)
    except KeyError as error:
        return f"KeyError: {error}"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_name", ["AdamW", "LDAdamW"])
def test_flattened_and_whole_is_torchs_own_limit(optimizer_name: str) -> None:
    """When this fails, torch has mended it, and docs/checkpoints.md can say so."""
    assert run_ranks(2, load_flattened, optimizer_name) == ["KeyError: 'param_groups.0.params.0'"] * 2


def test_a_run_that_was_resumed_is_saved_and_resumed_again() -> None:
    """torch adds a default to an optimizer that loads, of which a fresh one's groups know nothing."""
    options = StateDictOptions(full_state_dict=True)
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8))
    optimizer = LDAdamW(model.named_parameters(), rank=2)
    for _ in range(3):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        other = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8))
        other.load_state_dict(model.state_dict())
        fresh = LDAdamW(other.named_parameters(), rank=2)
        assert saved["param_groups"][0].keys() == optimizer.param_groups[0].keys() == fresh.param_groups[0].keys()
        set_optimizer_state_dict(other, fresh, saved, options=options)
        assert differing(model, optimizer, other, fresh) == []
        model, optimizer = other, fresh
