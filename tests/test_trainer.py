"""Hugging Face's Trainer with `optimizer_cls_and_kwargs` and `LDAdamWCallback`, on every engine that it has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from test_hf_resume import like_torchrun
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from zero_runs import quiet_deepspeed

from ldadam_dist import LDAdamW, build_param_groups

STEPS, SAVE_AT = 6, 3
SETTINGS: dict[str, Any] = {"rank": 4, "lr_other": 2e-2, "metrics_every": 1}
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]


def sentences() -> list[dict[str, Tensor]]:
    """One epoch: Trainer would step with what is left over at its end."""
    tokens = torch.cat([models.llama_tokens(step) for step in range(8)])
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: str, **changed: Any) -> Any:
    """Of a Trainer that clips and accumulates; 16 sequences a step, on one rank or two."""
    from transformers import TrainingArguments

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    given = dict(
        output_dir=folder,
        max_steps=STEPS,
        save_steps=SAVE_AT,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4 // ranks,
        learning_rate=1e-2,
        weight_decay=0.1,
        adam_epsilon=1e-4,  # where gradients are near zero, rounding would decide the direction
        lr_scheduler_type="cosine",
        max_grad_norm=0.1,  # clips every step
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return TrainingArguments(**(given | changed))


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights, whole; collective."""
    weights = {}
    for name, param in model.named_parameters():
        if isinstance(param, DTensor):
            weights[name] = param.detach().full_tensor().clone()
        elif hasattr(param, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([param]):
                weights[name] = param.detach().clone()
        else:
            weights[name] = param.detach().clone()
    return weights


def trainer_of(folder: str, engine: str) -> tuple[Any, list[dict[str, Tensor]]]:
    """A Trainer of a new model, and the weights after each of its steps."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from transformers import Trainer, TrainerCallback

    from ldadam_dist.integrations.transformers import LDAdamWCallback, optimizer_cls_and_kwargs

    if dist.is_initialized():
        like_torchrun()
    AcceleratorState._reset_state(reset_partial_state=True)
    zero: dict[str, Any] = {}
    if engine.startswith("zero"):
        quiet_deepspeed()
        stage = {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 10}
        batches = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        zero["deepspeed"] = {**dict.fromkeys(batches, "auto"), "zero_optimization": stage, "steps_per_print": 10**9}
    args = arguments(folder, **zero)
    seen: list[dict[str, Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, model: nn.Module, **kwargs: Any) -> None:
            seen.append(full_weights(model))

    trainer = Trainer(
        model=models.tiny_llama(torch.float32),
        args=args,
        train_dataset=sentences(),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, **SETTINGS),
        callbacks=[Watch(), LDAdamWCallback()],
    )
    if engine == "fsdp2":
        # On a CPU accelerate takes no notice of its FSDP plugin; told that it runs FSDP, it does all else itself.
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            state_dict_type="SHARDED_STATE_DICT",
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        PartialState().distributed_type = trainer.accelerator.state.distributed_type = DistributedType.FSDP
        trainer.accelerator.state.fsdp_plugin, trainer.is_fsdp_enabled = plugin, True
    return trainer, seen


def train(folder: str, engine: str) -> tuple[list[dict[str, Tensor]], list[dict[str, float]], bool]:
    """Weights after every step, the logs of steps, and whether a resumed run has the same."""
    trainer, seen = trainer_of(folder, engine)
    trainer.train()
    again, seen_again = trainer_of(folder, engine)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVE_AT}")
    assert len(seen) == STEPS
    assert len(seen_again) == STEPS - SAVE_AT
    same = all(torch.equal(a[name], b[name]) for a, b in zip(seen[SAVE_AT:], seen_again, strict=True) for name in a)
    if engine == "fsdp2":
        assert any(isinstance(p, DTensor) for p in trainer.model.parameters())
    return seen, [log for log in trainer.state.log_history if "loss" in log], same


def expected() -> list[dict[str, Tensor]]:
    """Weights after every step of a loop that anyone would write."""
    from transformers import get_cosine_schedule_with_warmup, set_seed

    model = models.tiny_llama(torch.float32)
    groups = build_param_groups(model, rank=4, lr_other=2e-2, weight_decay=0.1)
    optimizer = LDAdamW(groups, lr=1e-2, eps=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    set_seed(42)
    order = torch.utils.data.RandomSampler(sentences(), generator=torch.Generator().manual_seed(42))
    rows = torch.stack([row["input_ids"] for row in sentences()])
    seen = []
    for batch in rows[list(order)].split(16):
        models.llama_loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen.append(full_weights(model))
    return seen


def check_equal(weights: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> None:
    for step, (ours, theirs) in enumerate(zip(weights, others, strict=True)):
        for name in theirs:
            assert (ours[name] - theirs[name]).abs().max() < 1e-5, f"{name} after step {step}"


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    return run_ranks(1, train, str(tmp_path_factory.mktemp("one")), "one")[0]


def test_one_device_equals_a_loop_and_resumes_exactly(one_device: tuple[Any, ...]) -> None:
    weights, logs, resumed_alike = one_device
    check_equal(weights, expected())
    assert resumed_alike
    assert len(logs) == STEPS
    for log in logs:
        assert log["ldadamw/error_norm"] > 0
        assert log["ldadamw/skipped_steps"] == 0
        assert 0 < log["ldadamw/captured_energy"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_equal_one_device_and_resume_exactly(engine: str, one_device: tuple[Any, ...], tmp_path: Path) -> None:
    one_weights, one_logs, _ = one_device
    for weights, logs, resumed_alike in run_ranks(2, train, str(tmp_path), engine):
        check_equal(weights, one_weights)
        assert resumed_alike
        for log, other in zip(logs, one_logs, strict=True):
            for name in ("grad_norm", "update_norm", "error_norm", "captured_energy"):
                assert log[f"ldadamw/{name}"] == pytest.approx(other[f"ldadamw/{name}"], rel=1e-3), name


def name_in_json(folder: str) -> list[float]:
    """Train with LDAdamW that DeepSpeed's JSON names, and resume; its betas."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer

    from ldadam_dist.integrations.transformers import LDAdamWCallback, optimizer_cls_and_kwargs, unwrap

    like_torchrun()
    quiet_deepspeed()  # imports ldadam_dist.integrations.deepspeed, as a user would
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "LDAdamW", "params": {"lr": "auto", "betas": "auto", "rank": 4, "metrics_every": 1}},
    }
    args = arguments(folder, deepspeed=config)
    with pytest.raises(ValueError, match=r"names the optimizer 'LDAdamW', and the Trainer would use that one alone"):
        optimizer_cls_and_kwargs(args, rank=8)
    for resume in (None, f"{folder}/checkpoint-{SAVE_AT}"):
        AcceleratorState._reset_state(reset_partial_state=True)
        model = models.tiny_llama(torch.float32)
        trainer = Trainer(model=model, args=args, train_dataset=sentences(), callbacks=[LDAdamWCallback()])
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.log_history[-2]["ldadamw/error_norm"] > 0
    return list(unwrap(trainer.optimizer).param_groups[0]["betas"])


@pytest.mark.slow
def test_an_optimizer_that_the_json_names(tmp_path: Path) -> None:
    assert run_ranks(1, name_in_json, str(tmp_path)) == [[0.9, 0.999]]


def settings_of(tmp_path: Path, settings: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    from ldadam_dist.integrations.transformers import optimizer_cls_and_kwargs

    return optimizer_cls_and_kwargs(arguments(str(tmp_path), **changed), **(settings or {}))[1]


def test_settings_come_from_the_arguments(tmp_path: Path) -> None:
    found = settings_of(
        tmp_path,
        {"rank": 8},
        optim_args="rank=16, lr_other=3e-3,error_dtype=int8,stochastic_rounding=true,exclude=.*k_proj,metrics_every=5",
        optim_target_modules=["q_proj", "mlp"],
    )
    assert found == {
        "lr": 1e-2,
        "weight_decay": 0.1,
        "eps": 1e-4,
        "rank": 8,  # what the call says comes first
        "lr_other": 3e-3,
        "error_dtype": "int8",
        "stochastic_rounding": True,
        "exclude": ".*k_proj",
        "metrics_every": 5,
        "include": ["q_proj", "mlp"],
        "deepspeed": False,
    }
    assert settings_of(tmp_path, adam_beta2=0.95)["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optim_args": "rnak=16"}, "unknown 'rnak' in optim_args; did you mean 'rank'?"),
        ({"optim_args": "rank"}, "optim_args has 'rank': expected name=value"),
        ({"optim_args": "rank=16,rank=8"}, "optim_args has 'rank' twice"),
        ({"optim_args": "rank=1.5"}, "optim_args has rank='1.5': expected a whole number"),
        ({"optim_args": "error_feedback=maybe"}, "expected true or false"),
        ({"optim_args": "rank_pattern=down:4"}, "write optimizer_cls_and_kwargs(args, rank_pattern=...)"),
        ({"optim_args": "update_proj_gap=200"}, "'update_proj_gap' is an argument of GaLore or APOLLO"),
        ({"optim": "adamw_torch_8bit"}, "optim='adamw_torch_8bit' in the training arguments asks for another"),
        ({"optim": "galore_adamw"}, "optim='galore_adamw' in the training arguments asks for another optimizer"),
        ({"optim": "adafactor"}, "leave optim out"),
        ({"optim_target_modules": "all-linear", "optim_args": "include=mlp"}, "say the same: give one of them"),
    ],
)
def test_arguments_that_are_refused(changed: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settings_of(tmp_path, **changed)


def test_a_setting_that_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown 'error_type' in settings; did you mean 'error_dtype'\?"):
        settings_of(tmp_path, {"error_type": "int8"})


def test_values_are_checked_by_the_optimizer(tmp_path: Path) -> None:
    from ldadam_dist.integrations.transformers import LDAdamWFactory

    for settings, message in (
        ({"rank": 10**6}, "nothing to project|rank"),
        ({"rho": 2.0}, "rho"),
        ({"eps": -1.0}, "eps"),
    ):
        with pytest.raises(ValueError, match=message):
            LDAdamWFactory()(models.tiny_llama(), **settings_of(tmp_path, {"rank": 4} | settings))


def test_the_callback_refuses_a_trainer_without_ldadamw(tmp_path: Path) -> None:
    from transformers import Trainer

    from ldadam_dist.integrations.transformers import LDAdamWCallback

    model, args = models.tiny_llama(torch.float32), arguments(str(tmp_path))
    trainer = Trainer(model=model, args=args, train_dataset=sentences(), callbacks=[LDAdamWCallback()])
    with pytest.raises(ValueError, match="the optimizer is AdamW, expected LDAdamW"):
        trainer.train()


@pytest.mark.parametrize("metrics_every", [0, 2])
def test_metrics_reach_tensorboard(metrics_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose callback comes before ours in the Trainer's list."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import Trainer

    from ldadam_dist.integrations.transformers import LDAdamWCallback, optimizer_cls_and_kwargs

    board = tmp_path / "board"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(board))
    args = arguments(str(tmp_path), report_to=["tensorboard"], save_strategy="no")
    trainer = Trainer(
        model=models.tiny_llama(torch.float32),
        args=args,
        train_dataset=sentences(),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, rank=4, metrics_every=metrics_every),
        callbacks=[LDAdamWCallback(matrices=True)],
    )
    trainer.train()
    events = EventAccumulator(str(board)).Reload()
    names = {name for name in events.Tags()["scalars"] if "ldadam" in name}
    if metrics_every:
        matrix = "train/ldadamw/model.layers.0.mlp.up_proj.weight/error_norm"
        assert {"train/ldadamw/error_norm", matrix} < names
        assert len(events.Scalars(matrix)) == STEPS - 1  # none after the first step
    else:
        assert names == {"train/ldadamw/skipped_steps"}


def test_each_trial_trains_with_the_arguments_of_then(tmp_path: Path) -> None:
    """What hyperparameter_search does: it changes the Trainer's arguments after they were given."""
    from transformers import Trainer

    from ldadam_dist.integrations.transformers import optimizer_cls_and_kwargs

    args = arguments(str(tmp_path))
    trainer = Trainer(
        model=models.tiny_llama(torch.float32),
        args=args,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, rank=4, eps=1e-3),
    )
    for lr, decay in ((1e-4, 0.0), (3e-2, 0.1)):
        trainer.args.learning_rate, trainer.args.weight_decay, trainer.args.adam_epsilon = lr, decay, 1.0
        trainer.optimizer = None
        group = trainer.create_optimizer().param_groups[0]
        assert (group["lr"], group["weight_decay"], group["rank"], group["eps"]) == (lr, decay, 4, 1e-3)
