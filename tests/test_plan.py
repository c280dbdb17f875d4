"""ldadam-dist plan: its numbers are those of the optimizer itself, stepped on each rank of a fake process group."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from benchmarks.zero_memory import state_bytes
from ldadam_dist import LDAdamW, Traffic, build_param_groups
from ldadam_dist.cli.estimate import Run, Settings, planning
from ldadam_dist.cli.layouts import Layout, parse_layout, spread, world_of
from ldadam_dist.cli.report import Plan
from ldadam_dist.cli.transformers import build_model

MODELS = Path(__file__).parent.parent / "configs" / "models"

# Heads share keys and values (32 rows), 200 inner features divide by 8 ranks and not by 64, the vocabulary by none.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 333,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
STORED: list[dict[str, Any]] = [
    {},
    {"error_dtype": "int4"},
    {"error_dtype": "int8", "state_dtype": "bfloat16"},
    {"error_feedback": False},
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


exchanged: list[int] = []
"""Elements that were handed to `exchange_nothing`, without the one that goes from here to here."""


def exchange_nothing(received: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> None:
    """In place of `all_to_all_single`: the fake group's refuses a rank that receives and has nothing to send."""
    exchanged.append(sent.numel() - 1)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nbytes(tensors: Any) -> int:
    found = [local(t) for t in tree_leaves(tensors) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in found)


def states(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of what lies in the state, without `step`: of all but the error, and of the error."""
    kept = [{key: t for key, t in state.items() if key != "step"} for state in optimizer.state.values()]
    error = nbytes([[t for key, t in state.items() if key.startswith("error")] for state in kept])
    return nbytes(kept) - error, error


def build_real(path: Path, dtype: torch.dtype) -> nn.Module:
    model = build_model(path, dtype)
    return model.to_empty(device="cpu") if not any(isinstance(p, DTensor) for p in model.parameters()) else model


def stepped(path: Path, layout: Layout, dtype: torch.dtype, settings: Settings, rank: int) -> tuple[Any, ...]:
    """(weights, gradients, states, error, bytes sent) on one rank of the layout, after two real steps."""
    with world_of(layout.ranks, rank):
        model = build_real(path, dtype)
        for param in model.parameters():
            nn.init.normal_(param)
        replicas = spread(model, layout)
        groups = build_param_groups(model, rank=settings.rank)
        optimizer = LDAdamW(groups, rank=settings.rank, **settings.options, **replicas)
        for _ in range(2):  # the first finds projectors
            for param in model.parameters():
                param.grad = torch.full_like(param, 1e-3)
            exchanged.clear()
            with Traffic() as traffic:
                optimizer.step()
        grads = nbytes([param.grad for param in model.parameters()])
        sent = sum(record.bytes for record in traffic.records if record.dtype.is_floating_point)
        return nbytes(list(model.parameters())), grads, *states(optimizer), sent + 4 * sum(exchanged)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_to_all_single", exchange_nothing)


LAYOUTS = ["one", "fsdp2 2", "fsdp2 8", "fsdp2 64", "ddp 8", "hsdp replicate=2,shard=4"]
OWN = ["ddp 8 lowrank", "hsdp replicate=2,shard=4 lowrank"]


def layout_of(text: str) -> Layout:
    """From "sharding [ranks or mesh [gradient_sync]]"."""
    sharding, size, sync = (*text.split(), "", "")[:3]
    return parse_layout(
        sharding, int(size) if size.isdecimal() else None, size if "=" in size else None, sync or "full"
    )


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("text", [*LAYOUTS, *OWN])
def test_memory_is_that_of_the_fullest_rank(text: str, dtype: torch.dtype, config: Path) -> None:
    layout = layout_of(text)
    for options in STORED if dtype == torch.bfloat16 or layout.ranks == 8 else STORED[:1]:
        settings = Settings(rank=8, options=options)
        with planning(partial(build_model, config), layout, dtype) as run:
            planned, _, fullest = run.ldadamw(settings)
        weights, grads, kept, error, _ = stepped(config, layout, dtype, settings, fullest)
        assert (planned.weights, planned.gradients) == (weights, grads)
        assert (planned.states, planned.error) == (kept, error), options


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("text", ["fsdp2 2", "fsdp2 8", "ddp 8"])
def test_no_rank_holds_more_than_the_one_that_is_shown(text: str, config: Path) -> None:
    layout, settings = layout_of(text), Settings(rank=8)
    with planning(partial(build_model, config), layout, torch.float32) as run:
        planned = run.ldadamw(settings)[0]
    held = [sum(stepped(config, layout, torch.float32, settings, rank)[2:4]) for rank in range(layout.ranks)]
    assert max(held) == planned.states + planned.error


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("text", ["fsdp2 8", "ddp 8", "hsdp replicate=2,shard=4", *OWN])
def test_bytes_on_the_wire_are_those_of_a_step(text: str, config: Path) -> None:
    """On average over the ranks. The vocabulary's 333 rows are cut unevenly, and AdamW's gradients of them averaged."""
    layout, settings = layout_of(text), Settings(rank=8, options={"communication": "lowrank"})
    with planning(partial(build_model, config), layout, torch.float32) as run:
        planned = sum(row.wire_bytes for row in run.ldadamw(settings)[1])
    sent = [stepped(config, layout, torch.float32, settings, rank)[-1] for rank in range(layout.ranks)]
    assert math.isclose(planned, sum(sent) / len(sent), rel_tol=3e-3)


def test_gradients_in_the_error_take_no_memory(config: Path) -> None:
    with planning(partial(build_model, config), layout_of("fsdp2 8"), torch.float32) as run:
        apart = run.ldadamw(Settings(rank=8))[0]
        together = run.ldadamw(Settings(rank=8, options={"error_in_grad": True}))[0]
    assert apart.gradients - together.gradients == apart.error > 0


def test_adamw_and_muon_are_what_torch_keeps(config: Path) -> None:
    layout = layout_of("fsdp2 8")
    with planning(partial(build_model, config), layout, torch.float32) as run:
        memory = run.others()
    with world_of(8):
        model = build_real(config, torch.float32)
        spread(model, layout)
        names = dict(model.named_parameters())
        matrices = [p for name, p in names.items() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
        others = [p for p in names.values() if all(p is not m for m in matrices)]
        for param in names.values():
            param.grad = torch.zeros_like(param)
        adamw = torch.optim.AdamW(model.parameters())
        adamw.step()
        assert states(adamw)[0] == memory["AdamW"].states
        rest = torch.optim.AdamW(others)
        rest.step()
        momentum = nbytes(matrices)  # torch's Muon keeps one buffer like each parameter
        assert states(rest)[0] + momentum == memory["Muon"].states


def test_eight_bit_states_are_counted_in_blocks() -> None:
    """Two bytes an element and a float32 for each begun block of 256; small tensors and embeddings in float32."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.wide, self.norm = nn.Embedding(300, 64), nn.Linear(64, 65, bias=False), nn.LayerNorm(64)

    with torch.device("meta"):
        net = Net()
    with world_of(1) as everyone:
        run = Run("net", net, Layout("one"), torch.float32, torch.float32, everyone)
        expected = 8 * 300 * 64 + 2 * (64 * 65 + 4 * 17) + 8 * 2 * 64  # 4160 elements are 16.25 blocks
        assert run.others()["8-bit Adam"].states == expected


@pytest.mark.parametrize("text", ["fsdp2 8", "zero2 8"])
def test_the_largest_rank_fits_and_the_next_does_not(text: str, config: Path) -> None:
    with planning(partial(build_model, config), layout_of(text), torch.bfloat16) as run:
        sizes = {rank: run.total(Settings(rank)) for rank in range(1, 96)}
        for rank in (1, 17, 31, 63):
            assert run.largest_rank(Settings(), sizes[rank]) == max(
                r for r, size in sizes.items() if size <= sizes[rank]
            )
        assert run.largest_rank(Settings(), 1000) == 0


SEVENTY_B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize("billions", [7, 70])
def test_large_models_are_planned_without_weights(billions: int, tmp_path: Path) -> None:
    path = MODELS / "llama_7b.json"
    if billions == 70:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(SEVENTY_B))
    with planning(partial(build_model, path), layout_of("fsdp2 64"), torch.bfloat16) as run:
        assert all(param.is_meta for param in run.model.parameters())
        assert round(run.elements / 1e9) in (7, 71)
        plan = Plan.of(run, Settings(rank=512, options={"error_dtype": "int4"}), 80 * 2**30)
    assert plan.memory["LDAdamW"].states + plan.memory["LDAdamW"].error < plan.memory["AdamW"].states
    assert plan.largest_rank
    json.dumps(plan.as_dict())


def measured_under_zero(stages: list[int], options: dict[str, Any]) -> list[int]:
    import deepspeed.ops

    import ldadam_dist.integrations.deepspeed  # noqa: F401  LDAdamW by name

    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that takes minutes to compile
    return [state_bytes("llama_9m", stage, {"type": "LDAdamW", "params": options}) for stage in stages]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"rank": 16}, {"rank": 16, "error_dtype": "int8"}], ids=str)
def test_memory_under_zero_is_that_of_a_real_engine(options: dict[str, Any]) -> None:
    pytest.importorskip("deepspeed")
    stages = [1, 2, 3]
    found = run_ranks(2, measured_under_zero, stages, options)[0]
    stored = {key: value for key, value in options.items() if key != "rank"}
    for stage, held in zip(stages, found, strict=True):
        path = MODELS / "llama_9m.json"
        with planning(partial(build_model, path), layout_of(f"zero{stage} 2"), torch.bfloat16) as run:
            planned = run.ldadamw(Settings(rank=options["rank"], options=stored))[0]
        assert planned.states + planned.error == held, f"stage {stage}"
