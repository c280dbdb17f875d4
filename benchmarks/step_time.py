"""Median time of an optimizer step on a model's matrices: LDAdamW next to torch's AdamW, GaLore and APOLLO.

    python benchmarks/step_time.py --ranks 16 128 --out runs/step_time

All optimizers step in turn, one step each a round and each round in another order, so that a machine that gets slower
slows all of them; ratios are taken within a round. Each has weights and states of its own; random gradients, made
beforehand, are shared and change from round to round.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Run as a file, Python looks for modules in benchmarks/ alone: name the repository as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ldadam_dist import LDAdamW

Shapes = Sequence[tuple[int, tuple[int, int]]]
"""(how many, (rows, columns)) of each kind of matrix."""

LLAMA_60M: Shapes = ((16, (512, 512)), (8, (1376, 512)), (4, (512, 1376)))
"""The projected matrices of the Llama of 60M parameters in the GaLore and LDAdam papers."""

BASELINE = "torch AdamW, fused"
GAP = 200
"""Steps between two subspaces of GaLore and APOLLO, as in their papers."""

GRADIENT_SETS = 3
FIRST_STEPS = 3
LONG_MS = 2000.0
"""A first step that takes longer is not repeated."""


@dataclass(frozen=True)
class Contender:
    """An optimizer to be timed.

    Attributes:
        name: as in the table.
        build: makes it for a list of matrices.
        gap: its first step's work recurs every so many steps; None if it never does.
    """

    name: str
    build: Callable[[list[nn.Parameter]], Optimizer]
    gap: int | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of one optimizer.

    Attributes:
        name: of the contender.
        median_ms: of one step.
        ratio: median over the rounds of its time over the baseline's in the same round.
        ratio_low, ratio_high: quartiles of the same.
        first_ms: median of the first steps of several fresh optimizers.
        gap: the contender's.
        times_ms: of every round.
    """

    name: str
    median_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    first_ms: float
    gap: int | None
    times_ms: list[float]

    @property
    def first_in_steps(self) -> float:
        """The first step as a multiple of an ordinary one."""
        return self.first_ms / self.median_ms

    @property
    def mean_ms(self) -> float:
        """Mean step with the recurring first step spread over the gap."""
        return self.median_ms if self.gap is None else (self.first_ms + (self.gap - 1) * self.median_ms) / self.gap


def load_peer(distribution: str, module: str) -> tuple[Callable[..., Optimizer] | None, str]:
    """The AdamW of another project, if it is installed.

    Their packages import bitsandbytes first, for 8-bit variants that are not measured. So only the module with the
    class is run, under an empty package of the same name.

    Args:
        distribution: name on the package index.
        module: dotted name of the module that holds the class, two deep.
    Returns:
        the class or None, and what was found in words.
    """
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return None, f"{distribution}: not installed"
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations)
    try:
        peer = importlib.import_module(module).AdamW
        return peer, f"{distribution} {importlib.metadata.version(distribution)}"
    except Exception as error:  # whatever an old package does on today's torch
        return None, f"{distribution}: installed, but its import failed ({type(error).__name__}: {error})"


def contenders(ranks: Sequence[int]) -> tuple[list[Contender], list[str]]:
    """Everything that can be timed here, the baseline first, and a line on each peer."""
    found = [
        Contender(BASELINE, lambda params: AdamW(params, fused=True)),
        Contender("torch AdamW, foreach", lambda params: AdamW(params, foreach=True)),
    ]
    galore, galore_line = load_peer("galore-torch", "galore_torch.adamw")
    apollo, apollo_line = load_peer("apollo-torch", "apollo_torch.apollo")

    def peer(make: Callable[..., Optimizer], **settings: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
        group = {"update_proj_gap": GAP, "proj_type": "std", **settings}
        return lambda params: make([{"params": params, **group}], no_deprecation_warning=True)

    for rank in ranks:
        found.append(Contender(f"LDAdamW, rank {rank}", lambda params, rank=rank: LDAdamW(params, rank=rank)))
        if galore:
            found.append(Contender(f"GaLoreAdamW, rank {rank}", peer(galore, rank=rank, scale=0.25), GAP))
        if apollo:
            settings = {"rank": rank, "scale": 1.0, "scale_type": "channel", "proj": "random"}
            found.append(Contender(f"APOLLOAdamW, rank {rank}", peer(apollo, **settings), GAP))
    return found, [galore_line, apollo_line]


def measure(
    entrants: Sequence[Contender],
    shapes: Shapes,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    warmup: int,
    first_steps: int = FIRST_STEPS,
) -> list[Row]:
    """Time all contenders in turn.

    Args:
        entrants: the first of them is the baseline.
        shapes: the matrices.
        device, dtype: of weights and gradients.
        steps: rounds that count.
        warmup: rounds before them.
        first_steps: how many fresh optimizers take a first step; fewer where one takes very long.
    Returns:
        one row a contender.
    """
    generator = torch.Generator(device).manual_seed(0)
    order = random.Random(0)

    def matrices(scale: float) -> list[Tensor]:
        """One tensor a matrix, normally distributed."""
        sizes = [shape for count, shape in shapes for _ in range(count)]
        return [(torch.randn(s, device=device, generator=generator) * scale).to(dtype) for s in sizes]

    gradients = [matrices(1e-2) for _ in range(GRADIENT_SETS)]

    def fresh(contender: Contender) -> Optimizer:
        return contender.build([nn.Parameter(w) for w in matrices(2e-2)])

    def timed(optimizer: Optimizer, turn: int) -> float:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for param, grad in zip(params, gradients[turn % GRADIENT_SETS], strict=True):
            param.grad = grad
        synchronize(device)
        start = time.perf_counter()
        optimizer.step()
        synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    numbers = range(len(entrants))
    optimizers: dict[int, Optimizer] = {}
    first: list[list[float]] = [[] for _ in numbers]
    for turn in range(first_steps):
        for i in order.sample(numbers, len(numbers)):
            if sum(first[i]) > LONG_MS:
                continue
            optimizers[i] = fresh(entrants[i])
            first[i].append(timed(optimizers[i], turn))
    times: list[list[float]] = [[] for _ in numbers]
    for turn in range(warmup + steps):
        for i in order.sample(numbers, len(numbers)):
            taken = timed(optimizers[i], turn)
            if turn >= warmup:
                times[i].append(taken)

    rows = []
    for i, contender in enumerate(entrants):
        ratios = sorted(mine / base for mine, base in zip(times[i], times[0], strict=True))
        low, high = (ratios[round(q * (len(ratios) - 1))] for q in (0.25, 0.75))
        rows.append(
            Row(
                name=contender.name,
                median_ms=statistics.median(times[i]),
                ratio=statistics.median(ratios),
                ratio_low=low,
                ratio_high=high,
                first_ms=statistics.median(first[i]),
                gap=contender.gap,
                times_ms=times[i],
            )
        )
    return rows


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hardware(device: torch.device) -> str:
    """The device in words: the GPU's name, or the CPU's with the cores there and the threads in use."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model or platform.processor() or platform.machine()}, {cores} cores, {torch.get_num_threads()} threads"


def load() -> str:
    """The machine's load average over a minute, which tells whether it had other work."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def render(rows: Sequence[Row], facts: dict[str, str], notes: Sequence[str]) -> str:
    """The table in Markdown, with what is needed to read and to repeat it."""
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    lines += [
        "",
        "| optimizer | median step, ms | ÷ AdamW fused (quartiles) | first step, ms | first ÷ median |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})"
        lines.append(f"| {row.name} | {row.median_ms:.2f} | {ratio} | {row.first_ms:.1f} | {row.first_in_steps:.1f} |")
    recurring = [row for row in rows if row.gap]
    if recurring:
        lines += ["", f"The first step of GaLore (SVD) and APOLLO (random matrix) recurs every {GAP} steps:"]
        base = rows[0].median_ms
        lines += [f"- {r.name}: mean of {r.gap} steps {r.mean_ms:.2f} ms, {r.mean_ms / base:.2f} ×" for r in recurring]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128], help="ranks of the low-rank optimizers")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights and gradients")
    parser.add_argument("--steps", type=int, default=30, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before them")
    parser.add_argument("--out", type=Path, help="folder for step_time.md and step_time.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, shapes: Shapes = LLAMA_60M) -> dict[str, Any]:
    """Measure, print the table, and return what goes to the JSON file."""
    args = parse(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    entrants, notes = contenders(args.ranks)
    before = load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers use what today's torch deprecates
        rows = measure(entrants, shapes, device, dtype, args.steps, args.warmup)
    facts = {
        "matrices": ", ".join(f"{count} of {rows_}×{columns}" for count, (rows_, columns) in shapes),
        "device": hardware(device),
        "dtype": f"{args.dtype}, float32 products at precision {torch.get_float32_matmul_precision()!r}",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "rounds": f"{args.steps} after {args.warmup} of warm-up; first steps of up to {FIRST_STEPS} fresh optimizers",
        "load average": f"{before} before, {load()} after",
        "command": f"`{shlex.join(['python', *(sys.argv if argv is None else ['benchmarks/step_time.py', *argv])])}`",
    }
    text = render(rows, facts, notes)
    print(text)
    result = {"facts": facts, "notes": notes, "rows": [asdict(r) | {"mean_ms": r.mean_ms} for r in rows]}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "step_time.md").write_text(text)
        (args.out / "step_time.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
