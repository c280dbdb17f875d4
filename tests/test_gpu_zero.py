"""The DeepSpeed engine on a CUDA device: float16 with loss scaling, bfloat16, offload, one rank over NCCL."""

from __future__ import annotations

import pytest
import torch
from distributed import once, run_ranks
from test_zero import CPU, FP32_GRADS, assert_equals_one_process
from zero_runs import Run, train

pytest.importorskip("deepspeed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BACKEND = "nccl"
FP16, BF16 = torch.float16, torch.bfloat16
RUNS = [
    *(Run(f"{stage} fp16", "odd", {"stage": stage}, dtype=FP16) for stage in (1, 2, 3)),
    *(Run(f"{stage} bf16", "llama", {"stage": stage}, dtype=BF16) for stage in (1, 2, 3)),
    Run("bf16 optimizer", "llama", {"stage": 1}, FP32_GRADS, dtype=BF16),
    *(Run(f"{stage} offload", "odd", {"stage": stage, **CPU}, dtype=BF16) for stage in (2, 3)),
    Run("3 experts", "experts", {"stage": 3}, params={"convolutions": True}),
]


def train_all() -> dict[str, dict[str, object]]:
    torch.set_float32_matmul_precision("highest")
    return {run.name: train(run) for run in RUNS}


@once
def on_device() -> list[dict[str, dict[str, object]]]:
    found: list[dict[str, dict[str, object]]] = run_ranks(1, train_all, backend=BACKEND)
    return found


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_equals_one_process_after_every_step(run: Run) -> None:
    """The single process is the CPU; with float16 some steps overflow and are skipped, not all."""
    ranks = [found[run.name] for found in on_device()]
    assert_equals_one_process(run, ranks)
    skipped = ranks[0]["skipped"]
    assert 0 < skipped < 20 if run.dtype == FP16 else skipped == 0
