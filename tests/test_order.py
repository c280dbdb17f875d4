"""The order of collectives follows from metadata alone: whatever gradient is missing, zero, late or laid out otherwise,
nobody waits for ever. Where the result is defined it is that of one process, after every step.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks, slice_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ldadam_dist import LDAdamW

TOLERANCE = 1e-10
SETTINGS: dict[str, Any] = {"lr": 1e-2, "rank": 2, "weight_decay": 0.1}
ROWS, COLUMNS, GRID = [Shard(0)], [Shard(1)], [Shard(0), Shard(1)]

Shapes = dict[str, tuple[tuple[int, ...], DeviceMesh | None, Sequence[Any]]]
"""By name: global shape, mesh and placements; no mesh for replicas over `process_group`."""


@cache
def mesh_of(extents: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", extents, mesh_dim_names=("rows", "columns", "depth")[: len(extents)])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def part(whole: Tensor, mesh: DeviceMesh | None, placements: Iterable[Any], rank: int) -> Tensor:
    """What a rank holds, as a view; of replicas the columns that it steps. Partial ones sum up to the whole."""
    if mesh is None:
        return chunk(whole, dist.get_world_size(), 1, rank)
    place = (mesh.mesh == rank).nonzero()[0].tolist()
    for placement, index, size in zip(placements, place, mesh.shape, strict=True):
        if isinstance(placement, Shard):
            whole = chunk(whole, size, placement.dim, index)
        elif isinstance(placement, Partial):
            whole = whole * ((1 + index) / sum(range(size + 1)))
    return whole


def chunk(whole: Tensor, parts: int, dim: int, index: int) -> Tensor:
    pieces = whole.chunk(parts, dim)
    return pieces[index] if index < len(pieces) else whole.narrow(dim, 0, 0)


def place(whole: Tensor, mesh: DeviceMesh | None, placements: Sequence[Any]) -> Tensor:
    """A whole tensor as a DTensor, without a word to the other ranks."""
    if mesh is None:
        return whole.clone()
    here = part(whole, mesh, placements, dist.get_rank()).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(here, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def check(name: str, mine: Tensor, whole: Tensor) -> None:
    """What this rank holds is its part of the whole."""
    here, expected = mine.to_local() if isinstance(mine, DTensor) else mine, slice_of(whole.detach(), mine)
    off = (here.detach() - expected).abs().flatten().tolist()
    assert max(off, default=0.0) <= TOLERANCE, f"{name}: {max(off):.1e}"


class Twins:
    """The same parameters whole in one process and on meshes, stepped with the same gradients."""

    def __init__(self, shapes: Shapes, frozen: Sequence[str] = (), **options: Any) -> None:
        self.shapes = shapes
        whole = {name: random(*shape, seed=i) for i, (name, (shape, *_)) in enumerate(shapes.items())}
        self.one = {name: nn.Parameter(tensor.clone()) for name, tensor in whole.items()}
        self.many = {name: nn.Parameter(place(tensor, *shapes[name][1:])) for name, tensor in whole.items()}
        self.freeze(frozen)
        group = None if all(mesh for _, mesh, _ in shapes.values()) else dist.group.WORLD
        self.single = LDAdamW(self.one.items(), **SETTINGS, **options)
        self.optimizer = LDAdamW(self.many.items(), **SETTINGS, process_group=group, **options)

    def freeze(self, names: Sequence[str]) -> None:
        """These, and nothing else."""
        for name, param in [*self.one.items(), *self.many.items()]:
            param.requires_grad_(name not in names)

    def grads(self, step: int) -> dict[str, Tensor | None]:
        """Random gradients of a step."""
        return {name: random(*shape, seed=100 * step + i) for i, (name, (shape, *_)) in enumerate(self.shapes.items())}

    def step(
        self,
        grads: dict[str, Tensor | None],
        lacking: dict[str, int] | None = None,
        placements: dict[str, Sequence[Any]] | None = None,
    ) -> None:
        """Step both and compare weights, errors and, of what is no matrix, moments.

        Args:
            grads: whole gradients.
            lacking: by parameter the rank that has no gradient; in one process, its part is zero.
            placements: of the gradients that have others than their parameters.
        """
        for name, grad in grads.items():
            _, mesh, own = self.shapes[name]
            mine = None if grad is None else place(grad, mesh, (placements or {}).get(name, own))
            if grad is not None and name in (lacking or {}):
                part(grad, mesh, own, lacking[name]).zero_()
                mine = None if dist.get_rank() == lacking[name] else mine
            self.one[name].grad, self.many[name].grad = grad, mine
        self.single.step()
        self.optimizer.step()
        for name, mine in self.many.items():
            states, expected = self.optimizer.state.get(mine, {}), self.single.state.get(self.one[name], {})
            assert states.keys() == expected.keys(), name
            assert not states or torch.equal(states["step"], expected["step"]), name
            check(name, mine, self.one[name])
            for key in ["error"] if "error" in states else states.keys() - {"step"}:  # signs of directions are free
                check(f"{key} of {name}", states[key], expected[key])


def snapshot(optimizer: LDAdamW) -> list[Tensor]:
    """All weights and states on this rank."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    tensors = [t for param in params for t in (param, *optimizer.state.get(param, {}).values())]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def raises(optimizer: LDAdamW) -> str:
    """The message of the RuntimeError that a step raises. Nothing has changed then, and a second step raises it too."""
    before, messages = snapshot(optimizer), []
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            optimizer.step()
        messages.append(str(caught.value))
    check_same(before, snapshot(optimizer))
    assert messages[0] == messages[1]
    return messages[0]


def check_same(before: list[Tensor], after: list[Tensor]) -> None:
    assert len(before) == len(after), "there are other states"
    assert all(map(torch.equal, before, after)), "a weight or a state has changed"


# Cases that have a result in one process


def without_gradient(extents: tuple[int, ...] | None, **options: Any) -> None:
    """On one rank: at the first step, later, on the first and on the last; and on all of them."""
    mesh = mesh_of(extents) if extents else None
    placements = GRID[: mesh.ndim] if mesh else []
    shapes: Shapes = {"wide": ((5, 7), mesh, placements), "tall": ((9, 4), mesh, placements)}
    if mesh:  # a vector that every replica steps whole must have its gradient on all of them
        shapes["norm"] = ((7,), mesh, ROWS * mesh.ndim)
    twins, last = Twins(shapes, **options), dist.get_world_size() - 1
    for step, lacking in enumerate(
        [{"wide": 0}, {"tall": last}, {}, {"wide": last, "tall": 0}, {"norm": 0}, {"wide": 0, "norm": last}, {}]
    ):
        grads = twins.grads(step)
        if step == 5:
            grads["tall"] = None
        twins.step(grads, {name: rank for name, rank in lacking.items() if name in shapes})


def experts_without_gradient() -> None:
    """Two experts, one on each rank: no gradient there is a gradient of zeros, as the other rank has one."""
    twins = Twins({"experts": ((2, 5, 7), mesh_of((2,)), ROWS), "norm": ((7,), mesh_of((2,)), ROWS)})
    for step, lacking in enumerate([{"experts": 1}, {}, {"experts": 0}, {"experts": 1}]):
        twins.step(twins.grads(step), lacking)


def groups_of_the_same_ranks() -> None:
    """Meshes with groups of their own, as of dense matrices and of experts; each rank has them at other addresses."""
    meshes, elsewhere = [], []
    for i in range(8):
        elsewhere += [object() for _ in range(5000 * dist.get_rank() * i)]
        meshes.append(DeviceMesh.from_group(dist.new_group([0, 1]), "cpu", mesh_dim_names=(f"rows {i}",)))
    twins = Twins({f"on mesh {i}": ((5, 7), mesh, ROWS) for i, mesh in enumerate(meshes)})
    twins.step(twins.grads(0))


def laid_out_otherwise_on_half() -> None:
    """Only ranks 0 and 1 have `pair`, whose gradient must be redistributed."""
    half = [DeviceMesh("cpu", ranks, mesh_dim_names=("half",)) for ranks in ([0, 1], [2, 3])][dist.get_rank() // 2]
    shapes: Shapes = {"all": ((5, 7), mesh_of((4,)), ROWS), "pair": ((5, 7), half, ROWS)}
    twins = Twins(shapes if dist.get_rank() < 2 else {"all": shapes["all"]})
    for step in range(2):
        twins.step(twins.grads(step), placements={"pair": [Partial()]})


def freeze_and_thaw() -> None:
    """`first` is frozen before construction and until step 3, `third` at steps 2 and 3, `norm` at the last."""
    shapes: Shapes = {name: ((5, 7), mesh_of((2,)), ROWS) for name in ("first", "second", "third")}
    twins = Twins({**shapes, "norm": ((7,), mesh_of((2,)), ROWS)}, frozen=["first"])
    for step, frozen in enumerate([["first"], ["first"], ["first", "third"], ["third"], [], ["norm"]]):
        twins.freeze(frozen)
        twins.step({name: None if name in frozen else grad for name, grad in twins.grads(step).items()})
        assert step >= 3 or twins.many["first"] not in twins.optimizer.state


def unused_experts(extents: tuple[int, ...], **options: Any) -> None:
    """Three experts over two ranks, and dense matrices around them; one of an expert's shape and cut like it."""
    mesh, flat = mesh_of(extents), len(extents) == 1
    across, stack = mesh if flat else mesh["columns"], ROWS if flat else GRID
    shapes: Shapes = {
        "before": ((8, 6), mesh, ROWS * mesh.ndim),
        "experts": ((3, 6, 8), mesh, stack),
        "columns": ((7, 9), mesh, COLUMNS if flat else [Shard(1), Replicate()]),
        "like an expert": ((6, 8), across, ROWS),
        "idle": ((3, 5, 7), mesh, stack),
        "after": ((6, 8), mesh, COLUMNS if flat else GRID),
        "norm": ((8,), across, ROWS),
    }
    twins = Twins(shapes, **options)
    without_tokens = {0: (0, 1), 1: (2,), 2: (0, 1, 2, 4)}  # the steps, by expert; the last is alone on its rank
    for step in range(6):
        grads = twins.grads(step)
        assert grads["experts"] is not None
        for expert, steps in without_tokens.items():
            grads["experts"][expert] *= step not in steps
        if step in (0, 1, 4):
            grads["idle"] = None
        twins.step(grads)


def arriving_late() -> None:
    """FSDP2, whose ranks come to backward (steps 0 and 1) and to the optimizer (2 and 3) at different times."""
    single, model = models.odd_net(), models.odd_net()
    fully_shard(model)
    rank = dist.get_rank()
    pairs = [(net, LDAdamW(net.named_parameters(), **SETTINGS)) for net in (single, model)]
    for step in range(4):
        for net, optimizer in pairs:
            optimizer.zero_grad()
            batch = models.odd_inputs(step)
            late = 0.15 if net is model and step % 2 == rank else 0.0
            time.sleep(late if step < 2 else 0)
            models.odd_loss(net, batch if net is single else batch.chunk(2)[rank]).backward()
            time.sleep(late if step >= 2 else 0)
            optimizer.step()
        for (name, mine), whole in zip(model.named_parameters(), single.parameters(), strict=True):
            check(name, mine, whole)


def laid_out_otherwise(extents: tuple[int, ...]) -> None:
    """Gradients that are partial or replicated, among others that are not."""
    mesh, own = mesh_of(extents), GRID[: len(extents)]
    twins = Twins(
        {**dict.fromkeys(("plain", "odd", "other"), ((5, 7), mesh, own)), "norm": ((7,), mesh, ROWS * mesh.ndim)}
    )
    summand, copy = [Partial()], [Replicate()]
    for step, placements in enumerate(
        [
            {"odd": summand * mesh.ndim},
            {"odd": copy * mesh.ndim, "other": summand + own[1:]},
            {},
            {"norm": summand * mesh.ndim, "plain": copy + own[1:]},
        ]
    ):
        twins.step(twins.grads(step), placements=placements)


# Cases in which nothing may change


def laid_out_otherwise_and_missing(extents: tuple[int, ...], of_odd: str = "") -> None:
    """At the first step and at a later one, on the first rank and on the last; `odd` lies on a mesh dimension alone."""
    mesh, last = mesh_of(extents), dist.get_world_size() - 1
    odd = mesh[of_odd] if of_odd else mesh
    shapes: Shapes = {"plain": ((5, 7), mesh, GRID[: mesh.ndim]), "odd": ((5, 7), odd, GRID[: odd.ndim])}
    twins = Twins(shapes)
    for step, lacking in enumerate((0, last)):
        for name, param in twins.many.items():
            _, where, own = shapes[name]
            param.grad = place(random(5, 7, seed=8), where, own if name == "plain" else [Partial()] * odd.ndim)
        if dist.get_rank() == lacking:
            twins.many["odd"].grad = None
        message = raises(twins.optimizer)
        assert lacking not in odd.mesh or "parameter odd has a gradient of other placements" in message, message
        twins.step(twins.grads(step))


def not_finite() -> None:
    """On each rank of a (2, 2) mesh, in each parameter, also if there is none on the whole mesh."""
    mesh = mesh_of((2, 2))
    shapes: Shapes = {
        "grid": ((6, 8), mesh, GRID),
        "norm of rows": ((6,), mesh["rows"], ROWS),
        "norm of columns": ((6,), mesh["columns"], [Replicate()]),
        "matrix of rows": ((6, 8), mesh["rows"], ROWS),
    }
    for order in (list(shapes), list(shapes)[::-1], ["matrix of rows", "norm of columns"]):
        twins = Twins({key: shapes[key] for key in order})
        twins.step(twins.grads(0))
        before = snapshot(twins.optimizer)
        for skipped, (name, bad) in enumerate(((name, bad) for name in order for bad in range(4)), start=1):
            for key, param in twins.many.items():
                value = float("nan") if (key, dist.get_rank()) == (name, bad) else 1.0
                param.grad = place(random(*param.shape, seed=9) * value, *shapes[key][1:])
            with pytest.warns(UserWarning, match="skipped this step"):
                twins.optimizer.step()
            assert twins.optimizer.skipped_steps == skipped
            check_same(before, snapshot(twins.optimizer))
        twins.step(twins.grads(2))


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 3}, r"parameter 0 .* has w of .*, rank=2,.*; rank \d has w of .*, rank=3,"),
    "rank that v is too small for": ({"rank": 6}, r"parameter 0 .*, rank=2,.*, rank=6,"),
    "proj_type": ({"proj_type": "right"}, r"parameter 0 .*proj_type='std'.*proj_type='right'"),
    "lr": ({"lr": 0.02}, r"parameter 0 .*\blr=0\.01,.*\blr=0\.02,"),
    "communication": ({"communication": "gather"}, "communication='auto'.*communication='gather'"),
    "window_elements": ({"window_elements": 100}, r"window_elements=33554432; .*window_elements=100\."),
    "order": ({"order": ["v", "w", "norm"]}, r"parameter 0 .* has w of .* has v of "),
    "one more": ({"order": ["w", "v", "norm", "extra"]}, r"parameter 3 .* has nothing; rank \d has extra of shape"),
    "one less": ({"order": ["w", "norm"]}, r"parameter 1 .* has v of .*; rank \d has norm of "),
    "frozen": ({"frozen": ["w"]}, r"parameter 0 .* has w of .*; rank \d has v of "),
    "shape": ({"w": (8, 14)}, r"has w of shape \(8, 12\),.* has w of shape \(8, 14\)"),
    "placements": ({"placements": COLUMNS}, r"has w .*\(Shard\(dim=0\),.* has w .*\(Shard\(dim=1\),"),
    "dtype": ({"dtype": torch.float32}, r"has w .*float64.* has w .*float32"),
}
"""What the last rank builds otherwise, and what the message must tell of the two."""


def mismatches(extents: tuple[int, ...]) -> None:
    """Each is told on the ranks that share a mesh dimension with the last, which differs; the others stop too."""
    mesh, last = mesh_of(extents), dist.get_world_size() - 1
    shares = any(last in mesh[dim].mesh for dim in mesh.mesh_dim_names or ())
    for name, (otherwise, pattern) in MISMATCHES.items():
        usual = {"w": (8, 12), "order": ["w", "v", "norm"], "frozen": [], "placements": ROWS, "dtype": torch.float64}
        options = {**usual, **SETTINGS, **(otherwise if dist.get_rank() == last else {})}
        shape, order, frozen, placements, dtype = (options.pop(key) for key in usual)
        shapes = {"w": shape, "v": (6, 9), "norm": (6,), "extra": (4, 4)}
        params = {}
        for key in order:
            where = [*(placements if key == "w" else ROWS), Replicate(), Replicate()][: mesh.ndim]
            params[key] = nn.Parameter(place(random(*shapes[key], seed=1).to(dtype), mesh, where), key not in frozen)
            params[key].grad = place(random(*shapes[key], seed=2).to(dtype), mesh, where)
        message = raises(LDAdamW(params.items(), **options))
        assert "Every rank must build the same model and the same parameter groups, in the same order" in message, (
            message
        )
        expected = (
            rf"ranks \d and {last} differ in .*{pattern}"
            if shares
            else "ranks with which this one shares no mesh dimension differ"
        )
        assert re.match(expected, message), f"{name}: {message}"


def equal_cases(extents: tuple[int, ...]) -> None:
    for how in ("lowrank", "gather"):
        for window in (1, 100, 2**25):
            unused_experts(extents, communication=how, window_elements=window)
        for side in ("left", "right"):
            without_gradient(extents, communication=how, proj_type=side)
    laid_out_otherwise(extents)
    if extents == (2,):
        without_gradient(None, proj_type="left")
        freeze_and_thaw()
        arriving_late()


@pytest.mark.parametrize(
    ("world_size", "function", "args"),
    [
        (2, equal_cases, ((2,),)),
        (4, equal_cases, ((2, 2),)),
        (2, groups_of_the_same_ranks, ()),
        (2, experts_without_gradient, ()),
        (4, laid_out_otherwise_on_half, ()),
    ],
)
def test_equals_one_process_after_every_step(world_size: int, function: Any, args: Any) -> None:
    run_ranks(world_size, function, *args)


@pytest.mark.parametrize(
    ("world_size", "function", "args"),
    [
        (2, laid_out_otherwise_and_missing, ((2,),)),
        (4, laid_out_otherwise_and_missing, ((2, 2),)),
        (4, laid_out_otherwise_and_missing, ((2, 2), "columns")),
        (4, not_finite, ()),
        (2, mismatches, ((2,),)),
        (4, mismatches, ((2, 2),)),
        (8, mismatches, ((2, 2, 2),)),
    ],
)
def test_all_ranks_stop_and_nothing_changes(world_size: int, function: Any, args: Any) -> None:
    run_ranks(world_size, function, *args)
