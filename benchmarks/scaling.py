"""Bytes sent and time taken by a step of LDAdamW as the number of processes grows, by kind of mesh.

    python benchmarks/scaling.py --model llama-60m --rank 128 --processes 1 2 4 --fake 8 64 256 --out runs/bench

Real processes on this machine talk over gloo, with one thread each; more of them than cores share these. A step of
LDAdamW and one of torch's fused AdamW on the same shards alternate; the time of a step is that of the slowest process,
and ratios are taken within a round. Bytes are those that `ldadam_dist.Traffic` counts: an all-reduce twice, other
collectives once at their whole size. With fake ranks this process is one rank after the other, the first, a middle one
and the last, of a world in which nobody else exists, so that hundreds need no hardware. Nothing is stepped there: bytes
are those that `LDAdamW.placement()` foretells from metadata, which tests/test_wire.py holds to what is counted.

    fsdp    matrices cut by rows          ddp    replicas; states partitioned over them (process_group=)
    hsdp    two replicas of such shards   tp     rows of query, key, value, gate and up; columns of output and down
    sync    replicas whose gradients nobody has averaged (gradient_sync="lowrank"); with ddp, DDP has, which the column
            "for gradients" counts
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Run as a file, Python looks for modules in benchmarks/ alone: name the repository and the tests' helpers as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import AdamW

from benchmarks import common
from benchmarks.common import MODELS, Llama, Options, Report, each
from benchmarks.contenders import give, giving
from ldadam_dist import LDAdamW, Traffic
from ldadam_dist.tables import format_bytes

KINDS = ("fsdp", "hsdp", "ddp", "sync", "tp")

_world = itertools.count()


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: whose matrices.
        kind: of the mesh, one of `KINDS`.
        rank, options: of LDAdamW.
        steps, warmup: rounds that count, and rounds before them.
    """

    model: Llama
    kind: str
    rank: int
    options: dict[str, Any]
    steps: int
    warmup: int


@dataclass(frozen=True)
class Row:
    """What was found for one number of processes.

    Attributes:
        kind, processes: the mesh.
        sent: bytes that one step sends, of one rank.
        for_gradients: bytes that averaging the gradients has sent before; None where they are reduced to shards.
        states, adamw_states: bytes on the fullest rank, with LDAdamW and with AdamW.
        calls: collectives of a step; this and what follows is None with fake ranks.
        step_ms, adamw_ms: medians.
        ratio: median over the rounds.
    """

    kind: str
    processes: int
    sent: int
    for_gradients: int | None
    states: int
    adamw_states: int
    calls: int | None = None
    step_ms: float | None = None
    adamw_ms: float | None = None
    ratio: float | None = None


def mesh_of(kind: str, processes: int) -> DeviceMesh:
    """hsdp has two replicas, and takes an even number."""
    shape = (2, processes // 2) if kind == "hsdp" else (processes,)
    # Names that no earlier world had, as DTensor remembers equal meshes, with the groups of a world that is gone.
    world = next(_world)
    return init_device_mesh("cpu", shape, mesh_dim_names=[f"{world}.{dim}" for dim in range(len(shape))])


def parameters(setting: Setting, device: str = "cpu") -> list[nn.Parameter]:
    """The matrices as the kind of mesh cuts them, the same on all ranks where they are replicas."""
    torch.manual_seed(0)
    if setting.kind in ("ddp", "sync"):
        return [nn.Parameter(torch.randn(shape, device=device) * 2e-2) for shape in each(setting.model.matrices)]
    mesh = mesh_of(setting.kind, dist.get_world_size())
    found = []
    for number, shape in enumerate(each(setting.model.matrices)):
        columns = setting.kind == "tp" and (shape[1] > shape[0] or (shape[0] == shape[1] and number % 4 == 3))
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(int(columns))]
        here, _ = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
        found.append(nn.Parameter(sharded(torch.randn(here, device=device) * 2e-2, shape, mesh, placements)))
    return found


def sharded(here: Tensor, shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Any]) -> Tensor:
    """A DTensor of a global shape from what lies here; asks nobody."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(here, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradients(params: Sequence[nn.Parameter]) -> list[Tensor]:
    """New ones, cut as their parameters."""
    found = []
    for param in params:
        data = param.detach()
        grad = torch.randn_like(local(data)) * 1e-2
        if isinstance(data, DTensor):
            grad = sharded(grad, data.shape, data.device_mesh, data.placements)
        found.append(grad)
    return found


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state here, without step counts."""
    states = [local(t) for state in optimizer.state.values() for t in state.values() if t.ndim]
    return sum(t.numel() * t.element_size() for t in states)


def build(setting: Setting, device: str = "cpu") -> tuple[list[nn.Parameter], LDAdamW, Callable[[], None]]:
    """The parameters, LDAdamW for them, and what gives them new gradients."""
    params = parameters(setting, device)
    group: dict[str, Any] = {"process_group": dist.group.WORLD} if setting.kind in ("ddp", "sync") else {}
    if setting.kind == "sync":
        group["gradient_sync"] = "lowrank"
    optimizer = LDAdamW(params, rank=setting.rank, **group, **setting.options)

    def give_gradients() -> None:
        give(optimizer, params, gradients(params), giving(setting.options))

    return params, optimizer, give_gradients


def on_a_rank(setting: Setting) -> dict[str, Any]:
    """On a real rank: milliseconds of every round, and what was sent and is held."""
    params, optimizer, give_gradients = build(setting)
    twins = [nn.Parameter(local(param.detach()).clone()) for param in params]
    adamw = AdamW(twins, fused=True)

    def timed(step: Callable[[], Any]) -> float:
        dist.barrier()
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)

    times: list[tuple[float, float]] = []
    for _ in range(1 + setting.warmup + setting.steps):
        give_gradients()
        for twin, grad in zip(twins, gradients(params), strict=True):
            twin.grad = local(grad)
        times.append((timed(optimizer.step), timed(adamw.step)))
    give_gradients()
    with Traffic() as traffic:
        optimizer.step()
    sent = {"sent": traffic.bytes, "calls": traffic.calls}
    return {"times": times[1 + setting.warmup :], **sent, "states": held(optimizer), "adamw_states": held(adamw)}


def real(setting: Setting, processes: int) -> Row:
    """Measure with real processes."""
    found = run_ranks(processes, on_a_rank, setting)
    slowest = [
        [max(times) for times in zip(*one, strict=True)] for one in zip(*(f["times"] for f in found), strict=True)
    ]
    most = {key: max(rank[key] for rank in found) for key in ("sent", "calls", "states", "adamw_states")}
    return Row(
        setting.kind,
        processes,
        for_gradients=for_gradients(setting, processes),
        **most,
        step_ms=statistics.median(mine for mine, _ in slowest),
        adamw_ms=statistics.median(theirs for _, theirs in slowest),
        ratio=statistics.median(mine / theirs for mine, theirs in slowest),
    )


def fake(setting: Setting, processes: int) -> Row:
    """From metadata, on some ranks of a world of fake ones."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found = []
    for number in sorted({0, processes // 2, processes - 1}):
        dist.init_process_group("fake", store=FakeStore(), rank=number, world_size=processes)
        try:
            params, optimizer, _ = build(setting, "meta")
            placed = optimizer.placement()
            adamw = sum(2 * local(param.detach()).numel() * param.element_size() for param in params)
            found.append((sum(row.wire_bytes for row in placed), sum(row.state_bytes for row in placed), adamw))
        finally:
            dist.destroy_process_group()
    sent, states, adamw_states = (round(max(column)) for column in zip(*found, strict=True))
    return Row(setting.kind, processes, sent, for_gradients(setting, processes), states, adamw_states)


def for_gradients(setting: Setting, processes: int) -> int | None:
    """Bytes that averaging the gradients of the matrices takes outside the optimizer; an all-reduce counts twice."""
    elements = sum(rows * columns for rows, columns in each(setting.model.matrices))
    return {"ddp": 8 * elements * (processes > 1), "sync": 0}.get(setting.kind)


def cells(row: Row) -> list[str]:
    """A row as text."""
    times = ("–" if value is None else f"{value:.1f}" for value in (row.step_ms, row.adamw_ms, row.ratio))
    calls = "–" if row.calls is None else str(row.calls)
    states = (format_bytes(row.states), f"{row.states / row.adamw_states:.2f}")
    before = "–" if row.for_gradients is None else format_bytes(row.for_gradients)
    return [row.kind, str(row.processes), format_bytes(row.sent), before, calls, *states, *times]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.parser(__doc__, "scaling", device=False)
    parser.add_argument("--model", default="llama-60m", choices=list(MODELS), help="whose projected matrices")
    parser.add_argument("--rank", type=int, default=128, help="of the projection")
    parser.add_argument("--options", type=Options.parse, default=Options(""), help="LDAdamW's, as communication=gather")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="of meshes")
    parser.add_argument(
        "--processes", type=int, nargs="*", default=[1, 2, 4], help="real ones; hsdp takes even numbers"
    )
    parser.add_argument("--fake", type=int, nargs="*", default=[8, 64, 256], help="numbers of ranks in fake worlds")
    parser.add_argument("--steps", type=int, default=5, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them, after the first")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, and return what goes to the JSON file."""
    args = parse(argv)
    model = Llama.named(args.model, args.scale, args.layers)
    report = Report("scaling", argv, torch.device("cpu"), "float32")
    report.facts["model"] = f"{model.name}: {common.in_words(model.matrices)}"
    report.facts["optimizer"] = f"LDAdamW, rank {args.rank}{args.options.text and ', ' + args.options.text}"
    report.facts["rounds"] = f"{args.steps} after {1 + args.warmup}; one thread a process"
    rows: dict[str, list[Row]] = {"Real processes, gloo": [], "Fake ranks": []}
    for kind in args.kinds:
        setting = Setting(model, kind, args.rank, args.options.values, args.steps, args.warmup)
        for title, numbers, measured in zip(rows, (args.processes, args.fake), (real, fake), strict=True):
            rows[title] += [measured(setting, n) for n in numbers if kind != "hsdp" or n % 2 == 0]
    header = (
        *("mesh", "processes", "sent a step and rank", "for gradients", "calls", "states of a rank", "of AdamW"),
        *("step, ms", "AdamW fused, ms", "÷ AdamW"),
    )
    for title, found in rows.items():
        if found:
            report.table(header, map(cells, found), title)
    report.result["rows"] = [asdict(row) | {"real": title[0] == "R"} for title, found in rows.items() for row in found]
    return report.write(args.out)


if __name__ == "__main__":
    main()
