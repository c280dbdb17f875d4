"""DeepSpeed's safe_get_* and safe_set_* beside LDAdamW: master weights may be set, states are refused on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_ranks
from zero_runs import Run, engine_of, quiet_deepspeed, train_step

pytest.importorskip("deepspeed")

STAGES = (1, 3)


def accessed() -> dict[Any, Any]:
    """How far weights are from those set before the first forward and before the first step, and errors."""
    quiet_deepspeed()
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param

    found: dict[Any, Any] = {}
    for stage in STAGES:
        run = Run(str(stage), "odd", {"stage": stage})
        with engine_of(run) as (engine, model):
            # DeepSpeed's own setter of ZeRO-3 fails where the ranks cannot have equally many elements
            chosen = [p for p in model.parameters() if stage < 3 or p.ds_numel % 2 == 0]
            for param in chosen:
                safe_set_full_fp32_param(param, torch.full(getattr(param, "ds_shape", param.shape), 0.5))
            for step in range(2):
                train_step(run, engine, step)
            weights = [safe_get_full_fp32_param(param) for param in chosen]
            found[stage] = max(float((weight - 0.5).abs().max()) for weight in weights), []
            for param in model.parameters():  # each lies on both ranks, or on one of them alone
                try:
                    safe_get_full_optimizer_state(param, "exp_avg")
                except RuntimeError as error:
                    found[stage][1].append(str(error))
            found[stage] += (len(list(model.parameters())),)
        if stage < 3:
            with engine_of(run) as (engine, model):
                next(iter(model.parameters())).data.fill_(0.5)  # of the engine's weights: the step would undo it
                try:
                    train_step(run, engine, 0)
                except RuntimeError as error:
                    found["weights changed"] = str(error)
    return found


def test_master_weights_may_be_set_and_states_are_refused_on_all_ranks() -> None:
    for rank in run_ranks(2, accessed):
        for stage in STAGES:
            distance, errors, count = rank[stage]
            assert 0 < distance < 0.1
            assert len(errors) == count
            assert all("asked for the optimizer state 'exp_avg'" in error for error in errors)
        assert "are not the engine's weights" in rank["weights changed"]
