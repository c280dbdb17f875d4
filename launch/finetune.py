"""Fine-tune a text classifier with Hugging Face's Trainer, with LDAdamW or AdamW, on one device or many.

python launch/finetune.py --config configs/finetune/classify.yaml --model MODEL --data DATA --output_dir runs/a
accelerate launch --config_file configs/accelerate/fsdp2.yaml launch/finetune.py --config ... --output_dir runs/a
torchrun --standalone --nproc-per-node 2 launch/finetune.py --config ... --output_dir runs/a

MODEL and DATA are names on the Hugging Face hub, or local folders. DATA may also be a CSV, TSV, JSONL or Parquet file.
Options of transformers' TrainingArguments are options here too.
"""

from __future__ import annotations

import difflib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

# Run as a file, Python looks for modules in launch/ alone: name the repository as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.config import ConfigError, expect, near_names, one_line
from launch.stopping import StopRequest

OPTIONS_FILE = "finetune_options.json"
# With what the optimizer in a checkpoint was made: a run that goes on from it has the same.
KEPT_OPTIONS = ("optimizer", "rank", "lr_other")
KEPT_ARGUMENTS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"),
    "optim_target_modules",
)


@dataclass
class FinetuneOptions:
    """What is trained on what, and by which optimizer."""

    model: str = field(metadata={"help": "name on the hub, or folder, of a pretrained transformer"})
    data: str = field(metadata={"help": "name on the hub, folder or file of labelled texts"})
    text_column: str = field(default="text", metadata={"help": "column of the texts"})
    label_column: str = field(default="label", metadata={"help": "column of the classes, whole numbers or words"})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "part of the texts held out where data has no validation or test split"}
    )
    max_length: int = field(default=128, metadata={"help": "tokens of a text; longer ones are cut"})
    optimizer: str = field(default="ldadamw", metadata={"help": "ldadamw or adamw", "choices": ["ldadamw", "adamw"]})
    rank: int | None = field(default=None, metadata={"help": "directions kept of each matrix (default 16)"})
    lr_other: float | None = field(
        default=None, metadata={"help": "learning rate of embeddings, norms and biases (default: learning_rate)"}
    )
    metrics_every: int | None = field(
        default=None, metadata={"help": "measure every so many steps (default: logging_steps); 0 for none"}
    )
    fresh: bool = field(default=False, metadata={"help": "start anew though output_dir has checkpoints"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, also for a run that a signal stopped after a checkpoint; 2 for options, a model, data or a folder
    that cannot be used; 130 for Ctrl-C before the first step, or twice."""
    from launch import lock

    try:
        options, args = parse(sys.argv[1:] if arguments is None else arguments)
        result = finetune(options, args)
    except ConfigError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted: the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        return 130
    finally:
        lock.release()
    if args.process_index == 0 and result:
        print(" ".join(f"{name}={value:.4f}" for name, value in sorted(result.items()) if name.startswith("eval_")))
    return 0


def parse(arguments: Sequence[str]) -> tuple[FinetuneOptions, Any]:
    """Options from a YAML file, if --config names one, and from the command line, which comes first.

    Returns:
        the options, and transformers' TrainingArguments.
    """
    import torch
    import yaml
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser((FinetuneOptions, TrainingArguments), description=__doc__.partition("\n")[0])
    parser.usage = "finetune.py [--config YAML] --model MODEL --data DATA --output_dir FOLDER [option ...]"
    parser.add_argument("--config", type=Path, help="YAML file of options, as configs/finetune/classify.yaml")
    # The loss of a class is the mean over a rank's texts: no tokens to count, and the Trainer would sum over ranks.
    parser.set_defaults(average_tokens_across_devices=False)
    known = {f.name: f for kind in (FinetuneOptions, TrainingArguments) for f in fields(kind) if f.init}
    path = parser.parse_known_args(["--model=", "--data=", *arguments])[0].config
    if path is not None:
        try:
            given = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from error
        expect(isinstance(given, dict), f"--config {path}: expected lines 'option: value'")
        for name in given:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists the options"
            expect(name in known, f"--config {path}: unknown option {name!r}; {hint}")
        parser.set_defaults(**given)
        for action in parser._actions:
            action.required = action.required and action.dest not in given
    parsed, unknown = parser.parse_known_args(arguments)
    for name in (given.partition("=")[0] for given in unknown):
        expect(not name.startswith("--"), f"unknown option {name}: {near_names(name, parser._option_string_actions)}")
    expect(not unknown, f"{' '.join(unknown)}: expected options, --name value")
    values = vars(parsed)
    del values["config"]
    on_cpu = values["use_cpu"] or not torch.accelerator.is_available()
    # Left to itself the Trainer would take a rank without a GPU for a run of its own.
    values |= {"use_cpu": on_cpu, "dataloader_pin_memory": values["dataloader_pin_memory"] and not on_cpu}
    values["deepspeed"] = _deepspeed(values["deepspeed"], on_cpu)
    values["output_dir"] = values["output_dir"] or "runs/finetune"
    try:
        options, args = parser.parse_dict(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training arguments: {' '.join(str(error).split())}") from error
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    expect(args.world_size == ranks, f"the Trainer sees {args.world_size} of {ranks} ranks: each would train by itself")
    expect(
        not (on_cpu and _asked_for("FSDP")),
        "accelerate does not shard on a CPU: found its FSDP configuration, expected configs/accelerate/ddp.yaml",
    )
    for name in ("rank", "max_length"):
        value = getattr(options, name)
        expect(value is None or value >= 1, f"{name}={value}: expected a whole number of at least 1")
    part = options.validation_fraction
    expect(0 < part < 1, f"validation_fraction={part}: expected a part of the texts, between 0 and 1")
    return options, args


def _asked_for(engine: str) -> bool:
    """Whether accelerate's configuration is for DEEPSPEED or FSDP."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("1", "true", "yes")


def _deepspeed(path: Any, on_cpu: bool) -> Any:
    """DeepSpeed's JSON, without the optimizer that it names: that is the run's."""
    if not path and not _asked_for("DEEPSPEED"):
        return path
    from launch.zero import prepare_deepspeed, read_json, refuse_misspelt

    prepare_deepspeed(int(os.environ.get("LOCAL_RANK", 0)), on_cpu)
    if not path:
        return path
    settings = read_json(path)
    refuse_misspelt(settings, path)
    optimizer = settings.pop("optimizer", {})
    params = optimizer.get("params", {}) if isinstance(optimizer, dict) else None
    expect(isinstance(params, dict), f"deepspeed={path}: optimizer is {optimizer!r}: expected a section with params")
    for name, value in params.items():
        expect(
            value == "auto", f"deepspeed={path}: optimizer.params.{name} is {value!r}, the run sets it: write 'auto'"
        )
    return settings


def finetune(options: FinetuneOptions, args: Any) -> dict[str, float]:
    """Train, evaluate and save; what was measured, and nothing if a signal stopped the run.

    Raises:
        ConfigError: the model, the data or the optimizer's settings cannot be used.
    """
    import numpy
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer
    from transformers.trainer_utils import get_last_checkpoint

    from launch import lock
    from launch.classes import labelled_texts
    from launch.distributed import World

    folder = Path(args.output_dir)
    world = World(args.process_index, args.world_size, args.local_process_index, args.device)
    lock.hold(folder, world)
    checkpoint = world.attempt_on_main(lambda: None if options.fresh else get_last_checkpoint(folder))
    world.attempt_on_main(_keep_options, folder, checkpoint, options, args)

    with args.main_process_first(desc="data"):
        data = labelled_texts(options.data, options.text_column, options.label_column, options.validation_fraction)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForSequenceClassification.from_pretrained(
            options.model,
            num_labels=len(data.classes),
            id2label=dict(enumerate(data.classes)),
            label2id={name: number for number, name in enumerate(data.classes)},
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--model {options.model}: {str(error).splitlines()[0]}") from error
    texts = data.texts.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=options.max_length),
        batched=True,
        remove_columns="text",
        load_from_cache_file=False,
    )
    optimizer, callbacks = _optimizer(options, args, model)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=texts["train"],
        eval_dataset=texts["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": float(numpy.mean(found.predictions.argmax(-1) == found.label_ids))},
        callbacks=callbacks,
        **optimizer,
    )
    with StopRequest() as request:
        stop = _save_when_asked(request, args.device)
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.signal:
        if args.process_index == 0:
            done, by = trainer.state.global_step, signal.Signals(stop.signal).name
            print(f"stopped by {by} after step {done}, saved in {folder}: the same command goes on", flush=True)
        return {}
    result: dict[str, float] = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("eval", result)
    return result


def _save_when_asked(request: StopRequest, device: Any) -> Any:
    """A callback of the Trainer that saves and stops after the step in which any rank is asked to stop."""
    import torch
    from torch import distributed
    from transformers import TrainerCallback

    class SaveWhenAsked(TrainerCallback):
        signal = 0  # that some rank has got

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            asked = torch.tensor(request.signal, device=device)
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(asked, distributed.ReduceOp.MAX)
            self.signal = int(asked)
            if self.signal:
                control.should_save = control.should_training_stop = True

    return SaveWhenAsked()


def _keep_options(folder: Path, checkpoint: str | None, options: FinetuneOptions, args: Any) -> None:
    """Write down what the optimizer is made with; before that, compare it with the run that is gone on with."""
    from launch.runlog import replace_text

    path = folder / OPTIONS_FILE
    current = {name: getattr(options, name) for name in KEPT_OPTIONS}
    current |= {name: getattr(args, name) for name in KEPT_ARGUMENTS}
    current = json.loads(json.dumps(current, default=str))
    if checkpoint and path.exists():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}): remove it, or give --fresh true") from error
        different = [name for name in current if saved.get(name) != current[name]]
        said = ", ".join(f"{name}={current[name]!r} (was {saved.get(name)!r})" for name in different)
        expect(
            not different,
            f"output_dir={str(folder)!r} holds a run with other options: {said}. Give the same ones, choose another "
            "folder, or start anew with --fresh true",
        )
    replace_text(path, json.dumps(current, indent=1) + "\n")


def _optimizer(options: FinetuneOptions, args: Any, model: Any) -> tuple[dict[str, Any], list[Any]]:
    """Arguments of the Trainer for the optimizer, and callbacks."""
    from ldadam_dist.integrations.transformers import LDAdamWCallback, optimizer_cls_and_kwargs

    metrics_every = options.metrics_every
    if metrics_every is None:
        metrics_every = args.logging_steps if isinstance(args.logging_steps, int) else 0
    settings = {"rank": options.rank, "lr_other": options.lr_other, "metrics_every": metrics_every}
    try:
        if options.optimizer == "adamw":
            _adamw(model, options, args)
            return {"optimizer_cls_and_kwargs": (lambda: _adamw, {"options": options, "args": args})}, []
        found = optimizer_cls_and_kwargs(args, **{name: value for name, value in settings.items() if value is not None})
        factory, chosen = found
        factory()(model, **{**chosen, "deepspeed": False})  # what does not fit the model is known now
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return {"optimizer_cls_and_kwargs": found}, [LDAdamWCallback()]


def _adamw(model: Any, options: FinetuneOptions, args: Any) -> Any:
    """AdamW in LDAdamW's groups, so that a comparison differs in the rule alone."""
    import torch

    from ldadam_dist import build_param_groups
    from ldadam_dist.grouping import merged
    from ldadam_dist.integrations.transformers import resumed_groups

    groups = build_param_groups(
        model,
        rank=options.rank,
        lr=args.learning_rate,
        lr_other=options.lr_other,
        weight_decay=args.weight_decay,
        include=args.optim_target_modules,
        named=False,
    )
    groups = merged(groups, resumed_groups())
    groups = [{key: group[key] for key in ("params", "lr", "weight_decay") if key in group} for group in groups]
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)


if __name__ == "__main__":
    sys.exit(main())
