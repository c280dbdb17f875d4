"""DeepSpeed's safe_get_* and safe_set_* beside LDAdamW: master weights may be set, states are gathered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_ranks
from zero_runs import Run, engine_of, quiet_deepspeed, train_step

pytest.importorskip("deepspeed")

STAGES = (1, 3)


def accessed() -> dict[Any, Any]:
    """How far weights are from those set before the first forward and before the first step; states, and errors."""
    quiet_deepspeed()
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

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
            found[stage] = max(float((weight - 0.5).abs().max()) for weight in weights), [], {}
            for name, param in model.named_parameters():  # each lies on both ranks, or on one of them alone
                shape = tuple(getattr(param, "ds_shape", param.shape))
                names = ("exp_avg", "exp_avg_sq", "step", "projector", "error")
                states: dict[str, Any] = {"refused": []}
                for key in names:
                    try:
                        states[key] = safe_get_full_optimizer_state(param, key)
                    except RuntimeError as error:
                        states["refused"].append((key, str(error)))
                found[stage][2][name] = shape, states
                try:
                    safe_set_full_optimizer_state(param, torch.zeros(shape), "exp_avg")
                except RuntimeError as error:
                    found[stage][1].append(str(error))
        if stage < 3:
            with engine_of(run) as (engine, model):
                next(iter(model.parameters())).data.fill_(0.5)  # of the engine's weights: the step would undo it
                try:
                    train_step(run, engine, 0)
                except RuntimeError as error:
                    found["weights changed"] = str(error)
    return found


def test_master_weights_may_be_set_and_states_are_gathered() -> None:
    for rank in run_ranks(2, accessed):
        for stage in STAGES:
            distance, errors, states = rank[stage]
            assert 0 < distance < 0.1
            assert len(errors) == len(states)
            assert all("asked to set the optimizer state 'exp_avg'" in error for error in errors)
            assert any("projector" in found and (found["step"] == 2).all() for _, found in states.values())
            for shape, found in states.values():
                check(shape, found)
        assert "are not the engine's weights" in rank["weights changed"]


def check(shape: tuple[int, ...], found: dict[str, Any]) -> None:
    """States of two steps, with the shapes of one process."""
    assert [key for key, _ in found["refused"]] == ([] if "projector" in found else ["projector", "error"])
    assert all("LDAdamW has step, exp_avg, exp_avg_sq of it" in said for _, said in found["refused"])
    if "projector" not in found:
        assert found["exp_avg"].shape == found["exp_avg_sq"].shape == shape
        return
    m, r = found["projector"].shape[-2:]
    n = shape[0] * shape[-1] // m if len(shape) == 2 else found["exp_avg"].shape[-1]
    assert found["exp_avg"].shape[-2:] == found["exp_avg_sq"].shape[-2:] == (r, n)
    assert found["error"].numel() == torch.Size(shape).numel()
    gram = found["projector"].mT @ found["projector"]
    assert (gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-5
    assert (found["exp_avg_sq"] >= 0).all()
    assert found["exp_avg"].any() == found["step"].any()  # equal weights leave some gradients at zero
