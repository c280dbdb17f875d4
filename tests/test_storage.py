"""How states are stored: errors of 8 and 4 bits, narrow moments and stochastic rounding, in the optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import once, run_ranks
from reference import Reference
from test_checkpoints import whole
from test_sharded import shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from ldadam_dist import LDAdamW, describe
from ldadam_dist.quantized import FORMATS
from ldadam_dist.tables import format_bytes

BF16, STEPS, MESH_STEPS = torch.bfloat16, 20, 6
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


@pytest.mark.parametrize("shape", [(12, 40), (64, 32), (12, 64), (33, 31)])  # blocks that are full, and that are not
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
            advance(model, optimizer, range(step, step + 1), parts, part)
            history.append(seen(model, optimizer))
        rows = optimizer.placement()
        assert bytes_here(optimizer) == [row.state_bytes for row in rows]
        found[layout, kind] = history, [row.state_bytes for row in rows], [row.total_bytes for row in rows]
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


@pytest.mark.parametrize(("ranks", "layout", "kind"), on_meshes(*LAYOUTS))
def test_every_cut_gives_the_numbers_of_one_process(ranks: int, layout: str, kind: str) -> None:
    """Replicas cut columns inside of blocks where rows are projected; random bits go by the place: every step."""
    history, *_ = on_ranks(ranks)[0][layout, kind]
    for step, (found, expected) in enumerate(zip(history, alone(kind)[0], strict=True)):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10, msg=f"step {step}, {name}")


CUTS = [(Replicate(), Shard(1)), (Shard(1), Replicate()), (Shard(1), Shard(1)), (Shard(0), Shard(1))]
CUT_KINDS = [*((placements, "int8") for placements in CUTS), *((placements, "narrow") for placements in CUTS[2:])]
CUT_SHAPES = [(9, 70), (70, 45), (5, 130), (2, 9, 70)]


def train_cut(placements: tuple[Placement, ...] | None, kind: str) -> list[Tensor]:
    """Weights and errors after four steps of given gradients; after two the run goes on from its state dict."""
    generator = torch.Generator().manual_seed(0)

    def placed(shape: tuple[int, ...]) -> Tensor:
        tensor = torch.randn(shape, dtype=torch.float64, generator=generator)
        if placements is None:
            return tensor
        moved = [Shard(p.dim + len(shape) - 2) if isinstance(p, Shard) else p for p in placements]
        return distribute_tensor(tensor, init_device_mesh("cpu", (2, 2)), moved)

    params = [nn.Parameter(placed(shape)) for shape in CUT_SHAPES]
    optimizer = LDAdamW(params, **options(KINDS[kind]))
    for step in range(4):
        for param in params:
            param.grad = placed(param.shape)
        optimizer.step()
        if step == 1:
            saved = optimizer.state_dict()
            optimizer = LDAdamW(params, **options(KINDS[kind]))
            optimizer.load_state_dict(saved)
    assert bytes_here(optimizer) == [row.state_bytes for row in optimizer.placement()]
    errors = [state["error"] for state in optimizer.state_dict()["state"].values()]
    return [whole(tensor.detach()) for tensor in (*params, *errors)]


def train_cuts() -> list[list[Tensor]]:
    return [train_cut(placements, kind) for placements, kind in CUT_KINDS]


def test_columns_cut_inside_blocks_give_the_numbers_of_one_process() -> None:
    """Through a state dict too, which has no scales."""
    expected = [train_cut(None, kind) for _, kind in CUT_KINDS]
    for found in run_ranks(4, train_cuts):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("ranks", "layout", "kind"), on_meshes(*LAYOUTS))
def test_all_ranks_together_hold_what_placement_says(ranks: int, layout: str, kind: str) -> None:
    everyone = [rank[layout, kind] for rank in on_ranks(ranks)]
    for number, param in enumerate(Net().parameters()):
        if param.ndim == 2 or layout == "rows":  # moments of vectors are whole on each replica
            assert {total[number] for _, _, total in everyone} == {sum(here[number] for _, here, _ in everyone)}


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
