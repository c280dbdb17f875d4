"""Where the time of a step of LDAdamW goes, from torch.profiler: a table, and a trace for ui.perfetto.dev.

    python benchmarks/where_time_goes.py --model llama-60m --rank 128 --out runs/bench

Each operator counts for the time it spends itself, without what it calls, in one of these:

    products over m×n   matrix products with a whole matrix among their operands or as their result
    small products      all other ones, outside of the orthonormalisation
    orthonormalisation  everything within it, whichever operators it uses
    element-wise        all other operators, copies too
    collectives         packing, sending and waiting for others; with --processes 2 and more, as fsdp over gloo
    Python              the time of the step in which the process is in no operator
    waiting             for the device

On CUDA `host` is the time that the process takes to launch the work and `device` that of the kernels; what the device
lacks to the time of the step it waits. A CPU has one thread here (`common.one_thread`). A profiled step is slower than
another: the shares tell, not the sum.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Run as a file, Python looks for modules in benchmarks/ alone: name the repository and the tests' helpers as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import ldadam_dist.runtime.schedule
import ldadam_dist.step
from benchmarks import common, scaling
from benchmarks.common import MODELS, Llama, Options, Report, each, normal, one_thread, synchronize
from benchmarks.contenders import give, ldadamw

KINDS = (
    "products over m×n",
    "small products",
    "orthonormalisation",
    "element-wise",
    "collectives",
    "Python",
    "waiting",
)
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")
STEP, WHOLE = "a step", "a matrix on its owner"
ORTHONORMALISATION, COLLECTIVES = KINDS[2], KINDS[4]
SCOPES = (
    (ldadam_dist.step, "orthonormalize", ORTHONORMALISATION),
    (ldadam_dist.step, "leading_directions", ORTHONORMALISATION),
    (ldadam_dist.step, "alone", WHOLE),
    (ldadam_dist.runtime.schedule, "_answer", COLLECTIVES),
)
"""Functions that are named in the trace, and how."""


@contextmanager
def named_scopes() -> Iterator[None]:
    """Within it the trace has `SCOPES`."""
    kept = [(module, name, getattr(module, name)) for module, name, _ in SCOPES]

    def named(function: Callable[..., Any], scope: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with record_function(scope):
                result = function(*args, **kwargs)
            return resumed(result, scope) if isinstance(result, Generator) else result

        return called

    def resumed(waiting: Generator[None, None, Any], scope: str) -> Generator[None, None, Any]:
        """What pauses while its collectives are on their way."""
        while True:
            try:
                with record_function(scope):
                    next(waiting)
            except StopIteration as end:
                return end.value
            yield

    for (module, name, function), (*_, scope) in zip(kept, SCOPES, strict=True):
        setattr(module, name, named(function, scope))
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


def record(
    optimizer: Any,
    give_gradients: Callable[[], None],
    device: torch.device,
    steps: int,
    warmup: int,
    trace: Path | None,
) -> tuple[Any, list[float]]:
    """Profile some steps.

    Args:
        optimizer: steps parameters.
        give_gradients: gives them gradients.
        device: where they are.
        steps, warmup: what is profiled, and what comes before.
        trace: file for Perfetto, or None.
    Returns:
        torch's events, and the milliseconds of each step.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with named_scopes():
        for _ in range(warmup):
            give_gradients()
            optimizer.step()
        times = []
        with one_thread(device), profile(activities=activities, record_shapes=True) as profiler:
            for _ in range(steps):
                give_gradients()
                synchronize(device)
                start = time.perf_counter()
                with record_function(STEP):
                    optimizer.step()
                    synchronize(device)
                times.append(1e3 * (time.perf_counter() - start))
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return profiler.events(), times


def shares(events: Any, matrices: Sequence[tuple[int, ...]], steps: int) -> dict[str, tuple[float, float]]:
    """(host, device) milliseconds a step by kind.

    Args:
        events: of `record`.
        matrices: shapes of the matrices as they lie on this process.
        steps: how many were recorded.
    """
    whole = {tuple(sorted(shape)) for shape in matrices}
    found = dict.fromkeys(KINDS, (0.0, 0.0))
    for event in events:
        names = [event.name, *_around(event)]
        if event.device_type != torch.autograd.DeviceType.CPU or STEP not in names:
            continue
        kind = _kind(event, names, whole)
        host, device = found[kind]
        kernels = 0.0 if event.is_user_annotation else event.self_device_time_total
        found[kind] = (host + event.self_cpu_time_total / 1e3 / steps, device + kernels / 1e3 / steps)
    return found


def _around(event: Any) -> Iterator[str]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def _kind(event: Any, names: Sequence[str], whole: set[tuple[int, ...]]) -> str:
    """Of an event, from its own name and those around it, from within."""
    if "Synchronize" in event.name:
        return "waiting"
    scope = next(name for name in names if name in (STEP, WHOLE, ORTHONORMALISATION, COLLECTIVES))
    if scope == ORTHONORMALISATION:
        return scope
    operator = next((name for name in names if not name.startswith("cu")), "")  # of CUDA's calls, who makes them
    if operator.removeprefix("aten::") in PRODUCTS:
        return "products over m×n" if _over_whole(event, whole) else "small products"
    if scope == COLLECTIVES:
        return scope
    return "Python" if operator in (STEP, WHOLE) or operator.startswith("Optimizer.step#") else "element-wise"


def _over_whole(event: Any, whole: set[tuple[int, ...]]) -> bool:
    """Whether a product takes or gives a whole matrix."""
    while not event.name.startswith("aten::"):
        event = event.cpu_parent
    taken = [tuple(shape[-2:]) for shape in event.input_shapes if len(shape) >= 2]
    given = [(taken[-2][0], taken[-1][1])] if len(taken) > 1 else []
    return any(tuple(sorted(shape)) in whole for shape in (*taken, *given))


def on_one_process(model: Llama, rank: int, options: Options, device: torch.device, dtype: torch.dtype) -> Any:
    """LDAdamW, how it gets gradients, and the shapes of its matrices here."""
    shapes, contender = each(model.matrices), ldadamw(rank, options)
    params = [nn.Parameter(weight) for weight in normal(shapes, 2e-2, device, dtype)]
    gradients = normal(shapes, 1e-2, device, dtype)
    optimizer = contender.build(params, [])
    return optimizer, functools.partial(give, optimizer, params, gradients, contender.gradients), shapes


def on_a_rank(setting: scaling.Setting, trace: Path | None) -> tuple[dict[str, tuple[float, float]], list[float]]:
    """The same on one of several processes; the first writes the trace."""
    params, optimizer, give_gradients = scaling.build(setting)
    shapes = [tuple(scaling.local(param.detach()).shape) for param in params]
    trace = trace if dist.get_rank() == 0 else None
    events, times = record(optimizer, give_gradients, torch.device("cpu"), setting.steps, setting.warmup, trace)
    return shares(events, shapes, setting.steps), times


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.parser(__doc__, "where_time_goes")
    parser.add_argument("--model", default="llama-60m", choices=list(MODELS), help="whose projected matrices")
    parser.add_argument("--rank", type=int, default=128, help="of the projection")
    parser.add_argument("--options", type=Options.parse, default=Options(""), help="LDAdamW's, as error_dtype=bfloat16")
    parser.add_argument("--processes", type=int, default=1, help="over gloo on this machine's CPU, in float32, if > 1")
    parser.add_argument("--steps", type=int, default=3, help="steps that are profiled")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    args = parser.parse_args(argv)
    if args.processes > 1 and (args.device != "cpu" or args.dtype != "float32"):
        parser.error(f"--processes {args.processes} runs on --device cpu in --dtype float32 only")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Profile, print the table, write the trace, and return what goes to the JSON file."""
    args = parse(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = Llama.named(args.model, args.scale, args.layers)
    report = Report("where_time_goes", argv, device, args.dtype)
    report.facts["model"] = f"{model.name}: {common.in_words(model.matrices)}"
    report.facts["optimizer"] = f"LDAdamW, rank {args.rank}{args.options.text and ', ' + args.options.text}"
    report.facts["processes"] = f"{args.processes}" + (
        ", fsdp over gloo, the first of them" if args.processes > 1 else ""
    )
    trace = None
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        trace = args.out / "where_time_goes.trace.json"
        report.facts["trace"] = f"{trace}, for https://ui.perfetto.dev"
    if args.processes > 1:
        setting = scaling.Setting(model, "fsdp", args.rank, args.options.values, args.steps, args.warmup)
        found, times = run_ranks(args.processes, on_a_rank, setting, trace)[0]
    else:
        torch.manual_seed(0)
        optimizer, give_gradients, shapes = on_one_process(model, args.rank, args.options, device, dtype)
        events, times = record(optimizer, give_gradients, device, args.steps, args.warmup, trace)
        found = shares(events, shapes, args.steps)
    host, kernels = (sum(column) for column in zip(*found.values(), strict=True))
    median = statistics.median(times)
    rows = [
        [kind, f"{h:.2f}", f"{100 * h / host:.1f} %", f"{d:.2f}", f"{100 * d / kernels:.1f} %" if kernels else "–"]
        for kind, (h, d) in found.items()
    ]
    rows.append(["sum", f"{host:.2f}", "", f"{kernels:.2f}", ""])
    report.table(("part", "host, ms a step", "of it", "device, ms a step", "of it"), rows)
    report.lines([f"A profiled step took {median:.2f} ms, the median of {args.steps}."])
    report.result.update(parts=found, step_ms=median)
    return report.write(args.out)


if __name__ == "__main__":
    main()
