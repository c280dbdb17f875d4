"""LDAdamW in Hugging Face's Trainer: on one device, under DDP, FSDP2 and DeepSpeed; docs/huggingface.md has recipes.

trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, rank=128),
                  callbacks=[LDAdamWCallback()])
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import CallbackHandler

from ldadam_dist.arguments import refuse_foreign
from ldadam_dist.grouping import merged
from ldadam_dist.optimizer import LDAdamW
from ldadam_dist.param_groups import build_param_groups

_GROUP_SETTINGS = tuple(inspect.signature(build_param_groups).parameters.keys() - {"model", "named"})
_SETTINGS = tuple(inspect.signature(LDAdamW).parameters.keys() - {"params", "unknown", "error_in_grad", "capturable"})
_SHARED = ("rank", "lr", "weight_decay", "proj_type")
"""Settings that both take: the groups' own, and the optimizer's defaults for them."""


def optimizer_cls_and_kwargs(
    args: transformers.TrainingArguments, **settings: Any
) -> tuple[type[LDAdamWFactory], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes to train with LDAdamW.

    `args` gives `learning_rate`, `weight_decay`, `adam_epsilon`, and `adam_beta1` and `adam_beta2` if one is not at the
    Trainer's default (LDAdamW's own are 0.908 and 0.99); `optim_target_modules` names what is projected, as `include`
    of `build_param_groups`; without it all linear layers are. `optim_args` may have any setting that is a number, a
    word, or true or false: "rank=128,lr_other=1e-2,error_dtype=bfloat16".

    They are read again when a Trainer makes the optimizer, from its `trainer.args` then: so what is changed there
    counts, as by each trial of `hyperparameter_search`.

    Args:
        args: the arguments that the Trainer gets too.
        settings: of `build_param_groups` and `LDAdamW`; they come before those of `args`.
    Raises:
        ValueError: an unknown setting, one given twice, a value that cannot be read, or arguments that ask for another
            optimizer: `optim`, or an "optimizer" in DeepSpeed's JSON.
    """
    _check_known(settings, "settings")
    return LDAdamWFactory, _Chosen(args, settings)


class _Chosen(dict[str, Any]):
    """What the factory is called with; it knows which settings the arguments gave, that it may ask them again."""

    def __init__(self, args: Any, said: Mapping[str, Any]) -> None:
        super().__init__(_read(args, said))
        self.said, self.first = dict(said), dict(self)

    def anew(self, args: Any) -> dict[str, Any]:
        """As the arguments are now; what the user has changed here since stays so."""
        changed = {key: value for key, value in self.items() if key not in self.first or self.first[key] is not value}
        return {**_read(args, self.said), **changed}


def _read(args: Any, said: Mapping[str, Any]) -> dict[str, Any]:
    """All settings: those of the arguments, and above them those of the call."""
    _refuse_other_optimizers(args)
    given = {**_read_optim_args(args.optim_args), **said}
    if args.optim_target_modules is not None:
        if "include" in given:
            raise ValueError("include and optim_target_modules say the same: give one of them.")
        given["include"] = args.optim_target_modules
    found: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "eps": args.adam_epsilon}
    betas = (args.adam_beta1, args.adam_beta2)
    if betas != tuple(transformers.TrainingArguments.__dataclass_fields__[f"adam_beta{i}"].default for i in (1, 2)):
        found["betas"] = betas
    return {**found, **given, "deepspeed": args.deepspeed_plugin is not None}


class LDAdamWFactory:
    """Makes the optimizer when the Trainer has the model; see `optimizer_cls_and_kwargs`."""

    def __call__(self, model: nn.Module, *, deepspeed: bool, **settings: Any) -> LDAdamW:
        """Build LDAdamW for a model.

        Args:
            model: as the Trainer has it then: sharded already or not, accelerate changes that later.
            deepspeed: whether DeepSpeed's engine will step the optimizer; it is then attached by itself.
            settings: of `build_param_groups` and `LDAdamW`; those that the training arguments gave are read again.
        """
        trainer = _on_stack(transformers.Trainer)
        chosen = trainer.optimizer_cls_and_kwargs[1] if trainer and trainer.optimizer_cls_and_kwargs else None
        if isinstance(chosen, _Chosen):
            settings = chosen.anew(trainer.args)
            deepspeed = settings.pop("deepspeed")
        groups = build_param_groups(model, **{key: settings[key] for key in _GROUP_SETTINGS if key in settings})
        groups = merged(groups, resumed_groups())
        defaults = {key: value for key, value in settings.items() if key not in _GROUP_SETTINGS or key in _SHARED}
        optimizer = LDAdamW(groups, **defaults)
        if deepspeed:
            from ldadam_dist.integrations.deepspeed import attach_in_use

            attach_in_use(optimizer, model)
        return optimizer


def resumed_groups() -> int | None:
    """How many parameter groups the checkpoint has from which a Trainer is resuming just now; None without one.

    The scheduler says it, which loads nothing into an optimizer with more. Earlier versions made fewer groups.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        folder = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(folder, str) and os.path.isfile(path := os.path.join(folder, SCHEDULER_NAME)):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            return len(saved["base_lrs"]) if "base_lrs" in saved else None
        frame = frame.f_back
    return None


class LDAdamWCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Logs what `optimizer.metrics()` tells, as "ldadamw/error_norm" and so on; refuses another optimizer than LDAdamW.

    The metrics join each log of the training loss, and so go wherever that goes: TensorBoard, wandb, the progress bar,
    `trainer.state.log_history`. They are those of the last measured step: give `metrics_every=args.logging_steps` to
    `optimizer_cls_and_kwargs`. Without it only skipped steps are logged.

    Args:
        matrices: log those of each matrix too, as "ldadamw/model.layers.0.mlp.up_proj.weight/error_norm".
    """

    def __init__(self, matrices: bool = False) -> None:
        self._matrices = matrices
        self._optimizer: LDAdamW | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Find LDAdamW.

        Raises:
            ValueError: the Trainer has another optimizer.
        """
        self._optimizer = unwrap(optimizer)
        handler = _on_stack(CallbackHandler)
        if handler is None:
            warnings.warn(
                f"transformers {transformers.__version__} calls callbacks in an unknown way: metrics may be "
                "missing in what callbacks before LDAdamWCallback write.",
                stacklevel=1,
            )
            return
        # Callbacks share the values that they log; those that write them must see what is added.
        handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the metrics; collective, as all ranks log."""
        if self._optimizer is None or "loss" not in logs:
            return
        values = {}
        if any(group["metrics_every"] for group in self._optimizer.param_groups):
            metrics = self._optimizer.metrics()
            values = {f"ldadamw/{name}": value for name, value in metrics.total.items()}
            if self._matrices:
                values |= {
                    f"ldadamw/{matrix}/{name}": value
                    for matrix, measured in metrics.matrices.items()
                    for name, value in measured.items()
                }
        values["ldadamw/skipped_steps"] = float(self._optimizer.skipped_steps)
        logs.update(values)
        state.log_history[-1].update(values)


def unwrap(optimizer: Any) -> LDAdamW:
    """The LDAdamW that accelerate, and DeepSpeed, have wrapped.

    Raises:
        ValueError: there is none.
    """
    found = optimizer
    while found is not None and not isinstance(found, LDAdamW):
        found = getattr(found, "optimizer", None)
    if found is None:
        innermost = optimizer
        while getattr(innermost, "optimizer", None) is not None:
            innermost = innermost.optimizer
        raise ValueError(
            f"the optimizer is {type(innermost).__name__}, expected LDAdamW: give the Trainer "
            "optimizer_cls_and_kwargs=ldadam_dist.integrations.transformers.optimizer_cls_and_kwargs(args, rank=...)."
        )
    return found


def _refuse_other_optimizers(args: Any) -> None:
    name = str(getattr(args.optim, "value", args.optim))
    if not name.startswith("adamw_torch") or name.endswith("bit"):  # adamw_torch_8bit is torchao's
        raise ValueError(
            f"optim={name!r} in the training arguments asks for another optimizer, which the Trainer would not use: "
            "leave optim out to train with LDAdamW."
        )
    plugin = args.deepspeed_plugin
    named = (plugin.deepspeed_config or {}).get("optimizer") if plugin is not None else None
    if named is not None:
        raise ValueError(
            f"DeepSpeed's configuration names the optimizer {named.get('type')!r}, and the Trainer would use that one "
            "alone: remove it there; or name LDAdamW there, with its settings, and leave out optimizer_cls_and_kwargs."
        )


def _read_optim_args(text: str | None) -> dict[str, Any]:
    """Settings from "name=value,name=value"."""
    settings: dict[str, Any] = {}
    for item in (text or "").split(","):
        if not item.strip():
            continue
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"optim_args has {item.strip()!r}: expected name=value, several with commas between them.")
        _check_known({name: value}, "optim_args")
        if name in settings:
            raise ValueError(f"optim_args has {name!r} twice.")
        settings[name] = _value(name, value)
    return settings


def _value(name: str, text: str) -> Any:
    """The value of a setting, in the type that it has in the signature."""
    signature = inspect.signature(LDAdamW if name in _SETTINGS else build_param_groups)
    kind = str(signature.parameters[name].annotation).split(" | ")[0]
    if kind not in _READERS:
        raise ValueError(f"{name} cannot be in optim_args: write optimizer_cls_and_kwargs(args, {name}=...).")
    read, expected = _READERS[kind]
    try:
        return read(text)
    except (ValueError, KeyError):
        raise ValueError(f"optim_args has {name}={text!r}: expected {expected}.") from None


_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "bool": (lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()], "true or false"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "a word"),
    "Patterns": (str, "a name or a regular expression"),
}
"""How optim_args writes settings of each type; and what is expected there."""


def _check_known(settings: Mapping[str, Any], where: str) -> None:
    known = sorted({*_SETTINGS, *_GROUP_SETTINGS})
    refuse_foreign(list(settings))
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f": known are {', '.join(known)}."
            raise ValueError(f"unknown {name!r} in {where}{hint}")


def _on_stack(kind: type) -> Any:
    """What calls: the Trainer, or the handler of its callbacks; those that are called are not given it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, kind):
            return candidate
        frame = frame.f_back
    return None
