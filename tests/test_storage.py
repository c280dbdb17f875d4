"""How states are stored: errors of 8 and 4 bits, narrow moments and stochastic rounding, in the optimizer."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import once, run_ranks
from reference import Reference
from test_checkpoints import whole
from test_sharded import shard
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ldadam_dist import LDAdamW, describe
from ldadam_dist.adapters import FlatAdapter, adapter_for
from ldadam_dist.adapters.flat import FlatRange
from ldadam_dist.buckets import Matrix, store_block
from ldadam_dist.layout import Axis, MatrixLayout
from ldadam_dist.quantized import FORMATS
from ldadam_dist.step import Block
from ldadam_dist.tables import format_bytes

BF16, STEPS, MESH_STEPS = torch.bfloat16, 20, 10
Settings = dict[str, Any]
NARROW: Settings = {"error_dtype": "int4", "state_dtype": "bfloat16", "stochastic_rounding": True}


@dataclass
class Stored(Reference):
    """The oracle, whose states pass through what they are stored in after every step."""

    error_dtype: str = "float64"
    state_dtype: torch.dtype = torch.float64

    def step(self, grad: Tensor) -> None:
        super().step(grad)
        if self.error_dtype in FORMATS:
            form = FORMATS[self.error_dtype]
            self.error = form.decode(*form.encode(self.error), self.error.shape[1], torch.float64)
        self.U, self.M, self.V = (t.to(self.state_dtype).double() for t in (self.U, self.M, self.V))

    def projected(self, A: Tensor, B: Tensor) -> Tensor:
        """BᵀU as the step has it, with UᵀU = I, from which a rounded U is as far as it was rounded."""
        return (self.rho * self.M / (1 - self.betas[0] ** (self.t - 1)) + (1 - self.rho) * self.U.T @ A).T


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (12, 64), (33, 31)])  # blocks that are full, and that are not
@pytest.mark.parametrize(
    ("settings", "oracle"),
    [
        ({"error_dtype": "int8"}, {"error_dtype": "int8"}),
        ({"error_dtype": torch.int8, "proj_type": "reverse_std"}, {"error_dtype": "int8"}),
        ({"error_dtype": "int4"}, {"error_dtype": "int4"}),
        ({"state_dtype": "bfloat16"}, {"state_dtype": BF16}),
        ({"error_dtype": "int4", "state_dtype": torch.float32}, {"error_dtype": "int4", "state_dtype": torch.float32}),
    ],
    ids=str,
)
def test_equals_the_oracle_with_the_same_rounding(
    settings: Settings, oracle: dict[str, Any], shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = LDAdamW([param], lr=1e-2, weight_decay=0.1, rank=4, **settings)
    left = (shape[0] <= shape[1]) == ("proj_type" not in settings)
    expected = Stored(param.detach(), 4, left, lr=1e-2, weight_decay=0.1, **oracle)
    for _ in range(STEPS):
        param.grad = torch.randn(shape, dtype=torch.float64)
        optimizer.step()
        expected.step(param.grad)
        torch.testing.assert_close(param.detach(), expected.weight, rtol=0, atol=1e-9)
        error = optimizer.state_dict()["state"][0]["error"].double()
        torch.testing.assert_close(error, expected.error, rtol=0, atol=1e-9)


# Meshes


class Net(nn.Module):
    """70 columns are three blocks; 5 rows are 3 and 2, or 2, 2 and 1."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(70, 36, dtype=dtype)
        self.mid = nn.Linear(36, 33, bias=False, dtype=dtype)
        self.down = nn.Linear(33, 5, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 70) to (batch, 5)."""
        return self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))


def batch_of(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(24, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - torch.sin(3 * x[:, :5])).square().mean()


KINDS: dict[str, Settings] = {
    "int8": {"error_dtype": "int8"},
    "int4": {"error_dtype": "int4"},
    "narrow": NARROW,
    "bfloat16": {"error_dtype": "bfloat16", "stochastic_rounding": True},
}


def built(layout: str, settings: Settings, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, LDAdamW, int, int]:
    """A model, its optimizer, and the number of parts of the batch and this rank's."""
    model = Net(dtype)
    parts, part = (1, 0) if layout in ("plain", "replicas") else shard(model, layout)
    group = dist.group.WORLD if layout == "replicas" else None  # each has the whole batch, so equal gradients
    return model, LDAdamW(model.named_parameters(), **options(settings), process_group=group), parts, part


def options(settings: Settings) -> Settings:
    return {"lr": 1e-2, "weight_decay": 0.1, "rank": 3, **settings}


def advance(
    model: nn.Module,
    optimizer: LDAdamW,
    steps: Iterable[int],
    parts: int = 1,
    part: int = 0,
    dtype: torch.dtype = torch.float64,
) -> float:
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, batch_of(step, dtype).chunk(parts)[part])
        loss.backward()
        optimizer.step()
    return loss.item()


def seen(model: nn.Module, optimizer: LDAdamW) -> dict[str, Tensor]:
    """Whole weights, and errors and AdamW's moments as a state dict has them."""
    found, state = {}, optimizer.state_dict()["state"]
    for number, (name, param) in enumerate(model.named_parameters()):
        found[name] = whole(param)
        for key in ("error",) if "error" in state[number] else ("exp_avg", "exp_avg_sq"):
            found[f"{key} of {name}"] = whole(state[number][key])
    return found


def bytes_here(optimizer: LDAdamW) -> list[int]:
    """Bytes of each parameter's states."""
    sizes = []
    for state in optimizer.state.values():
        local = [t.to_local() if isinstance(t, DTensor) else t for key, t in state.items() if key != "step"]
        sizes.append(sum(t.nbytes for t in local))
    return sizes


def train_everywhere(cases: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    found = {}
    for layout, kind in cases:
        model, optimizer, parts, part = built(layout, KINDS[kind])
        history = []
        for step in range(MESH_STEPS):
            loss = advance(model, optimizer, range(step, step + 1), parts, part)
            history.append(seen(model, optimizer))
        rows = optimizer.placement()
        assert bytes_here(optimizer) == [row.state_bytes for row in rows]
        found[layout, kind] = history, [row.state_bytes for row in rows], [row.total_bytes for row in rows], loss
    return found


LAYOUTS = ("rows", "replicas")
QUICK = [("rows", "int8"), ("rows", "narrow"), ("replicas", "int4")]


@once
def on_ranks(ranks: int) -> list[dict[tuple[str, str], Any]]:
    cases = QUICK if ranks == 2 else list(itertools.product(LAYOUTS, KINDS))
    return run_ranks(ranks, train_everywhere, cases)


@once
def alone(kind: str) -> Any:
    return train_everywhere([("plain", kind)])["plain", kind]


def on_meshes(*layouts: str) -> list[Any]:
    quick = [pytest.param(2, *case) for case in QUICK]
    others = [pytest.param(3, *case, marks=pytest.mark.slow) for case in itertools.product(LAYOUTS, KINDS)]
    return [case for case in quick + others if case.values[1] in layouts]


@pytest.mark.parametrize(("ranks", "layout", "kind"), on_meshes("rows"))
def test_rows_that_are_cut_give_the_numbers_of_one_process(ranks: int, layout: str, kind: str) -> None:
    """No block is cut, and stochastic rounding goes by the place: after every step."""
    history, *_ = on_ranks(ranks)[0][layout, kind]
    for step, (found, expected) in enumerate(zip(history, alone(kind)[0], strict=True)):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10, msg=f"step {step}, {name}")


@pytest.mark.parametrize(("ranks", "layout", "kind"), on_meshes("replicas"))
def test_cuts_within_blocks_still_train(ranks: int, layout: str, kind: str) -> None:
    """Replicas of a matrix with projected rows cut its columns."""
    history, *_, loss = on_ranks(ranks)[0][layout, kind]
    expected, *_, loss_alone = alone(kind)
    for name in ("up.weight", "mid.weight", "down.weight"):
        moved = (expected[-1][name] - expected[0][name]).norm()
        assert (history[-1][name] - expected[-1][name]).norm() <= 0.3 * moved
    assert abs(loss - loss_alone) <= 0.05 * loss_alone


@pytest.mark.parametrize(("ranks", "layout", "kind"), on_meshes(*LAYOUTS))
def test_all_ranks_together_hold_what_placement_says(ranks: int, layout: str, kind: str) -> None:
    everyone = [rank[layout, kind] for rank in on_ranks(ranks)]
    for number, param in enumerate(Net().parameters()):
        if param.ndim == 2 or layout == "rows":  # moments of vectors are whole on each replica
            assert {total[number] for _, _, total, _ in everyone} == {sum(here[number] for _, here, _, _ in everyone)}


def test_describe_and_placement_tell_the_true_bytes() -> None:
    for settings in KINDS.values():
        model, optimizer, *_ = built("plain", settings)
        advance(model, optimizer, range(1))
        told = [row.total_bytes for row in optimizer.placement()]
        assert told == [row.state_bytes for row in optimizer.placement()] == bytes_here(optimizer)
        stored = {key: value for key, value in settings.items() if key.endswith("_dtype")}
        assert describe(optimizer) == describe(optimizer, **stored)
        assert f"state {format_bytes(sum(told))} against" in describe(optimizer)


def test_a_7b_llama_takes_less_than_three_quarters_of_a_byte_per_parameter() -> None:
    """bfloat16 parameters, errors of 4 bits, rank 32; AdamW's states of embedding and head included."""
    matrices = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    projected = [nn.Parameter(torch.empty(s, dtype=BF16, device="meta")) for s in matrices for _ in range(32)]
    ends = [nn.Parameter(torch.empty(32000, 4096, dtype=BF16, device="meta")) for _ in range(2)]
    norms = [nn.Parameter(torch.empty(4096, dtype=BF16, device="meta")) for _ in range(65)]
    groups = [{"params": projected, "rank": 32}, {"params": ends + norms, "enable_lowrank": False}]
    optimizer = LDAdamW(groups, error_dtype="int4", state_dtype="bfloat16")
    held = sum(row.total_bytes for row in optimizer.placement())
    assert held / sum(p.numel() for p in projected + ends + norms) <= 0.72


# Stochastic rounding


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
        block = Block(at["error"][1], at["weight"][1], projector, states[1], states[2])
        store_block([matrix], block, states, 4)
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
            rows, columns = adapter_for(param, None, "it", False).places(param, shape, 0, len(local) if shape else 1)
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
    """Each is a hundredth of the distance of two weights: rounded to nearest they are all lost."""
    moved = {}
    for stochastic in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.full((24, 40), 1.0, dtype=BF16))
        other = nn.Parameter(torch.randn(8, 8))
        groups = [{"params": [param], "enable_lowrank": enable_lowrank}, {"params": [other]}]
        optimizer = LDAdamW(groups, lr=4e-5, rank=2, betas=(0.0, 0.99), stochastic_rounding=stochastic)
        for _ in range(50):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[stochastic] = (1 - param.detach().float()).mean().item()
    assert moved[False] == 0
    step = 4e-5 * (24**-0.5 if enable_lowrank else 1)  # an element of a direction of 24 equal ones
    assert abs(moved[True] / (50 * step) - 1) < 0.1


def test_the_mathematics_of_adamw_is_in_float32_whatever_is_stored() -> None:
    """With a second moment that bfloat16 cannot move, by 1 in 1,000, only stochastic rounding follows."""
    found = {}
    for stochastic in (False, True):
        param, matrix = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.randn(6, 6))
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


def test_bfloat16_parameters_train_with_everything_narrow() -> None:
    model, optimizer, *_ = built("plain", NARROW, BF16)
    same = [0] * 30
    first, last = advance(model, optimizer, same[:1], dtype=BF16), advance(model, optimizer, same, dtype=BF16)
    assert last < 0.2 * first
    state = optimizer.state[model.up.weight]
    dtypes = {key: tensor.dtype for key, tensor in state.items()}
    assert dtypes == {
        "step": torch.float32,
        **dict.fromkeys(("projector", "exp_avg", "exp_avg_sq"), BF16),
        **dict.fromkeys(("error", "error_scale"), torch.uint8),
    }


# Checkpoints


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


def in_memory(layout: str) -> list[str]:
    """The ways of torch's state dicts by which a run does not go on exactly."""
    wrong = []
    for kind in ("int8", "narrow"):
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


@pytest.mark.parametrize("layout", ["rows", pytest.param("replicas", marks=pytest.mark.slow)])
def test_state_dicts_of_a_mesh_come_back_exactly(layout: str) -> None:
    for wrong in run_ranks(2, in_memory, layout):
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
