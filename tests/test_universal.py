"""Universal checkpoints: what DeepSpeed's own tool makes of a run is taken up at other stages and numbers of ranks."""

from __future__ import annotations

import copy
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import once, run_ranks
from moves import (
    UNIVERSAL,
    Weights,
    changed_weights,
    close,
    go_on,
    loaded_by_engine,
    make_universal,
    other_weights,
    saved_by_engine,
)
from test_flat import flat, optimizer_of
from torch import Tensor
from zero_runs import MODELS, PARAMS, Run, engine_of, quiet_deepspeed, train_step, whole_model

from ldadam_dist import LDAdamW, build_param_groups
from ldadam_dist.packing import Packing, dtypes_of, overlaps, planes_of, read_planes
from ldadam_dist.partitions import FlatParam, FlatPartition
from ldadam_dist.universal import KEY, FlatForm
from ldadam_dist.zero_files import FP32, MOMENTS, RankFolder, UniversalFolder

pytest.importorskip("deepspeed")

BF16 = torch.bfloat16


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("rows", "columns", "rank", "planes"),
    [
        (8, 12, 1, 2),
        (12, 12, 5, 3),  # a rank of more than a third: the factors are more than the matrix
        (6, 6, 5, 4),  # the largest rank there is
    ],
)
def test_every_rank_fits_into_two_tensors(side: Any, rows: int, columns: int, rank: int, planes: int) -> None:
    packing = Packing(rows, columns, rank, side)
    assert packing.planes == planes
    m, n = packing.m, packing.n
    shapes = {"error": (rows, columns), "projector": (m, rank), "exp_avg": (rank, n), "exp_avg_sq": (rank, n)}
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    vector = packing.join(state, torch.float32)
    pair = [torch.zeros(packing.plane, dtype=dtype) for dtype in dtypes_of(planes, torch.float32)]
    for part, plane in zip(vector.split(packing.plane), planes_of(pair[0], pair[1]), strict=True):
        plane[: len(part)] = part
    assert pair[0].is_complex() == (planes > 3)
    again = read_planes(planes_of(pair[0], pair[1]), packing.states_at(*packing.whole))
    for key, tensor in packing.split(again, *packing.whole).items():
        assert torch.equal(tensor, state[key])


def test_no_rank_takes_more_than_four_planes() -> None:
    for rows, columns in itertools.product(range(2, 40), range(2, 40)):
        packing = Packing(rows, columns, min(rows, columns) - 1, "left")
        assert packing.planes <= 4


def test_overlaps_are_told_in_the_order_of_the_vector() -> None:
    assert list(overlaps([(0, 4), (10, 12)], [(2, 3), (3, 11)])) == [(2, 0, 1), (3, 1, 1), (4, 8, 1)]


SHAPES = {"wide": (5, 23), "tall": (31, 4), "square": (9, 9), "stack": (3, 6, 7), "vector": (13,), "short": (3, 40)}
"""On five ranks also matrices of which some have less than a row, or nothing."""


def filled(rank: int, proj_type: str, each: bool, options: dict[str, Any]) -> tuple[LDAdamW, FlatPartition, FlatForm]:
    """An optimizer of flat tensors in which every state is of random numbers."""
    partition = flat(SHAPES, each=each)
    optimizer = optimizer_of(partition, rank=rank, proj_type=proj_type, **options)
    partition.tensor.grad = torch.zeros_like(partition.tensor)
    optimizer.step()
    torch.manual_seed(dist.get_rank())
    for state in optimizer.state[partition.tensor].values():
        for key, tensor in state.items():
            tensor.copy_(torch.full((), 3.0) if key == "step" else torch.randn(tensor.shape))
    assert optimizer._partitions is not None
    return optimizer, partition, FlatForm([partition], optimizer._partitions)


def kinds() -> Iterator[tuple[int, str, bool, dict[str, Any]]]:
    options: list[dict[str, Any]] = [
        {},
        {"error_dtype": "float64"},
        {"error_dtype": "bfloat16"},
        {"error_feedback": False},
    ]
    for rank, proj_type, each in itertools.product((1, 3, 8), ("left", "right"), (True, False)):
        yield rank, proj_type, each, options[rank % len(options)]


def round_trips() -> None:
    """Through the flat tensors of these ranks, and through whole ones."""
    for kind in kinds():
        optimizer, partition, form = filled(*kind)
        names = list(optimizer.state[partition.tensor])
        saved = form.save(optimizer, optimizer.state_dict())
        assert saved["state"][0].keys() == {"exp_avg", "exp_avg_sq"}
        here = form.load(optimizer, saved)["state"][0]
        pieces: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(pieces, saved["state"][0])
        whole = {
            param.name: tuple(joined(partition, param, pieces, key) for key in MOMENTS) for param in partition.params
        }
        about = saved["param_groups"][0]
        ((_, again),) = form.from_files([about], about[KEY], whole.__getitem__)
        assert names == list(here) == list(again)
        for name, state in optimizer.state[partition.tensor].items():
            for other in (here[name], again[name]):
                assert state.keys() == other.keys()
                for key, tensor in state.items():
                    assert torch.equal(tensor, other[key]), f"{key} of {name}"
                    assert tensor.dtype == other[key].dtype


def joined(partition: FlatPartition, param: FlatParam, pieces: list[Any], key: str) -> Tensor:
    """A whole parameter from the flat tensors of all ranks."""
    starts = param.elements.starts
    offsets: list[Any] = [None] * len(pieces)
    dist.all_gather_object(offsets, param.elements.offset)
    runs = zip(pieces, offsets, itertools.pairwise(starts), strict=True)
    return torch.cat([piece[key][at : at + stop - start] for piece, at, (start, stop) in runs])


@pytest.mark.parametrize(
    "ranks",
    [3, pytest.param(5, marks=pytest.mark.slow), *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 2))],
)
def test_states_come_back_to_the_bit_wherever_matrices_are_cut(ranks: int) -> None:
    run_ranks(ranks, round_trips)


LLAMA = {
    "1": Run("1", "llama", {"stage": 1}),
    "1 round robin": Run("1 round robin", "llama", {"stage": 1, "round_robin_gradients": True}),
    "2": Run("2", "llama", {"stage": 2}),
    "3": Run("3", "llama", {"stage": 3, "sub_group_size": 500}),
}
CONVOLUTIONS = {"convolutions": True}
SMALL, LARGE = {**CONVOLUTIONS, "error_dtype": "bfloat16"}, {**CONVOLUTIONS, "rank": 4}
MIXED = {
    f"{stage} mixed {name}": Run(f"{stage} mixed {name}", "mixed", {"stage": stage}, params=params)
    for stage in (1, 2, 3)
    for name, params in (("small", SMALL), ("large", LARGE))
}
ACCUMULATED = {
    f"{stage} accumulated": Run("", "llama", {"stage": stage}, {"gradient_accumulation_steps": 3}) for stage in (2, 3)
}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
OTHERS = {
    "2 offload": Run("", "llama", {"stage": 2, **OFFLOAD}),
    "3 offload": Run("", "llama", {"stage": 3, **OFFLOAD}),
}
HALF = {
    "1 bf16": Run("", "llama", {"stage": 1, "round_robin_gradients": True}, dtype=BF16),
    "3 bf16": Run("", "llama", {"stage": 3}, dtype=BF16),
    "bf16 optimizer": Run("", "llama", {"stage": 1}, {"data_types": {"grad_accum_dtype": "fp32"}}, dtype=BF16),
}
RUNS = {**LLAMA, **MIXED, **ACCUMULATED, **OTHERS, **HALF}

# What is saved on two ranks, and where it is taken up: the run there and its number of ranks.
MOVES: dict[str, list[tuple[str, int]]] = {
    "2": [("2", 1), ("2", 4), ("3", 2)],
    "1 round robin": [("3", 1), ("2 offload", 2)],
    "3": [("1 round robin", 4), ("3 offload", 2)],
    "2 mixed large": [("3 mixed large", 4)],
    "3 mixed large": [("1 mixed large", 1)],
    "3 mixed small": [("2 mixed small", 4)],
    "2 accumulated": [("3 accumulated", 1)],
}
LEGS = [(source, target, ranks) for source, targets in MOVES.items() for target, ranks in targets]


def save_all(root: str) -> dict[str, Weights]:
    found = {name: saved_by_engine(RUNS[name], f"{root}/{name}", universal=True) for name in MOVES}
    for name in HALF:
        with engine_of(RUNS[name]) as (engine, _):
            for step in range(2):
                train_step(RUNS[name], engine, step)
            engine.save_checkpoint(f"{root}/{name}", tag="saved")
        if dist.get_rank() == 0:
            make_universal(f"{root}/{name}")
    return found


def load_all(root: str, ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{source}, {target}": loaded_by_engine(RUNS[target], f"{root}/{source}")
        for source, target, there in LEGS
        if there == ranks
    }
    if ranks == 4:
        for source, target in HALF_MOVES:
            save_again(RUNS[target], f"{root}/{source}", f"again {target}")
    if ranks == 1:
        found["client"] = loaded_by_client(RUNS["3"], f"{root}/2")
    if ranks == 2:
        found["by name"] = loaded_by_name(RUNS["3"])
        found["other rank"] = error_of(RUNS["2"], f"{root}/2", {"rank": 3})
        found["other sub-groups"] = error_of(RUNS["3 offload"], f"{root}/3", {})
    return found


def loaded_by_client(run: Run, folder: str) -> Weights:
    """As `loaded_by_engine`, with an optimizer that the engine was given."""
    integration = quiet_deepspeed()
    model = other_weights(MODELS[run.model][0](run.dtype))
    config = {**run.full_config(), **UNIVERSAL}
    del config["optimizer"]
    optimizer = LDAdamW(build_param_groups(model, **PARAMS), **PARAMS)
    engine, *_ = integration.initialize(model=model, optimizer=optimizer, config=config)
    engine.load_checkpoint(folder)
    weights = go_on(run, engine, model)
    engine.destroy()
    return weights


def loaded_by_name(run: Run) -> bool:
    """Whether a state dict with the states as they are, which is what was saved before, loads as they are."""
    with engine_of(run) as (engine, _):
        train_step(run, engine, 0)
        optimizer, zero = engine.basic_optimizer, engine.optimizer
        zero._set_fp32_optimizer_param_groups()
        before = copy.deepcopy(list(optimizer.state.values()))
        groups = [{k: v for k, v in group.items() if k != KEY} for group in optimizer.state_dict()["param_groups"]]
        zero._clear_fp32_optimizer_param_groups()
        train_step(run, engine, 1)
        zero._set_fp32_optimizer_param_groups()
        optimizer.load_state_dict({"state": dict(enumerate(before)), "param_groups": groups})
        zero._clear_fp32_optimizer_param_groups()
        pairs = zip(before, optimizer.state.values(), strict=True)
        return all(
            torch.equal(tensor, now[name][key])
            for was, now in pairs
            for name, state in was.items()
            for key, tensor in state.items()
        )


def error_of(run: Run, folder: str, params: dict[str, Any]) -> str:
    """That of loading a default checkpoint with other settings."""
    with engine_of(Run("", run.model, run.zero, run.config, {**run.params, **params})) as (engine, _):
        try:
            engine.load_checkpoint(folder, tag="saved")
        except ValueError as error:
            return str(error)
    return "accepted"


HALF_MOVES = [("1 bf16", "3 bf16"), ("3 bf16", "bf16 optimizer"), ("bf16 optimizer", "1 bf16")]


def save_again(run: Run, folder: str, tag: str) -> None:
    """Load a universal checkpoint and save what was loaded, without any step."""
    changed = Run(run.name, run.model, run.zero, {**run.config, **UNIVERSAL}, run.params, run.dtype)
    with changed_weights(), engine_of(changed) as (engine, _):
        engine.load_checkpoint(folder)
        engine.save_checkpoint(folder, tag=tag, save_latest=False)


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    folder = tempfile.mkdtemp()
    yield Path(folder)
    shutil.rmtree(folder)


@once
def saved(root: Path) -> dict[str, Weights]:
    found: dict[str, Weights] = run_ranks(2, save_all, str(root))[0]
    return found


@once
def loaded(root: Path, ranks: int) -> dict[str, Any]:
    saved(root)
    found: dict[str, Any] = run_ranks(ranks, load_all, str(root), ranks)[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target", "ranks"), LEGS, ids=lambda value: str(value))
def test_a_run_goes_on_elsewhere(source: str, target: str, ranks: int, root: Path) -> None:
    close(loaded(root, ranks)[f"{source}, {target}"], saved(root)[source])


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), HALF_MOVES)
def test_what_is_loaded_is_what_was_saved(source: str, target: str, root: Path) -> None:
    """Master weights, states and steps, to the bit, where training in bf16 rounds by the number of ranks."""
    loaded(root, 4)
    before, after = UniversalFolder(root / source / "universal"), RankFolder(root / source / f"again {target}")
    assert before.params == after.params
    assert {step for about in before.params.values() for step in about["steps"]} == {2}
    for was, now in zip(before.groups, after.groups, strict=True):
        assert was == {key: now[key] for key in was}
    for name in before.params:
        for key in (FP32, *MOMENTS):
            assert torch.equal(before.tensor(name, key), after.tensor(name, key)), f"{key} of {name}"


@pytest.mark.slow
def test_an_optimizer_that_the_engine_was_given_is_loaded(root: Path) -> None:
    close(loaded(root, 1)["client"], saved(root)["2"])


@pytest.mark.slow
def test_states_that_were_saved_by_name_still_load(root: Path) -> None:
    assert loaded(root, 2)["by name"]


@pytest.mark.slow
def test_a_default_checkpoint_of_other_settings_is_refused(root: Path) -> None:
    assert "was saved with rank=2, this optimizer has rank=3" in loaded(root, 2)["other rank"]
    assert "doesn't match the size" in loaded(root, 2)["other sub-groups"]


REFUSED = {
    "rank": ("2", {"rank": 3}, r"was saved with rank=2, this optimizer has rank=3"),
    "proj_type": ("3", {"proj_type": "left"}, r"was saved with proj_type='std', this optimizer has proj_type='left'"),
    "model": ("2 mixed small", {}, r"has states of lm_head.weight \(21 such parameters\)"),
    "not universal": ("2", {}, r"is no universal checkpoint.*ds_to_universal"),
    "missing": ("3", {}, r"q_proj.weight/exp_avg.pt is missing"),
    "schedule": ("2", {}, r"load_lr_scheduler_states=False"),
}
SCHEDULE = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}}


def refusals(root: str) -> dict[str, Any]:
    found = {}
    for what, (name, params, _) in REFUSED.items():
        run = RUNS[name]
        config = {**run.config, **UNIVERSAL, **(SCHEDULE if what == "schedule" else {})}
        folder, tag = f"{root}/2", "universal"
        if what == "not universal":
            tag = "saved"
        if what == "missing":
            tag = "missing"
            shutil.copytree(f"{root}/2/universal", f"{root}/2/missing", dirs_exist_ok=True)
            (Path(folder) / "missing/zero/model.layers.0.self_attn.q_proj.weight/exp_avg.pt").unlink()
        if what == "schedule":
            tag = "schedule"
            shutil.copytree(f"{root}/2/universal", f"{root}/2/schedule", dirs_exist_ok=True)
            for path in (Path(folder) / "schedule").glob("*model_states.pt"):
                state = torch.load(path, weights_only=False)
                del state["lr_scheduler"]
                torch.save(state, path)
        with engine_of(Run("", run.model, run.zero, config, {**run.params, **params})) as (engine, model):
            before = whole_model(engine, model)
            try:
                engine.load_checkpoint(folder, tag=tag)
                error = "accepted"
            except ValueError as raised:
                error = str(raised)
            after = whole_model(engine, model)
            found[what] = error, all(torch.equal(weight, after[name]) for name, weight in before.items())
    return found


@once
def refused(root: Path) -> dict[str, Any]:
    saved(root)
    (found,) = run_ranks(1, refusals, str(root))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(what: str, root: Path) -> None:
    error, unchanged = refused(root)[what]
    assert re.search(REFUSED[what][2], error), error
    assert unchanged
