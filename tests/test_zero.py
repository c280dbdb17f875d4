"""The real DeepSpeed engine on real gloo ranks: after every step, the weights of one process with the same gradients.

The gradients are read where the optimizer gets them: averaged, clipped, in pieces. One process then steps the model's
own weights with them, so a piece in a wrong place shows, and rounding before the step does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed import once, run_ranks
from torch import Tensor
from zero_runs import MODELS, PARAMS, STEPS, Run, assembled, train

from ldadam_dist import LDAdamW, build_param_groups
from ldadam_dist.rules import state_shapes

pytest.importorskip("deepspeed")

BF16 = torch.bfloat16
FP32_GRADS = {"data_types": {"grad_accum_dtype": "fp32"}}
GATHER = {"communication": "gather"}
CPU = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


def runs(world_size: int) -> list[Run]:
    """Every stage with every model, and each option of the engine somewhere."""
    found = [
        Run("1 odd", "odd", {"stage": 1}),
        Run("2 odd", "odd", {"stage": 2}),
        Run("3 odd", "odd", {"stage": 3}),
        Run("1 llama round robin", "llama", {"stage": 1, "round_robin_gradients": True}),
        Run("2 llama bf16", "llama", {"stage": 2, "round_robin_gradients": True}, dtype=BF16),
        Run("3 llama bf16", "llama", {"stage": 3, "sub_group_size": 500}, dtype=BF16),
        Run("bf16 optimizer llama", "llama", {"stage": 1}, FP32_GRADS, dtype=BF16),
        Run("3 experts", "experts", {"stage": 3}, params={"convolutions": True}),
    ]
    if world_size == 1:
        return [*found, Run("2 offload", "odd", {"stage": 2, **CPU})]
    if world_size == 2:
        plain = {"overlap_comm": False, "contiguous_gradients": False, "reduce_scatter": False}
        found += [
            Run("2 llama plain", "llama", {"stage": 2, **plain}),
            Run("3 llama plain", "llama", {"stage": 3, **plain}),
            Run("1 llama overlap", "llama", {"stage": 1, "overlap_comm": True, "contiguous_gradients": True}),
            Run("2 llama offload", "llama", {"stage": 2, **CPU}),
            Run(
                "3 llama offload", "llama", {"stage": 3, **CPU, "offload_param": {"device": "cpu", "pin_memory": False}}
            ),
            Run("1 odd offload", "odd", {"stage": 1, **CPU}, dtype=BF16),
            Run("2 experts", "experts", {"stage": 2}, params={"convolutions": True}),
            Run("3 odd in init", "odd", {"stage": 3}, in_init=True),
            *(Run(f"{stage} odd fp32 grads", "odd", {"stage": stage}, FP32_GRADS, dtype=BF16) for stage in (2, 3)),
            Run("2 odd autocast", "odd", {"stage": 2}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        ]
    if world_size == 3:
        found += [Run(f"{s} odd aligned", "odd", {"stage": s, "parameter_alignment": True}, dtype=BF16) for s in (1, 2)]
        found += [Run(f"{stage} llama gather", "llama", {"stage": stage}, params=GATHER) for stage in (2, 3)]
    if world_size == 4:
        found += [
            Run("1 experts", "experts", {"stage": 1}, params={"convolutions": True}),
            Run("2 experts left", "experts", {"stage": 2}, params={"proj_type": "left"}),
            Run("3 experts left", "experts", {"stage": 3}, params={"proj_type": "left"}),
            Run("3 experts no error", "experts", {"stage": 3}, params={"error_feedback": False}),
            Run("3 experts svd", "experts", {"stage": 3}, params={"proj_method": "svd"}),
            Run("3 odd in init", "odd", {"stage": 3}, in_init=True),
            Run("2 llama accumulation", "llama", {"stage": 2}, {"gradient_accumulation_steps": 3}),
            Run("3 llama accumulation", "llama", {"stage": 3}, {"gradient_accumulation_steps": 3}, dtype=BF16),
            Run("2 llama overlap", "llama", {"stage": 2, "overlap_comm": True, "contiguous_gradients": True}),
        ]
        found += [
            Run(f"{stage} llama {key}={value}", "llama", {"stage": stage}, params={key: value})
            for stage in (2, 3)
            for key, value in (
                ("communication", "lowrank"),
                ("communication", "gather"),
                ("proj_type", "left"),
                ("proj_type", "right"),
                ("proj_type", "reverse_std"),
            )
        ]
    return found


ON_FOUR = {
    *("3 odd", "1 experts", "2 experts left", "2 llama communication=lowrank", "3 llama communication=gather"),
}
"""What cuts a matrix over four ranks in its own way; options that runs on fewer ranks have too are exhaustive."""


def is_exhaustive(world_size: int, run: Run) -> bool:
    return world_size == 4 and run.name not in ON_FOUR


def train_all(world_size: int, exhaustive: bool) -> dict[str, dict[str, Any]]:
    return {run.name: train(run) for run in runs(world_size) if is_exhaustive(world_size, run) == exhaustive}


@once
def on_ranks(world_size: int, exhaustive: bool) -> list[dict[str, dict[str, Any]]]:
    """What each rank saw in all runs; one set of processes for all."""
    return run_ranks(world_size, train_all, world_size, exhaustive)


def found_of(world_size: int, run: Run) -> list[dict[str, Any]]:
    return [found[run.name] for found in on_ranks(world_size, is_exhaustive(world_size, run))]


def in_one_process(run: Run, grads: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Weights, in float32, before the first and after every step."""
    model = MODELS[run.model][0](run.dtype).float()
    options = {**PARAMS, **run.params}
    convolutions = options.pop("convolutions", False)
    groups = build_param_groups(model, convolutions=convolutions, **PARAMS)
    optimizer = LDAdamW(groups, **options)
    history = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    for grad in grads:
        for name, param in model.named_parameters():
            param.grad = grad[name].clone() if grad else None
        if grad:  # the engine did not skip this step
            optimizer.step()
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return history


CASES = [
    pytest.param(
        *(w, run),
        id=f"{w}-{run}",
        marks=pytest.mark.exhaustive if is_exhaustive(w, run) else [] if w == 2 else pytest.mark.slow,
    )
    for w in (1, 2, 3, 4)
    for run in runs(w)
]


@pytest.mark.parametrize(("world_size", "run"), CASES)
def test_equals_one_process_after_every_step(world_size: int, run: Run) -> None:
    assert_equals_one_process(run, found_of(world_size, run))


def assert_equals_one_process(
    run: Run, ranks: list[dict[str, Any]], within: Callable[[int], float] = lambda step: 1e-5
) -> None:
    shapes = ranks[0]["shapes"]
    grads = [
        assembled([rank["grads"][step] for rank in ranks], shapes) if ranks[0]["grads"][step] else {}
        for step in range(STEPS)
    ]
    assert sum(not grad for grad in grads) == ranks[0]["skipped"]
    expected = in_one_process(run, grads)
    for step, weights in enumerate(expected):
        found = assembled([rank["weights"][step] for rank in ranks], shapes)
        for name, weight in weights.items():
            difference = ((found[name] - weight).abs().max() / weight.abs().max().clamp(min=1e-3)).item()
            assert difference <= within(step), f"step {step}, {name}: {difference:.1e}"
    for rank in ranks:
        for name, weight in rank["model"].items():
            torch.testing.assert_close(weight, found[name].to(run.dtype), rtol=0, atol=0)
    moved = [name for name in expected[0] if not torch.equal(expected[0][name], expected[-1][name])]
    assert len(moved) == len(expected[0])


@pytest.mark.parametrize(("world_size", "run"), CASES)
def test_states_are_partitioned(world_size: int, run: Run) -> None:
    """All ranks together hold each element of a state once, and each rank what `placement` says."""
    ranks = found_of(world_size, run)
    settings = {"rank": 2, "proj_type": "std", "enable_lowrank": True, "flatten": False, **run.params}
    for rank in ranks:
        held = {row.name: row.state_bytes for row in rank["placement"]}
        for name, state in rank["state"].items():
            stored = [tensor for key, tensor in state.items() if key != "step"]
            assert sum(t.numel() * t.element_size() for t in stored) == held.pop(name)
        assert set(held.values()) <= {0}
    for row in ranks[0]["placement"]:
        states = [rank["state"][row.name] for rank in ranks if row.name in rank["state"]]
        low_rank = row.communication != "AdamW"
        flatten = low_rank and len(row.shape) > 2
        group = {**settings, "enable_lowrank": low_rank, "flatten": flatten}
        for key, shape in state_shapes(row.shape, group).items():
            if key in ("step", "error" if run.params.get("error_feedback") is False else ""):
                continue
            assert sum(state[key].numel() for state in states) == torch.Size(shape).numel(), f"{key} of {row.name}"
