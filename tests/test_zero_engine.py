"""What the DeepSpeed engine does around a step: ways in, refusals, accumulation, overflow, schedules, checkpoints."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import once, run_ranks
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from zero_runs import MODELS, PARAMS, Run, engine_of, quiet_deepspeed, train_step, whole_model

from ldadam_dist import LDAdamW, build_param_groups

pytest.importorskip("deepspeed")

BF16 = torch.bfloat16
STAGES = {
    "1": Run("1", "llama", {"stage": 1}),
    "2": Run("2", "llama", {"stage": 2}),
    "3": Run("3", "llama", {"stage": 3, "sub_group_size": 500}),
    "1 bf16": Run("1 bf16", "llama", {"stage": 1}, dtype=BF16),
    "2 bf16": Run("2 bf16", "llama", {"stage": 2}, dtype=BF16),
    "3 bf16": Run("3 bf16", "llama", {"stage": 3}, dtype=BF16),
    "bf16 optimizer": Run(
        "bf16 optimizer", "llama", {"stage": 1}, {"data_types": {"grad_accum_dtype": "fp32"}}, dtype=BF16
    ),
}
UNCLIPPED = {
    "2, too large": Run("", "llama", {"stage": 2}, {"gradient_clipping": 0.0}),
    "3, too large": Run("", "llama", {"stage": 3, "sub_group_size": 500}, {"gradient_clipping": 0.0}),
    "2 bf16, unchecked": Run(
        "",
        "llama",
        {"stage": 2},
        {"gradient_clipping": 0.0, "bf16": {"enabled": True, "check_grad_overflow": False}},
        dtype=BF16,
    ),
}
"""Gradients of 1e16 are finite, but too large to be squared; DeepSpeed steps them."""
Weights = dict[str, Tensor]


def client(model: nn.Module) -> LDAdamW:
    return LDAdamW(build_param_groups(model, **PARAMS), **PARAMS)


def trained(run: Run, initialize: Callable[[nn.Module, dict[str, Any]], Any], steps: int = 3) -> Weights:
    model = MODELS[run.model][0](run.dtype)
    engine = initialize(model, run.full_config())
    for step in range(steps):
        train_step(run, engine, step)
    weights = whole_model(engine, model)
    engine.destroy()
    return weights


def ways_in(stage: str) -> dict[str, Weights]:
    """The weights after three steps, for each way to give the engine an LDAdamW."""
    integration = quiet_deepspeed()
    import deepspeed

    run = STAGES[stage]

    def without_optimizer(config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "optimizer"}

    def attached(model: nn.Module, config: dict[str, Any]) -> Any:
        optimizer = client(model)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=without_optimizer(config))[0]
        assert integration.attach(engine) is optimizer
        integration.attach(engine)  # no harm
        return engine

    def callable_of(model: nn.Module, config: dict[str, Any]) -> Any:
        made = lambda _: client(model)  # noqa: E731
        return integration.initialize(model=model, optimizer=made, config=without_optimizer(config))[0]

    def own_groups(model: nn.Module, config: dict[str, Any]) -> Any:
        groups = build_param_groups(model, **PARAMS)
        return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]

    def bare_groups(model: nn.Module, config: dict[str, Any]) -> Any:
        params = list(model.parameters())
        decayed = {"params": [p for p in params if p.ndim > 1]}
        rest = {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}
        return deepspeed.initialize(model=model, model_parameters=[decayed, rest], config=config)[0]

    ways: dict[str, Callable[[nn.Module, dict[str, Any]], Any]] = {
        "json": lambda model, config: deepspeed.initialize(model=model, config=config)[0],
        "json, parameters": lambda model, config: deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )[0],
        "json, own groups": own_groups,
        "json, bare groups": bare_groups,
        "initialize, json": lambda model, config: integration.initialize(model=model, config=config)[0],
        "initialize, instance": lambda model, config: integration.initialize(
            model=model, optimizer=client(model), config=without_optimizer(config)
        )[0],
        "initialize, callable": callable_of,
        "attach": attached,
    }
    return {name: trained(run, way) for name, way in ways.items()}


@pytest.mark.parametrize("stage", ["2", pytest.param("3", marks=pytest.mark.slow)])
def test_all_ways_in_do_the_same(stage: str) -> None:
    for found in run_ranks(2, ways_in, stage):
        expected = found.pop("json")
        for way, weights in found.items():
            for name, weight in weights.items():
                assert torch.equal(weight, expected[name]), f"{way}: {name}"


def semantics() -> dict[str, Any]:
    """Everything else that two ranks are needed for, in one set of processes."""
    found: dict[str, Any] = {"unattached": unattached(), "misplaced": misplaced(), "schedules": schedules()}
    found["overflow"] = {stage: overflow(run, torch.inf) for stage, run in STAGES.items()}
    found["overflow"] |= {name: overflow(run, 1e16) for name, run in UNCLIPPED.items()}
    found["resumed"] = {stage: resumed(run) for stage, run in STAGES.items()}
    found["accumulated"] = {
        parts: trained(Run("", "llama", {"stage": stage}, {"gradient_accumulation_steps": count}), engine_from_json)
        for parts, stage, count in (("2, 1", 2, 1), ("2, 3", 2, 3), ("3, 1", 3, 1), ("3, 3", 3, 3))
    }
    return found


@once
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, semantics)


def engine_from_json(model: nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed

    return deepspeed.initialize(model=model, config=config)[0]


def unattached() -> str:
    """The error of an engine with a client optimizer that nobody attached."""
    quiet_deepspeed()
    import deepspeed

    run = STAGES["2"]
    model = MODELS["llama"][0](run.dtype)
    config = run.full_config()
    del config["optimizer"]
    engine = deepspeed.initialize(model=model, optimizer=client(model), config=config)[0]
    try:
        train_step(run, engine, 0)
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def test_a_step_without_attachment_says_which_call_is_missing() -> None:
    for found in two_ranks():
        assert "ldadam_dist.integrations.deepspeed.attach(engine)" in found["unattached"]


def misplaced() -> dict[str, str]:
    """The errors of engines that have a parameter elsewhere on rank 1 than is known."""
    integration, errors = quiet_deepspeed(), {}
    for stage in ("2", "3", "bf16 optimizer"):
        with engine_of(STAGES[stage]) as (engine, _):
            zero = engine.optimizer
            if stage == "2" and dist.get_rank() == 1:
                zero.round_robin_bit16_offsets[0][-1] -= 1
            elif stage == "3" and dist.get_rank() == 1:
                next(iter(zero.grad_position.values()))[1] += 1
            elif dist.get_rank() == 1:
                zero.bf16_groups[0].reverse()
            try:
                integration.attach(engine)
            except RuntimeError as error:
                errors[stage] = str(error)
    return errors


def test_parameters_elsewhere_than_expected_are_found_at_attach() -> None:
    zero, one = (found["misplaced"] for found in two_ranks())
    assert zero.keys() == one.keys() == {"2", "3", "bf16 optimizer"}
    for errors, which in ((zero, "on another rank"), (one, "of parameter model")):
        assert all(f"the master weights {which}" in error and "0.19.8" in error for error in errors.values()), errors


def overflow(run: Run, value: float) -> dict[str, Any]:
    """States and weights around a step in which one rank's gradient of a parameter is that large; then a good step."""
    with engine_of(run) as (engine, model):
        train_step(run, engine, 0)
        optimizer = engine.basic_optimizer
        before = snapshot(engine, model)
        # ZeRO-1 and 2 step the embedding's group after that of the matrices, and before that of the norms.
        poison = model.get_parameter(
            "model.embed_tokens.weight" if value == torch.inf else "model.layers.0.mlp.up_proj.weight"
        )
        handle = poison.register_hook(lambda grad: grad + value if dist.get_rank() == 1 else grad)
        train_step(run, engine, 1)
        handle.remove()
        after, skipped = snapshot(engine, model), engine.skipped_steps + optimizer.skipped_steps
        train_step(run, engine, 2)
        return {"before": before, "after": after, "skipped": skipped, "then": snapshot(engine, model)}


def snapshot(engine: Any, model: nn.Module) -> Weights:
    found = whole_model(engine, model)
    for flat in engine.basic_optimizer.state.values():
        found |= {f"{key} of {name}": t.clone() for name, state in flat.items() for key, t in state.items()}
    return found


@pytest.mark.parametrize("stage", [*STAGES, *UNCLIPPED])
def test_an_overflow_changes_nothing(stage: str) -> None:
    for rank in two_ranks():
        found = rank["overflow"][stage]
        assert found["skipped"] == 1
        assert found["before"].keys() == found["after"].keys()
        for name, tensor in found["before"].items():
            assert torch.equal(tensor, found["after"][name]), name
        assert not torch.equal(found["then"]["lm_head.weight"], found["after"]["lm_head.weight"])
        assert all(tensor.isfinite().all() for tensor in found["then"].values())


def schedules() -> dict[str, tuple[list[float], list[float]]]:
    """The learning rates that the engine tells and the optimizer sees, by a schedule of DeepSpeed and one of torch."""
    run = STAGES["2"]
    ds = Run(
        "",
        "llama",
        {"stage": 2},
        {
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1, "warmup_num_steps": 4, "warmup_type": "linear"},
            }
        },
    )

    def watched(engine: Any) -> tuple[list[float], list[float]]:
        told, seen = [], list[float]()
        engine.basic_optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
        for step in range(3):
            told.append(engine.get_lr()[0])
            train_step(run, engine, step)
        return told, seen[:: len(seen) // 3]  # ZeRO steps group by group

    with engine_of(ds) as (engine, _):
        found = {"deepspeed": watched(engine)}
    with engine_of(run, lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda t: 0.5**t)) as (engine, _):
        found["torch"] = watched(engine)
    return found


def test_learning_rate_schedules_reach_the_optimizer() -> None:
    for found in two_ranks():
        assert found["schedules"]["torch"] == ([1e-2, 5e-3, 2.5e-3], [1e-2, 5e-3, 2.5e-3])
        told, seen = found["schedules"]["deepspeed"]
        assert told == seen
        assert 0 == told[0] < told[-1]


def resumed(run: Run) -> tuple[Weights, Weights]:
    """Weights and states after four steps, and after two, a checkpoint and two more in another engine."""
    folder: list[str | None] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    with engine_of(run) as (engine, model):
        for step in range(4):
            if step == 2:
                engine.save_checkpoint(folder[0], tag="two")
            train_step(run, engine, step)
        through = snapshot(engine, model)
    with engine_of(run) as (engine, model):
        train_step(run, engine, 7)  # what is there is replaced
        engine.load_checkpoint(folder[0], tag="two")
        for step in (2, 3):
            train_step(run, engine, step)
        again = snapshot(engine, model)
    with engine_of(run) as (engine, model):
        engine.load_checkpoint(folder[0], tag="two")  # before anything else
        for step in (2, 3):
            train_step(run, engine, step)
        fresh = snapshot(engine, model)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(Path(str(folder[0])))
    assert again.keys() == fresh.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in fresh.items())
    return through, again


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_resumes_exactly(stage: str) -> None:
    for rank in two_ranks():
        through, again = rank["resumed"][stage]
        assert through.keys() == again.keys()
        for name, tensor in through.items():
            assert torch.equal(tensor, again[name]), name
            assert tensor.dtype == again[name].dtype


@pytest.mark.parametrize("stage", [2, 3])
def test_micro_batches_give_the_same_update(stage: int) -> None:
    for found in two_ranks():
        at_once, in_parts = (found["accumulated"][f"{stage}, {count}"] for count in (1, 3))
        for name, weight in at_once.items():
            torch.testing.assert_close(in_parts[name], weight, rtol=0, atol=1e-4 * weight.abs().max().item())


CPU = {"device": "cpu", "pin_memory": False}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    r"ZeRO is off \(stage 0\)": ({"stage": 0}, {}),
    "elastic_checkpoint": ({"stage": 1, "elastic_checkpoint": True}, {}),
    "NVMe": ({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, {}),
    r"ratio=0\.5": ({"stage": 3, "offload_optimizer": {**CPU, "ratio": 0.5}}, {}),
    "super_offload": ({"stage": 3, "offload_optimizer": {**CPU, "super_offload": True}}, {}),
    "torch_autocast with float16": ({"stage": 2}, {"torch_autocast": {"enabled": True, "dtype": "float16"}}),
    "deepcompile": ({"stage": 3}, {"compile": {"deepcompile": True}}),
    "compute_grad_norm": ({"stage": 2, "compute_grad_norm": False}, {"gradient_clipping": 0.0}),
    "zenflow": ({"stage": 2, "zenflow": {"topk_ratio": 0.1, "update_interval": 2}}, {}),
}


def refusals() -> dict[str, str]:
    quiet_deepspeed()
    import deepspeed
    from deepspeed.pipe import PipelineModule

    def error_of(model: nn.Module, config: dict[str, Any], **arguments: Any) -> str:
        try:
            deepspeed.initialize(model=model, config=config, **arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    found = {
        what: error_of(MODELS["odd"][0](torch.float32), Run("", "odd", zero, config).full_config())
        for what, (zero, config) in REFUSED.items()
    }
    pipeline = PipelineModule([nn.Linear(8, 8), nn.Linear(8, 8)], num_stages=1, loss_fn=nn.functional.mse_loss)
    found["PipelineModule"] = error_of(pipeline, Run("", "odd", {"stage": 1}).full_config())
    wrong = {"type": "LDAdamW", "params": {**PARAMS, "rnk": 3}}
    found["unknown key 'rnk'; did you mean 'rank'"] = error_of(
        MODELS["odd"][0](torch.float32), {**Run("", "odd", {"stage": 2}).full_config(), "optimizer": wrong}
    )
    return found


@once
def refused() -> dict[str, str]:
    (found,) = run_ranks(1, refusals)
    return found


@pytest.mark.parametrize("what", [*REFUSED, "PipelineModule", "unknown key 'rnk'; did you mean 'rank'"])
def test_what_is_not_supported_is_refused(what: str) -> None:
    found = refused()[what]
    assert re.search(what, found), found
    assert "ValueError" in found
