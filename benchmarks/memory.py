"""Memory of training with LDAdamW and others: bytes of state, peak of a step, peak of forward, backward and step.

    python benchmarks/memory.py --model llama-60m --ranks 128 --out runs/bench

A Llama of the model's shapes trains on random tokens for three steps. `in a step` is what one after the first needs
above what there was before it; `in training` is the peak of all three iterations. On CUDA the figures are those of
torch's caching allocator (`torch.cuda.max_memory_allocated`). On a CPU they are the running sum of the allocations and
frees that torch's profiler records, which sees every block that torch's allocator hands out, also what an operator
needs within itself; what BLAS and LAPACK take by themselves is in neither. States are counted as they lie in memory,
each storage once, without step counts. `left in grad` is what `zero_grad()` leaves there: with error_in_grad=True the
error, which is among the states too and takes its memory once. The second table needs no weights: bytes of state by the
parameters' shapes alone, as `LDAdamW.placement()` tells them on the meta device.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Run as a file, Python looks for modules in benchmarks/ alone: name the repository as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import common
from benchmarks.common import MODELS, Llama, Options, Report, each, one_thread
from benchmarks.contenders import BASELINE, Contender, contenders, ldadamw, variants
from ldadam_dist import LDAdamW, build_param_groups
from ldadam_dist.tables import format_bytes

STEPS = 3
OPTIONS = [
    *("error_dtype=bfloat16", "error_dtype=int8", "error_dtype=int4", "state_dtype=bfloat16"),
    *("error_dtype=int8,state_dtype=bfloat16", "error_dtype=int4,state_dtype=bfloat16"),
    *("error_in_grad=True,state_dtype=bfloat16", "error_feedback=False"),
]
"""Of LDAdamW, measured where this version has them."""


@dataclass(frozen=True)
class Row:
    """Bytes with one optimizer.

    Attributes:
        name: of the contender.
        states: of the optimizer.
        left_in_grad: after `zero_grad()`.
        step: the peak of a later step above what there was before it.
        training: the peak of all iterations: weights, gradients, states, activations and temporaries.
    """

    name: str
    states: int
    left_in_grad: int
    step: int
    training: int


class Meter:
    """Follows the memory of a device from the start of the block, and tells the peaks of named phases in it.

    Attributes:
        found: after the block, by phase, (bytes before, peak) of each time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[str, list[tuple[int, int]]] = {}
        self._profile: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> Meter:
        gc.collect()
        if self.device.type == "cpu":
            self._stack.enter_context(one_thread(self.device))
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(*error)
            self._stack.close()
            self._read(self._profile.profiler.kineto_results.events())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part whose peak is wanted."""
        if self._profile is not None:
            with record_function(f"phase {name}"):
                yield
            return
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        torch.cuda.synchronize(self.device)
        self.found.setdefault(name, []).append((before, torch.cuda.max_memory_allocated(self.device)))

    def _read(self, events: Sequence[Any]) -> None:
        phases = [(e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in events if e.name()[:6] == "phase "]
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        for start, stop, name in sorted(phases):
            before = sum(size for when, size in changes if when < start)
            now = peak = before
            for when, size in changes:
                if start <= when <= stop:
                    now += size
                    peak = max(peak, now)
            self.found.setdefault(name.removeprefix("phase "), []).append((before, peak))


def storages(value: Any) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the storages of all tensors in a state, without step counts, which have no dimension."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from storages(item)
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # of torchao: codes and scales
        yield from storages([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, Tensor) and value.ndim:
        storage = value.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()


def state_bytes(optimizer: Optimizer) -> int:
    """Of all states of an optimizer."""
    return sum(dict(storages(dict(optimizer.state))).values())


def build(model: Llama, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A Llama of these shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_attention_heads=model.heads,
        num_hidden_layers=model.layers,
        vocab_size=model.vocab,
        use_cache=False,
    )
    with device:
        return LlamaForCausalLM(config).to(dtype)


def measure(
    contender: Contender, shapes: Llama, device: torch.device, dtype: torch.dtype, batch: int, length: int
) -> Row:
    """Train a few steps with one optimizer."""
    torch.manual_seed(0)
    with ExitStack() as stack:
        meter = stack.enter_context(Meter(device))
        model = build(shapes, device, dtype)
        groups = build_param_groups(model, rank=1, named=False)  # which are projected; the rank is the contender's
        projected, others = (
            [p for group in groups for p in group["params"] if group["enable_lowrank"] == low_rank]
            for low_rank in (True, False)
        )
        optimizer = contender.build(projected, others)
        for step in range(STEPS):
            with meter.phase("passes"):
                tokens = torch.randint(shapes.vocab, (batch, length), device=device)
                model(input_ids=tokens, labels=tokens).loss.backward()
            with meter.phase("step" if step else "first step"):
                optimizer.step()
            optimizer.zero_grad()
        left = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
        held = state_bytes(optimizer)
    return Row(
        contender.name,
        states=held,
        left_in_grad=left,
        step=max(peak - before for before, peak in meter.found["step"]),
        training=max(peak for phase in meter.found.values() for _, peak in phase),
    )


def by_shapes(model: Llama, rank: int, options: Options, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of state with LDAdamW and with AdamW, from metadata alone."""

    def parameters(shapes: common.Shapes) -> list[nn.Parameter]:
        return [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in each(shapes)]

    groups = [{"params": parameters(model.matrices)}, {"params": parameters(model.others), "enable_lowrank": False}]
    optimizer = LDAdamW(groups, rank=rank, **options.values)
    return sum(row.total_bytes for row in optimizer.placement()), 2 * model.parameters * dtype.itemsize


def shapes_table(models: Sequence[Llama], ranks: Sequence[int], asked: Sequence[Options], dtype: torch.dtype) -> Any:
    """Lines of the second table, and the bytes in them."""
    found: list[dict[str, Any]] = []
    for model in models:
        adamw = 2 * model.parameters * dtype.itemsize
        found.append({"model": model.name, "optimizer": "AdamW", "bytes": adamw, "parameters": model.parameters})
        for rank in ranks:
            if rank >= min(min(shape) for _, shape in model.matrices):
                continue
            for options in (Options(""), *asked):
                try:
                    total, _ = by_shapes(model, rank, options, dtype)
                except (TypeError, ValueError):  # this version has no such option; the first table's notes say so
                    continue
                name = ldadamw(rank, options).name
                found.append({"model": model.name, "optimizer": name, "bytes": total, "parameters": model.parameters})
    lines = [
        [
            *(row["model"], f"{row['parameters'] / 1e6:,.0f} M", row["optimizer"], format_bytes(row["bytes"])),
            f"{row['bytes'] / row['parameters']:.2f}",
        ]
        for row in found
    ]
    return lines, found


def cells(row: Row, parameters: int, baseline: Row) -> list[str]:
    """A row as text."""
    sizes = (row.states, row.left_in_grad, row.step, row.training)
    return [
        *(row.name, f"{row.states / parameters:.2f}", f"{row.states / baseline.states:.2f}"),
        *map(format_bytes, sizes),
        f"{row.training / baseline.training:.2f}",
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.parser(__doc__, "memory")
    models = [name for name in MODELS if not name.endswith("-layer")]
    parser.add_argument("--model", default="llama-60m", choices=models, help="what is trained")
    parser.add_argument("--ranks", type=int, nargs="+", default=[128], help="ranks of the low-rank optimizers")
    parser.add_argument(
        *("--options",),
        type=Options.parse,
        nargs="*",
        default=list(map(Options.parse, OPTIONS)),
        help="arguments of LDAdamW beside its defaults, such as error_dtype=int8",
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--shapes", nargs="*", choices=models, default=models, help="models of the second table")
    parser.add_argument("--shape-ranks", type=int, nargs="+", help="its ranks, by default those of the first")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, and return what goes to the JSON file."""
    args = parse(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shapes = Llama.named(args.model, args.scale, args.layers)
    report = Report("memory", argv, device, args.dtype)
    report.facts["model"] = f"{shapes.name}, {shapes.parameters:,} parameters, {args.batch} × {args.length} tokens"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers use what today's torch deprecates
        entrants, notes = contenders(args.ranks, device, dtype, args.options, floors=False)
        rows = [measure(entrant, shapes, device, dtype, args.batch, args.length) for entrant in entrants]
    baseline = next(row for row in rows if row.name == BASELINE)
    header = (
        *("optimizer", "bytes of state a parameter", "of AdamW", "states", "left in grad", "in a step"),
        *("in training", "of AdamW"),
    )
    report.table(header, [cells(row, shapes.parameters, baseline) for row in rows])
    models = [Llama.named(name, args.scale, args.layers) for name in args.shapes]
    asked = variants(args.options)[1:]
    lines, found = shapes_table(models, args.shape_ranks or args.ranks, asked, dtype)
    header = ("model", "parameters", "optimizer", "states", "bytes a parameter")
    report.table(header, lines, f"Bytes of state from shapes, {args.dtype} parameters")
    report.lines([f"- {note}" for note in notes])
    report.result.update(notes=notes, rows=[asdict(row) for row in rows], shapes=found)
    return report.write(args.out)


if __name__ == "__main__":
    main()
