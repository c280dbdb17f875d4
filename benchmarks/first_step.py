"""Where the time of LDAdamW's first step goes: the first projector, the states, the rest; and how many steps that is.

    python benchmarks/first_step.py --model 7b-layer --ranks 32 256 --out runs/bench

One matrix at a time, of each shape of the model that is not another's transpose. Its first gradient gives the first
projector by a randomised subspace iteration or by a singular value decomposition (`projector_init`), which takes as
long for any rank and is measured for the first one only. Times are medians over fresh optimizers; an ordinary step is
the median of those that follow. Memory that torch has asked for is paid when it is first written, so on a CPU part of
the states' cost is in the rest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Run as a file, Python looks for modules in benchmarks/ alone: name the repository as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import ldadam_dist.optimizer
import ldadam_dist.step
from benchmarks import common
from benchmarks.common import MODELS, Llama, Report, normal, synchronize
from ldadam_dist import LDAdamW

LONG_MS = 5000.0
"""Fresh optimizers whose first steps have taken this long together are enough."""


@dataclass(frozen=True)
class Row:
    """Medians of one shape, rank and way to the first projector, in milliseconds.

    Attributes:
        shape: of the matrix.
        rank: of the projection.
        init: `projector_init`.
        first: the first step.
        projector, states: of it, the first projector and the creation of the states.
        ordinary: a later step.
    """

    shape: tuple[int, ...]
    rank: int
    init: str
    first: float
    projector: float
    states: float
    ordinary: float

    @property
    def rest(self) -> float:
        """Of the first step, what is neither."""
        return self.first - self.projector - self.states


class Clock:
    """Milliseconds by name, from a device that has finished what came before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.taken: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the time of a block."""
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.taken[name] = self.taken.get(name, 0.0) + 1e3 * (time.perf_counter() - start)


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Within it the clock has the times of "projector" and "states" too."""
    projector: Callable[..., Any] = ldadam_dist.step.first_projector
    states: Callable[..., Any] = ldadam_dist.optimizer.init_state

    def timed_projector(*args: Any) -> Any:
        with clock.time("projector"):  # one process, so what it yields is answered at once
            return (yield from projector(*args))

    def timed_states(*args: Any) -> Any:
        with clock.time("states"):
            return states(*args)

    ldadam_dist.step.first_projector = timed_projector
    ldadam_dist.optimizer.init_state = timed_states
    try:
        yield
    finally:
        ldadam_dist.step.first_projector = projector
        ldadam_dist.optimizer.init_state = states


def measure(
    shape: tuple[int, ...], rank: int, init: str, device: torch.device, dtype: torch.dtype, repeats: int, steps: int
) -> Row:
    """Take first steps with up to `repeats` fresh optimizers, and `steps` ordinary ones with the last."""
    firsts: list[dict[str, float]] = []
    ordinary: list[float] = []
    while len(firsts) < repeats and sum(taken["step"] for taken in firsts) < LONG_MS:
        (weight,) = normal([shape], 2e-2, device, dtype)
        param = nn.Parameter(weight)
        optimizer = LDAdamW([param], rank=rank, projector_init=init)
        (param.grad,) = normal([shape], 1e-2, device, dtype)
        clock = Clock(device)
        with watched(clock), clock.time("step"):
            optimizer.step()
        firsts.append(clock.taken)
    for _ in range(steps):
        (param.grad,) = normal([shape], 1e-2, device, dtype)
        clock = Clock(device)
        with clock.time("step"):
            optimizer.step()
        ordinary.append(clock.taken["step"])
    medians = {name: statistics.median(taken[name] for taken in firsts) for name in firsts[0]}
    return Row(shape, rank, init, medians["step"], medians["projector"], medians["states"], statistics.median(ordinary))


def cells(row: Row) -> list[str]:
    """A row as text."""
    size = "×".join(map(str, row.shape))
    times = (row.first, row.projector, row.states, row.rest, row.ordinary)
    return [size, str(row.rank), row.init, *(f"{t:.1f}" for t in times), f"{row.first / row.ordinary:.1f}"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.parser(__doc__, "first_step")
    parser.add_argument("--model", default="7b-layer", choices=list(MODELS), help="whose matrices")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 256], help="ranks of the projection")
    parser.add_argument("--repeats", type=int, default=3, help="fresh optimizers of each kind")
    parser.add_argument("--steps", type=int, default=5, help="ordinary steps of each")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, and return what goes to the JSON file."""
    args = parse(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = Llama.named(args.model, args.scale, args.layers)
    report = Report("first_step", argv, device, args.dtype)
    report.facts["model"] = model.name
    report.facts["repeats"] = f"up to {args.repeats} first steps, {args.steps} ordinary ones"
    torch.manual_seed(0)
    kinds = [("randomized", rank) for rank in args.ranks] + [("svd", args.ranks[0])]
    shapes = list({tuple(sorted(shape)): shape for _, shape in reversed(model.matrices)}.values())[::-1]
    for init, rank in kinds:  # libraries that start with their first use
        measure((2 * rank, 2 * rank), rank, init, device, dtype, 1, 1)
    rows = [
        measure(shape, rank, init, device, dtype, args.repeats, args.steps) for shape in shapes for init, rank in kinds
    ]
    header = (
        *("matrix", "rank", "projector_init", "first step, ms", "first projector", "states", "rest"),
        *("ordinary step, ms", "first ÷ ordinary"),
    )
    report.table(header, map(cells, rows))
    report.result["rows"] = [asdict(row) | {"rest": row.rest} for row in rows]
    return report.write(args.out)


if __name__ == "__main__":
    main()
