"""Options of launch/pretrain.py: dataclasses that a YAML file and the command line fill in.

Names are unique over all sections, so both the YAML file and the command line are flat: ``lr: 1e-3``, ``--lr 1e-3``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = REPOSITORY / "configs" / "models"
DEFAULT_BETAS = {"ldadamw": (0.908, 0.99), "adamw": (0.9, 0.95)}


class ConfigError(ValueError):
    """An option, or the data it points to, is not usable: what was found, what was expected, what to do."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def option(default: Any, description: str) -> Any:
    return field(default=default, metadata={"help": description})


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class ModelOptions:
    """Model and how it is spread over devices"""

    model: str = option("llama_9m", "name of a file in configs/models/ without .json, or the path of a Llama JSON")
    parallel: Literal["auto", "fsdp", "ddp", "none"] = option(
        "auto", "fsdp: FSDP2 (fully_shard); ddp: replicas; none: one device; auto: fsdp under torchrun, else none"
    )
    replicas: int = option(1, "fsdp: copies of the model, each sharded over its share of the ranks (HSDP)")
    deepspeed: str | None = option(
        None,
        "a JSON file of DeepSpeed, e.g. configs/deepspeed/zero2.json: ZeRO spreads model and optimizer, and parallel "
        "must be auto; its values 'auto' follow the options of the run",
    )
    precision: Literal["auto", "bf16", "fp32"] = option(
        "auto",
        "computation dtype; weights, reductions and optimizer stay float32, but DeepSpeed computes and reduces with a "
        "bf16 copy of its float32 weights. auto: bf16 on CUDA, fp32 on CPU",
    )
    activation_checkpointing: bool = option(False, "recompute each decoder layer in backward to save memory")

    def __post_init__(self) -> None:
        known = sorted(path.stem for path in MODELS.glob("*.json"))
        expect(self.model_path.is_file(), f"model={self.model!r}: no such file and not one of {', '.join(known)}")
        expect(self.replicas >= 1, f"replicas={self.replicas}: expected at least 1")
        expect(
            self.replicas == 1 or (self.parallel in ("auto", "fsdp") and self.deepspeed is None),
            f"replicas={self.replicas} is for FSDP2: expected parallel=fsdp, and no deepspeed",
        )
        if self.deepspeed is not None:
            expect(Path(self.deepspeed).expanduser().is_file(), f"deepspeed={self.deepspeed!r}: no such file")
            expect(
                self.parallel == "auto",
                f"parallel={self.parallel} and deepspeed={self.deepspeed!r}: both spread the model; remove one",
            )

    @property
    def model_path(self) -> Path:
        named = MODELS / f"{self.model}.json"
        return named if named.is_file() else Path(self.model)


@dataclass(frozen=True)
class DataOptions:
    """Data and tokenizer"""

    data: str = option(
        "stdlib",
        "stdlib: the sources of Python's standard library on this machine; or a folder, file or glob of text, JSONL "
        "or Parquet; or the name of a data set on the Hugging Face hub. All but stdlib are streamed",
    )
    data_subset: str | None = option(None, "hub only: configuration of the data set, e.g. en for allenai/c4")
    data_split: str | None = option(None, "hub only: split to train on (default train)")
    validation_split: str | None = option(None, "hub only: split to validate on instead of held-out documents")
    validation_fraction: float = option(0.02, "share of the documents held out for validation, chosen by their hash")
    validation_tokens: int = option(200_000, "use at most this many tokens of the validation documents")
    text_column: str | None = option(None, "JSONL, Parquet, hub: the column with the text (default text)")
    text_unit: Literal["document", "paragraph", "line"] | None = option(
        None, "text files: what one document is: the whole file (document, the default), a paragraph or a line"
    )
    tokenizer: str = option("bpe", "bpe: train a byte-level BPE at first use; or the name or folder of a HF tokenizer")
    vocab_size: int | None = option(None, "vocabulary of the trained BPE (default 4096); not for other tokenizers")
    seq_len: int = option(128, "tokens in one packed sequence")
    cache_dir: str = option("~/.cache/ldadam_dist", "folder for trained tokenizers and tokenised corpora")

    def __post_init__(self) -> None:
        expect(0 <= self.validation_fraction < 1, f"validation_fraction={self.validation_fraction}: expected [0, 1)")
        expect(self.seq_len >= 2, f"seq_len={self.seq_len}: expected at least 2, one token to predict the next")
        expect(
            self.validation_tokens >= self.seq_len,
            f"validation_tokens={self.validation_tokens}: expected at least one sequence of seq_len={self.seq_len}",
        )
        if self.tokenizer != "bpe":
            expect(self.vocab_size is None, f"vocab_size={self.vocab_size} is for tokenizer=bpe only: remove it")
        expect(
            self.vocab_size is None or self.vocab_size > 256,
            f"vocab_size={self.vocab_size}: a byte-level BPE has 256 bytes and an end-of-text token, so at least 257",
        )
        if self.validation_split is None:
            expect(self.validation_fraction > 0, "validation_fraction=0 needs validation_split: there is nothing else")


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and learning-rate schedule"""

    optimizer: Literal["ldadamw", "adamw"] = option("ldadamw", "adamw takes the same parameter groups, to compare")
    lr: float = option(2.5e-3, "peak learning rate of the matrices")
    lr_other: float = option(1e-2, "peak learning rate of embeddings, head and norms")
    betas: tuple[float, float] | None = option(None, "default: [0.908, 0.99] for ldadamw, [0.9, 0.95] for adamw")
    eps: float = option(1e-8, "added to the denominator of the update")
    weight_decay: float = option(0.0, "decoupled weight decay of the matrices")
    clip: float = option(1.0, "largest global gradient norm; 0 does not clip")
    rank: int = option(16, "ldadamw: dimension of the subspace")
    rho: float = option(0.908, "ldadamw: weight of the old momentum in the new subspace")
    proj_type: Literal["std", "reverse_std", "left", "right"] = option("std", "ldadamw: which side is projected")
    proj_method: Literal["power_iteration", "svd", "svd_lowrank"] = option(
        "power_iteration", "ldadamw: how the subspace follows the gradient"
    )
    error_feedback: bool = option(True, "ldadamw: keep what the projection leaves out for the next step")
    error_dtype: Literal["float64", "float32", "bfloat16", "int8", "int4"] | None = option(
        None, "ldadamw: how the error is stored; int8 and int4 in blocks of 32 (default: the weights' dtype)"
    )
    state_dtype: Literal["float64", "float32", "bfloat16"] | None = option(
        None, "ldadamw: dtype in which projectors and moments are stored (default: float32)"
    )
    stochastic_rounding: bool = option(
        False, "ldadamw: round what is stored narrower than it is computed up or down at random"
    )
    error_in_grad: bool = option(
        False,
        "ldadamw: gradients accumulate into the errors; with clip=0 that saves their memory, and no norm is logged",
    )
    gradient_sync: Literal["full", "lowrank"] = option(
        "full",
        "ldadamw, with parallel=ddp or replicas: what replicas exchange, gradients, or the contractions of them that a "
        "step needs, with the same numbers (docs/sharding.md); clip then goes by the replicas' own norms",
    )
    metrics_every: int = option(
        0, "ldadamw: measure norms, captured energy and the subspace every so many steps, for the next log; 0: never"
    )
    warmup_steps: int = option(40, "steps of linear warm-up; all steps, if the run is shorter")
    min_lr_ratio: float = option(0.1, "the cosine ends at this share of the peak")

    def __post_init__(self) -> None:
        for name in ("lr", "lr_other", "eps"):
            value = getattr(self, name)
            expect(math.isfinite(value) and value > 0, f"{name}={value}: expected a positive number")
        for name in ("weight_decay", "clip", "metrics_every", "warmup_steps"):
            value = getattr(self, name)
            expect(math.isfinite(value) and value >= 0, f"{name}={value}: expected zero or more")
        expect(
            self.betas is None or all(0 <= beta < 1 for beta in self.betas),
            f"betas={self.betas}: expected two numbers in [0, 1)",
        )
        for name, usual in (("error_in_grad", False), ("metrics_every", 0), ("gradient_sync", "full")):
            expect(
                getattr(self, name) == usual or self.optimizer == "ldadamw",
                f"{name}={getattr(self, name)} with optimizer={self.optimizer}, which has no such option: remove one",
            )
        expect(self.rank >= 1, f"rank={self.rank}: expected at least 1")
        expect(0 <= self.rho < 1, f"rho={self.rho}: expected [0, 1)")
        expect(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio={self.min_lr_ratio}: expected [0, 1]")

    @property
    def resolved_betas(self) -> tuple[float, float]:
        return self.betas or DEFAULT_BETAS[self.optimizer]


@dataclass(frozen=True)
class RunOptions:
    """Run: length, batches, output"""

    steps: int = option(400, "optimizer steps")
    batch_size: int = option(16, "sequences in a step, over all ranks")
    micro_batch_size: int | None = option(
        None,
        "at most so many sequences in one forward pass of one rank: the largest divisor of its share of the batch "
        "is taken; gradients accumulate (default: all at once)",
    )
    seed: int = option(0, "seed of the weights and of the order of the data")
    eval_every: int = option(50, "steps between validations; 0 validates at the end only")
    log_every: int = option(1, "steps between log lines")
    save_every: int = option(0, "steps between checkpoints; 0: none but by save_minutes and at the end")
    save_minutes: float = option(30.0, "minutes between checkpoints, besides save_every; 0: none but by save_every")
    keep_last: int = option(3, "checkpoints to keep, the newest ones; 0 keeps all")
    async_save: bool = option(
        True, "write checkpoints while training goes on, from a copy in CPU memory; not DeepSpeed's own files"
    )
    output_dir: str | None = option(
        None, "folder of this run, seen by all hosts (default: runs/<optimizer>-<model>-<time>)"
    )
    resume: str = option(
        "auto",
        "auto: go on from the newest complete checkpoint in output_dir, if there is one; latest: the same, but there "
        "must be one; never: output_dir must hold no run; or a checkpoint folder",
    )
    timeout_minutes: float = option(30.0, "how long a rank waits for the others in a collective before it gives up")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            expect(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("seed", "eval_every", "save_every", "keep_last"):
            expect(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: expected zero or more")
        minutes = self.save_minutes
        expect(math.isfinite(minutes) and minutes >= 0, f"save_minutes={minutes}: expected zero or more")
        timeout = self.timeout_minutes
        expect(0 < timeout <= 1e6, f"timeout_minutes={timeout}: expected a positive number of minutes")
        expect(
            self.micro_batch_size is None or self.micro_batch_size >= 1,
            f"micro_batch_size={self.micro_batch_size}: expected at least 1",
        )
        if self.resume == "latest":
            expect(self.output_dir is not None, "resume=latest needs output_dir, the folder of the run to continue")


@dataclass(frozen=True)
class Config:
    model: ModelOptions
    data: DataOptions
    optimizer: OptimizerOptions
    run: RunOptions

    def __post_init__(self) -> None:
        expect(
            not (self.optimizer.error_in_grad and self.model.deepspeed),
            "error_in_grad=True with deepspeed, whose gradients are its own: remove one",
        )
        expect(
            self.optimizer.gradient_sync == "full" or self.model.parallel == "ddp" or self.model.replicas > 1,
            f"gradient_sync=lowrank with parallel={self.model.parallel}, where nothing is replicated: expected "
            f"parallel=ddp, or FSDP2 with replicas, e.g. as many as there are hosts",
        )

    def flat(self) -> dict[str, Any]:
        """All options under their flat names, as a YAML file gives them."""
        options: dict[str, Any] = {}
        for section in (self.model, self.data, self.optimizer, self.run):
            options |= dataclasses.asdict(section)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.flat(), sort_keys=False)


SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "optimizer": OptimizerOptions,
    "run": RunOptions,
}


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        exit_on_error=False,
        usage="%(prog)s [--config FILE] [--<option> <value> ...]",
        description="Pretrain a Llama with LDAdamW or AdamW on one device, or on many under torchrun or deepspeed.",
        epilog="example: torchrun --standalone --nproc-per-node 2 launch/pretrain.py "
        "--config configs/pretrain/default.yaml --optimizer adamw",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options; later options override it")
    for section in SECTIONS.values():
        group = parser.add_argument_group(section.__doc__)
        hints = get_type_hints(section)
        for entry in dataclasses.fields(section):
            group.add_argument(
                f"--{entry.name}", type=hints[entry.name], default=entry.default, help=entry.metadata["help"]
            )
    return parser


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """Options from the command line (default: sys.argv); a wrong one prints the reason and exits with code 2."""
    parser = make_parser()
    # The deepspeed launcher adds --local_rank=N to a script's arguments; LOCAL_RANK in the environment says the same.
    given = sys.argv[1:] if arguments is None else arguments
    arguments = [argument for argument in given if not argument.startswith("--local_rank=")]
    try:
        refuse_unknown(parser, arguments)
        options: Namespace = parser.parse_args(arguments)
        sections = {
            name: section(**{entry.name: options[entry.name] for entry in dataclasses.fields(section)})
            for name, section in SECTIONS.items()
        }
        return Config(**sections)
    except (ConfigError, ArgumentError) as error:
        print(f"error: {explained(one_line(error), parser)}", file=sys.stderr, flush=True)
        sys.exit(2)


def explained(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message, in the words of those who typed: which option is unknown, or which values it has."""
    unknown = re.search(r"Option '(\w+)' is not accepted", message)
    if unknown:
        return f"unknown option {unknown[1]} in --config: {near_names(unknown[1], vars(parser.get_defaults()))}"
    wrong = re.search(r'Parser key "(\w+)": .*Given value: (.*)$', message)
    choices = re.search(r"Expected a typing\.Literal\[(.*?)\]", message)
    if wrong and choices:
        return f"{wrong[1]}={wrong[2]}: expected one of {choices[1]}"
    return message


def refuse_unknown(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    known = parser._option_string_actions
    for given in arguments:
        name = given.partition("=")[0]
        if name.startswith("--") and name not in known:
            raise ConfigError(f"unknown option {name}: {near_names(name, known)}")


def near_names(name: str, known: Iterable[str]) -> str:
    """What else may have been meant."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else "--help lists the options"
