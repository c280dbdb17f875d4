"""Resuming under transformers' Trainer and accelerate: the weights of the uninterrupted run, bit for bit."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import run_failing, run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from zero_runs import quiet_deepspeed

from ldadam_dist import LDAdamW, build_param_groups

STEPS, SAVE_AT = 8, 4
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "rank": 4}


def like_torchrun() -> None:
    """What the libraries read from the environment."""
    rank, size = dist.get_rank(), dist.get_world_size()
    local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    joined = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    os.environ.update({name: str(value) for name, value in {**local, **joined}.items()})
    warnings.simplefilter("ignore")  # theirs


def sentences() -> list[dict[str, Tensor]]:
    tokens = torch.cat([models.llama_tokens(step) for step in range(6)])
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_of(folder: str, how: str) -> Any:
    """A Trainer of a new model; `how` the optimizer comes to it: "instance", "replicas" or "class"."""
    from transformers import Trainer, TrainingArguments

    model = models.tiny_llama(torch.float32)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        save_steps=SAVE_AT,
        per_device_train_batch_size=4,
        learning_rate=SETTINGS["lr"],
        lr_scheduler_type="cosine",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    if how == "class":
        optimizer: dict[str, Any] = {"optimizer_cls_and_kwargs": (LDAdamW, {"rank": SETTINGS["rank"]})}
    else:
        group = dist.group.WORLD if how == "replicas" else None
        instance = LDAdamW(build_param_groups(model, rank=SETTINGS["rank"]), **SETTINGS, process_group=group)
        optimizer = {"optimizers": (instance, None)}
    return Trainer(model=model, args=arguments, train_dataset=sentences(), **optimizer)


def train_and_resume(folder: str, how: str) -> tuple[bool, bool]:
    """Whether the weights are those of the uninterrupted run, and whether training moved them after the checkpoint."""
    if dist.is_initialized():
        like_torchrun()
    through = trainer_of(folder, how)
    through.train()
    again = trainer_of(folder, how)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVE_AT}")
    assert again.state.global_step == STEPS
    from safetensors.torch import load_file

    saved = load_file(f"{folder}/checkpoint-{SAVE_AT}/model.safetensors")
    same = equal(through.model, again.model)
    return same, any(not torch.equal(p, saved[name]) for name, p in through.model.named_parameters() if name in saved)


def equal(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "how"),
    [
        (1, "class"),
        (2, "instance"),
        *(pytest.param(*r, marks=pytest.mark.exhaustive) for r in ((1, "instance"), (2, "class"))),
    ],
)
def test_trainer_resumes_exactly(ranks: int, how: str, tmp_path: Path) -> None:
    assert run_ranks(ranks, train_and_resume, str(tmp_path), how) == [(True, True)] * ranks


def accelerated(mode: str, group: Any, stored: dict[str, Any]) -> tuple[Any, nn.Module, Any]:
    """An accelerator of its own state, and a prepared model and optimizer; `stored` says how it keeps states."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    model = models.tiny_llama(torch.float32)
    groups = build_param_groups(model, rank=SETTINGS["rank"])
    optimizer = LDAdamW(groups, **SETTINGS, **stored, process_group=group)
    if mode == "deepspeed":
        integration = quiet_deepspeed()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": 2},
        }
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    elif mode.startswith("fsdp"):
        kind = "FULL_STATE_DICT" if mode == "fsdp-full" else "SHARDED_STATE_DICT"
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            state_dict_type=kind,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        # On a CPU accelerate takes no notice of the plugin; the rest of its FSDP2 works there. The first of these is
        # copied into the second at times.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    else:
        accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)
    if mode == "deepspeed":
        integration.attach(model)
    return accelerator, model, prepared


def accelerated_steps(accelerator: Any, model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        batch = models.llama_tokens(step).chunk(accelerator.num_processes)[accelerator.process_index]
        accelerator.backward(models.llama_loss(model, batch))
        if accelerator.sync_gradients and accelerator.distributed_type != "DEEPSPEED":
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def save_and_load(folder: str, mode: str, **stored: Any) -> tuple[bool, bool]:
    """Whether weights and a state that were loaded go on as those that were saved; whether they moved."""
    if dist.is_initialized():
        like_torchrun()
    group = dist.group.WORLD if mode == "replicas" else None
    accelerator, model, optimizer = accelerated(mode, group, stored)
    accelerated_steps(accelerator, model, optimizer, range(SAVE_AT))
    accelerator.save_state(folder)
    before = copy.deepcopy(local_weights(model))
    accelerated_steps(accelerator, model, optimizer, range(SAVE_AT, STEPS))
    through = local_weights(model)
    accelerator, model, optimizer = accelerated(mode, group, stored)
    accelerator.load_state(folder)
    accelerated_steps(accelerator, model, optimizer, range(SAVE_AT, STEPS))
    same = [torch.equal(a, b) for a, b in zip(through, local_weights(model), strict=True)]
    return all(same), any(not torch.equal(a, b) for a, b in zip(before, through, strict=True))


def local_weights(model: nn.Module) -> list[Tensor]:
    return [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in model.parameters()]


MODES = [(1, "plain"), (2, "ddp"), (2, "fsdp"), (2, "fsdp-full"), (2, "deepspeed")]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mode"), MODES)
def test_accelerate_loads_what_it_saved_exactly(ranks: int, mode: str, tmp_path: Path) -> None:
    assert run_ranks(ranks, save_and_load, str(tmp_path), mode) == [(True, True)] * ranks


def save_and_load_narrow(folder: str, mode: str) -> tuple[bool, bool]:
    return save_and_load(folder, mode, error_dtype="int4", state_dtype="bfloat16", stochastic_rounding=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "mode"),
    [pytest.param(*m, marks=[] if m[1] in ("fsdp", "deepspeed") else [pytest.mark.exhaustive]) for m in MODES],
)
def test_accelerate_loads_narrow_states_exactly(ranks: int, mode: str, tmp_path: Path) -> None:
    assert run_ranks(ranks, save_and_load_narrow, str(tmp_path), mode) == [(True, True)] * ranks


@pytest.mark.slow
@pytest.mark.parametrize("function", [train_and_resume, save_and_load])
def test_a_state_of_which_one_rank_saved_its_part_is_refused(function: Any, tmp_path: Path) -> None:
    """Both libraries have rank 0 alone save the optimizer under DDP, which is not all of it with process_group=."""
    first, second = run_failing(2, function, str(tmp_path), "replicas", timeout=60)
    assert second is not None
    assert "is the part that rank 0 had of it" in second
    assert "use torch.distributed.checkpoint" in second
    assert first is not None
