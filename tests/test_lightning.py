"""docs/lightning.md's script under the real Trainer: the weights and metrics of one process, and exact resumption."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

from ldadam_dist import LDAdamW, build_param_groups

PAGE = Path(__file__).resolve().parent.parent / "docs/lightning.md"
CONFIG = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    vocab_size=50,
    initializer_range=0.2,
)
STEPS, SAVE_AT, ACCUMULATED, BATCH, RANK, LR, EVERY = 6, 3, 2, 4, 4, 1e-2, 2
SENTENCES = torch.randint(50, (SAVE_AT * ACCUMULATED * BATCH, 8), generator=torch.Generator().manual_seed(0))


def script() -> dict[str, Any]:
    """What the page's script defines."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), found)
    return found


def prepare() -> tuple[int, int]:
    """Number of this process and of all; Lightning reads them as torchrun would give them."""
    warnings.simplefilter("ignore")  # theirs
    if not dist.is_initialized():
        return 0, 1
    rank, size = dist.get_rank(), dist.get_world_size()
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    return rank, size


def options_of(folder: str, layout: str, size: int) -> dict[str, Any]:
    """Arguments of the Trainer."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    strategies = {
        "one": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1),
    }
    return {
        "strategy": strategies[layout](),
        "devices": size,
        "accelerator": "cpu",
        "max_steps": STEPS,
        "accumulate_grad_batches": ACCUMULATED,
        "logger": TensorBoardLogger(folder, name="", version=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def new_module(code: dict[str, Any], **settings: Any) -> Any:
    torch.manual_seed(0)
    module = code["Pretraining"](LlamaConfig(**CONFIG), **{"rank": RANK, "lr": LR, "metrics_every": EVERY, **settings})
    return module


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def trained(folder: str, layout: str) -> list[dict[str, Tensor]]:
    """Weights of an uninterrupted run, and of one that resumed from its checkpoint."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    rank, size = prepare()
    code, found = script(), []
    for resume in (None, f"{folder}/step={SAVE_AT}.ckpt"):
        module = new_module(code)
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVE_AT, save_top_k=-1)
        sampler = DistributedSampler(SENTENCES, size, rank, shuffle=False)  # Lightning's own would shuffle
        data = DataLoader(SENTENCES, batch_size=BATCH // size, sampler=sampler)
        run = f"{folder}/resumed" if resume else f"{folder}/through"
        trainer = code["train"](module, data, resume, callbacks=[saver], **options_of(run, layout, size))
        assert trainer.global_step == STEPS
        found.append(full_weights(module.model))
    return found


def logged(folder: str) -> dict[str, dict[int, float]]:
    """What TensorBoard has: by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder)
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def plain() -> tuple[dict[str, Tensor], dict[int, dict[str, float]]]:
    """Weights, and metrics by step, of the same training in one process without Lightning."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    groups = build_param_groups(model, rank=RANK, lr=LR, lr_other=4 * LR, weight_decay=0.1)
    optimizer = LDAdamW(groups, metrics_every=1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    batches = iter(2 * SENTENCES.split(BATCH))
    metrics = {}
    for step in range(STEPS):
        for _ in range(ACCUMULATED):
            tokens = next(batches)
            (model(input_ids=tokens, labels=tokens).loss / ACCUMULATED).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1  # clipping matters
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        metrics[step] = optimizer.metrics().total
    return full_weights(model), metrics


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 2), ("fsdp2", 2)])
def test_weights_and_metrics_are_those_of_one_process_and_resuming_is_exact(
    layout: str, ranks: int, tmp_path: Path
) -> None:
    expected, metrics = plain()
    for through, resumed in run_ranks(ranks, trained, str(tmp_path), layout):
        for name, weight in expected.items():
            torch.testing.assert_close(through[name], weight, rtol=0, atol=1e-5)
            assert torch.equal(through[name], resumed[name]), name
    for run, first in (("through", 1), ("resumed", SAVE_AT)):
        found = logged(str(tmp_path / run))
        steps = range(first, STEPS, EVERY)
        for name in metrics[1].keys() - {"wire_bytes", "orthogonality"}:
            assert found[f"ldadamw/{name}"] == pytest.approx({step: metrics[step][name] for step in steps}, rel=1e-4), (
                name
            )
        assert all(value < 1e-5 for value in found["ldadamw/orthogonality"].values())
        assert set(found["ldadamw/wire_bytes"]) == set(steps)


@pytest.mark.parametrize(
    ("settings", "changed", "message"),
    [
        ({"metrics_every": 0}, {}, "LDAdamWMonitor has nothing to log: metrics_every is 0"),
        ({}, {"logger": False}, "LDAdamWMonitor has nowhere to log: the Trainer has no logger"),
    ],
)
def test_what_cannot_be_logged(
    settings: dict[str, Any], changed: dict[str, Any], message: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    options = {**options_of(str(tmp_path), "one", 1), **changed}
    warnings.simplefilter("ignore")  # Lightning's own
    code = script()
    with pytest.raises(ValueError, match=message):
        code["train"](new_module(code, **settings), DataLoader(SENTENCES, batch_size=BATCH), **options)


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        (["AdamW"], "the Trainer's optimizer is AdamW: expected LDAdamW"),
        (["LDAdamW", "AdamW"], r"the Trainer's optimizers are \['LDAdamW', 'AdamW'\]: expected LDAdamW alone"),
        ([], r"the Trainer's optimizers are \[\]"),
    ],
)
def test_another_optimizer_is_refused(optimizers: list[str], message: str) -> None:
    from ldadam_dist.integrations.lightning import optimizer_of

    class Trainer:
        """All that is read of it."""

    weights = {"LDAdamW": LDAdamW, "AdamW": torch.optim.AdamW}
    trainer: Any = Trainer()
    trainer.optimizers = [weights[name]([nn.Parameter(torch.ones(40, 40))]) for name in optimizers]
    with pytest.raises(ValueError, match=message):
        optimizer_of(trainer)
