"""Narrow states through state dicts and checkpoints: they have errors of floating numbers, and nothing is lost."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import run_ranks
from test_checkpoints import whole
from test_storage import BF16, KINDS, NARROW, Settings, advance, built, options, seen
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ldadam_dist import LDAdamW
from ldadam_dist.quantized import FORMATS


class Stacked(nn.Module):
    """A stack of three matrices and a convolution, beside a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 10, 36, dtype=torch.float64))
        self.conv = nn.Parameter(torch.randn(9, 4, 3, 3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(9, dtype=torch.float64))


def stacked(settings: Settings) -> tuple[nn.Module, LDAdamW]:
    model = Stacked()
    conv = {"params": [("conv", model.conv)], "flatten": True}
    rest = {"params": [("experts", model.experts), ("bias", model.bias)]}
    return model, LDAdamW([rest, conv], **options(settings))


def push(model: nn.Module, optimizer: LDAdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, dtype=param.dtype, generator=generator)
        optimizer.step()


def equal(model: nn.Module, optimizer: LDAdamW, other: nn.Module, fresh: LDAdamW) -> bool:
    """Weights, and states as they are stored, to the bit."""
    same = True
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        mine, its = optimizer.state[p], fresh.state[q]
        same &= torch.equal(whole(p), whole(q)) and mine.keys() == its.keys()
        same &= all(mine[key].dtype == its[key].dtype for key in mine)
        same &= all(torch.equal(whole(mine[key]), whole(its[key])) for key in mine)
    return same


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_file_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    model, optimizer = stacked(KINDS[kind])
    push(model, optimizer, range(3))
    live = {id(t): t.clone() for state in optimizer.state.values() for t in state.values()}
    saved = optimizer.state_dict()
    assert all(torch.equal(t, live[id(t)]) for state in optimizer.state.values() for t in state.values())
    for state, param in zip(saved["state"].values(), (model.experts, model.bias, model.conv), strict=True):
        assert "error_scale" not in state
        if param is not model.bias:
            assert state["error"].dtype == BF16
            assert state["error"].shape == (param.shape if param.ndim == 3 else (9, 36))
    torch.save({"model": model.state_dict(), "optimizer": saved}, tmp_path / "saved.pt")
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    other, fresh = stacked(KINDS[kind])
    other.load_state_dict(loaded["model"])
    fresh.load_state_dict(loaded["optimizer"])
    push(model, optimizer, range(3, 6))
    push(other, fresh, range(3, 6))
    if kind == "narrow":  # rounded stochastically, the same numbers may have other codes
        same = zip(optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values(), strict=True)
        assert all(torch.equal(a[key], b[key]) for a, b in same for key in a)
    assert equal(model, optimizer, other, fresh)


def test_a_copy_and_a_pickle_go_on_exactly() -> None:
    model, optimizer = stacked(NARROW)
    push(model, optimizer, range(3))
    for way in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        other, fresh = way((model, optimizer))
        push(other, fresh, range(3, 5))
        through, again = copy.deepcopy((model, optimizer))
        push(through, again, range(3, 5))
        assert equal(through, again, other, fresh)


def test_a_resumed_run_stores_as_it_was_built() -> None:
    """From float64 to 8 bits, 4 bits and back; what is saved in fewer bits is exact in more."""
    model, optimizer = stacked({})
    push(model, optimizer, range(2))
    for settings in ({"error_dtype": "int8"}, NARROW, {"error_dtype": "bfloat16"}, {}):
        other, fresh = stacked(settings)
        other.load_state_dict(model.state_dict())
        fresh.load_state_dict(optimizer.state_dict())
        assert all({**group, **settings} == group for group in fresh.param_groups)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            old, new = optimizer.state[p], fresh.state[q]
            assert new["exp_avg"].dtype == (BF16 if settings is NARROW else torch.float64)
            assert torch.equal(new["exp_avg"], old["exp_avg"].to(new["exp_avg"].dtype))
            assert ("error_scale" in new) == (settings.get("error_dtype") in FORMATS and q is not other.bias)
        mine, its = (o.state_dict()["state"][0]["error"].double() for o in (optimizer, fresh))
        step = mine.abs().amax() * {"int8": 1 / 127, "int4": 1 / 5}.get(settings.get("error_dtype"), 0)
        assert (mine - its).abs().max() <= step
        push(other, fresh, range(2, 3))
        model, optimizer = other, fresh


def test_codes_are_refused_where_an_error_is_expected() -> None:
    param = nn.Parameter(torch.randn(8, 32))
    optimizer = LDAdamW([param], rank=2, error_dtype="int8")
    param.grad = torch.randn(8, 32)
    optimizer.step()
    state = {"state": {0: dict(optimizer.state[param])}, "param_groups": optimizer.state_dict()["param_groups"]}
    before = {key: tensor.clone() for key, tensor in optimizer.state[param].items()}
    with pytest.raises(ValueError, match=r"'error' of parameter .* has dtype torch.int8: expected floating numbers"):
        optimizer.load_state_dict(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in optimizer.state[param].items())


OPTIONS = {
    "sharded": (StateDictOptions(), StateDictOptions()),
    "full": (StateDictOptions(full_state_dict=True),) * 2,
    "flat": (StateDictOptions(flatten_optimizer_state_dict=True),) * 2,
    "broadcast": (
        StateDictOptions(full_state_dict=True, cpu_offload=True),
        StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    ),
}


def in_memory(layout: str, kinds: tuple[str, ...]) -> list[str]:
    """The ways of torch's state dicts by which a run does not go on exactly."""
    wrong = []
    for kind in kinds:
        for name, (saving, loading) in OPTIONS.items():
            model, optimizer, parts, part = built(layout, KINDS[kind])
            advance(model, optimizer, range(3), parts, part)
            weights, state = copy.deepcopy(get_state_dict(model, optimizer, options=saving))
            if name == "broadcast":
                everyone = [(weights, state)]
                dist.broadcast_object_list(everyone)
                weights = everyone[0][0]  # the others must have names
            other, fresh, *_ = built(layout, KINDS[kind])
            set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=state, options=loading)
            advance(model, optimizer, range(3, 5), parts, part)
            advance(other, fresh, range(3, 5), parts, part)
            if not equal(model, optimizer, other, fresh):
                wrong.append(f"{kind}, {name}")
    return wrong


SOME = [("rows", ("narrow",)), *(pytest.param(s, tuple(KINDS), marks=pytest.mark.slow) for s in ("rows", "replicas"))]


@pytest.mark.parametrize(("layout", "kinds"), SOME)
def test_state_dicts_of_a_mesh_come_back_exactly(layout: str, kinds: tuple[str, ...]) -> None:
    for wrong in run_ranks(2, in_memory, layout, kinds):
        assert wrong == []


def leg(layout: str, kind: str, steps: tuple[int, int], load: str | None, save: str | None) -> dict[str, Tensor]:
    """Train from one checkpoint to the next."""
    model, optimizer, parts, part = built(layout, KINDS[kind])
    if load is not None:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=load)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    advance(model, optimizer, range(*steps), parts, part)
    if save is not None:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=save)
    return seen(model, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4", "narrow"])
def test_a_checkpoint_goes_on_on_other_meshes(kind: str, tmp_path: Path) -> None:
    """From 2 ranks to 1 and to 3: the numbers of one uninterrupted process."""
    load, at = None, 0
    for ranks in (2, 1, 3):
        save = str(tmp_path / str(ranks))
        found = run_ranks(ranks, leg, "rows", kind, (at, at + 3), load, save)[0]
        expected = leg("plain", kind, (0, at + 3), None, None)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10, msg=f"{ranks} ranks, {name}")
        load, at = save, at + 3
