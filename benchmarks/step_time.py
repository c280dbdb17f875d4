"""Median time of an optimizer step on a model's parameters: LDAdamW next to torch's AdamW and other projects'.

    python benchmarks/step_time.py --model llama-60m --ranks 16 128 --out runs/bench

All optimizers step in turn, one step each a round and each round in another order, so that a machine that gets slower
slows all of them; ratios are taken within a round. Each has states of its own; the weights, and random gradients that
change from round to round, are shared. Two yardsticks run in the same rounds: the six products over m×n that a step of
LDAdam needs, and nothing else; and the paper's equations one by one, as tests/reference.py has them, in float32.
LDAdamW with its error in the gradient is given gradients by a backward pass, which adds them to the error and is not
timed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Run as a file, Python looks for modules in benchmarks/ alone: name the repository as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks import common
from benchmarks.common import MODELS, Llama, Options, Report, Shapes, each, in_words, normal, synchronize
from benchmarks.contenders import AUTHORS_WAY, GAP, SIX_PRODUCTS, Contender, contenders, give

GRADIENT_SETS = 3
FIRST_STEPS = 3
LONG_MS = 2000.0
"""A first step that takes longer is not repeated."""


@dataclass(frozen=True)
class Row:
    """What was measured of one optimizer.

    Attributes:
        name: of the contender.
        median_ms: of one step.
        ratio: median over the rounds of its time over the baseline's in the same round.
        ratio_low, ratio_high: quartiles of the same.
        first_ms: median of the first steps of several fresh optimizers; None of a yardstick, whose is no other.
        gap: the contender's.
        times_ms: of every round.
        over: the same ratio, by yardstick of the same rank; empty but for LDAdamW.
    """

    name: str
    median_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    first_ms: float | None
    gap: int | None
    times_ms: list[float]
    over: dict[str, float] = field(default_factory=dict)

    @property
    def first_in_steps(self) -> float | None:
        """The first step as a multiple of an ordinary one."""
        return None if self.first_ms is None else self.first_ms / self.median_ms

    @property
    def mean_ms(self) -> float:
        """Mean step with the recurring first step spread over the gap."""
        if self.gap is None or self.first_ms is None:
            return self.median_ms
        return (self.first_ms + (self.gap - 1) * self.median_ms) / self.gap


def measure(
    entrants: Sequence[Contender],
    matrices: Shapes,
    others: Shapes,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    warmup: int,
    first_steps: int = FIRST_STEPS,
) -> list[Row]:
    """Time all contenders in turn.

    Args:
        entrants: the first of them is the baseline.
        matrices, others: the parameters that are projected, and those that are not.
        device, dtype: of weights and gradients.
        steps: rounds that count.
        warmup: rounds before them.
        first_steps: how many fresh optimizers take a first step; fewer where one takes very long.
    Returns:
        one row a contender.
    """
    torch.manual_seed(0)
    order = random.Random(0)
    sizes = [*each(matrices), *each(others)]
    projected = len(each(matrices))
    weights = normal(sizes, 2e-2, device, dtype)
    gradients = [normal(sizes, 1e-2, device, dtype) for _ in range(GRADIENT_SETS)]
    made: dict[int, tuple[Optimizer, list[nn.Parameter]]] = {}

    def make(i: int) -> None:
        made.pop(i, None)  # first, as its states may be large
        params = [nn.Parameter(weight) for weight in weights]
        made[i] = entrants[i].build(params[:projected], params[projected:]), params

    def timed(i: int, turn: int) -> float:
        optimizer, params = made[i]
        give(optimizer, params, gradients[turn % GRADIENT_SETS], entrants[i].gradients)
        synchronize(device)
        start = time.perf_counter()
        optimizer.step()
        synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    numbers = range(len(entrants))
    first: list[list[float]] = [[] for _ in numbers]
    for turn in range(first_steps):
        for i in order.sample(numbers, len(numbers)):
            if sum(first[i]) > LONG_MS or (first[i] and entrants[i].yardstick):
                continue
            make(i)
            first[i].append(timed(i, turn))
    times: list[list[float]] = [[] for _ in numbers]
    for turn in range(warmup + steps):
        for i in order.sample(numbers, len(numbers)):
            taken = timed(i, turn)
            if turn >= warmup:
                times[i].append(taken)
    return [_row(i, entrants, times, first[i]) for i in numbers]


def _row(i: int, entrants: Sequence[Contender], times: Sequence[list[float]], first: Sequence[float]) -> Row:
    contender = entrants[i]

    def over(other: int) -> list[float]:
        return sorted(mine / base for mine, base in zip(times[i], times[other], strict=True))

    ratios = over(0)
    low, high = (ratios[round(q * (len(ratios) - 1))] for q in (0.25, 0.75))
    sticks = [j for j, other in enumerate(entrants) if other.yardstick and other.rank == contender.rank]
    return Row(
        name=contender.name,
        median_ms=statistics.median(times[i]),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
        first_ms=None if contender.yardstick else statistics.median(first),
        gap=contender.gap,
        times_ms=times[i],
        over={entrants[j].yardstick: statistics.median(over(j)) for j in sticks if contender.ldadam},
    )


HEADER = (
    "optimizer",
    "median step, ms",
    "÷ AdamW fused (quartiles)",
    f"÷ {SIX_PRODUCTS}",
    f"÷ {AUTHORS_WAY}",
    "first step, ms",
    "first ÷ median",
)


def cells(row: Row) -> list[str]:
    """A row as text."""

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    ratio = f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})"
    over = (number(row.over.get(name), 2) for name in (SIX_PRODUCTS, AUTHORS_WAY))
    first = (number(row.first_ms, 1), number(row.first_in_steps, 1))
    return [row.name, number(row.median_ms, 2), ratio, *over, *first]


def recurring(rows: Sequence[Row]) -> list[str]:
    """What GaLore's and APOLLO's first steps add to an ordinary one, if any was measured."""
    found = [row for row in rows if row.gap]
    base = rows[0].median_ms
    lines = [f"- {r.name}: mean of {r.gap} steps {r.mean_ms:.2f} ms, {r.mean_ms / base:.2f} ×" for r in found]
    head = f"The first step of GaLore (SVD) and APOLLO (random matrix) recurs every {GAP} steps:"
    return [head, "", *lines] if lines else []


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.parser(__doc__, "step_time")
    parser.add_argument("--model", default="llama-60m", choices=list(MODELS), help="whose parameters")
    parser.add_argument("--whole", action="store_true", help="with embedding, head and norms, which all give to AdamW")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128], help="ranks of the low-rank optimizers")
    parser.add_argument(
        *("--options",),
        type=Options.parse,
        nargs="+",
        default=[],
        help="further LDAdamW: its arguments, such as error_dtype=int8,communication=gather",
    )
    parser.add_argument("--steps", type=int, default=30, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before them")
    parser.add_argument(
        "--precision", default="highest", choices=["highest", "high", "medium"], help="of float32 products"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, shapes: Shapes | None = None) -> dict[str, Any]:
    """Measure, print the table, and return what goes to the JSON file; `shapes` are matrices in place of a model's."""
    args = parse(argv)
    torch.set_float32_matmul_precision(args.precision)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = Llama.named(args.model, args.scale, args.layers)
    matrices: Shapes = model.matrices if shapes is None else shapes
    others: Shapes = model.others if args.whole else ()
    report = Report("step_time", argv, device, args.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers use what today's torch deprecates
        entrants, notes = contenders(args.ranks, device, dtype, args.options, graphs=device.type == "cuda")
        rows = measure(entrants, matrices, others, device, dtype, args.steps, args.warmup)
    facts: Mapping[str, str] = {
        "model": model.name if shapes is None else "given shapes",
        "matrices": in_words(matrices),
        "other parameters": in_words(others) or "none",
        "rounds": f"{args.steps} after {args.warmup} of warm-up; first steps of up to {FIRST_STEPS} fresh optimizers",
    }
    report.facts.update(facts)
    report.table(HEADER, map(cells, rows))
    report.lines(recurring(rows))
    report.lines([f"- {note}" for note in notes])
    report.result.update(notes=notes, rows=[asdict(row) | {"mean_ms": row.mean_ms} for row in rows])
    return report.write(args.out)


if __name__ == "__main__":
    main()
