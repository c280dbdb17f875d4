"""How a run is spread: a mesh from the command line, and a model on it as its first rank sees it.

The world is one of torch's fake process group, in which no other rank exists and collectives do nothing. The model is
on the meta device and sharded by torch's own `fully_shard`, so nothing here knows how that cuts a tensor.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

SHARDINGS = ("one", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")

AXES = ("replicate", "shard", "tp")

_EXAMPLE = "such as --mesh replicate=4,shard=16"

_world = itertools.count()


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks.

    Attributes:
        sharding: one of `SHARDINGS`.
        replicate, shard, tp: ranks along each axis of the mesh; those of ZeRO are along "shard".
        gradient_sync: as in `LDAdamW`.
    """

    sharding: str
    replicate: int = 1
    shard: int = 1
    tp: int = 1
    gradient_sync: str = "full"

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.replicate * self.shard * self.tp

    @property
    def zero(self) -> int:
        """The stage of ZeRO, 0 for another sharding."""
        return int(self.sharding.removeprefix("zero")) if self.sharding.startswith("zero") else 0

    def __str__(self) -> str:
        names = {"one": "one device", "ddp": "DDP with process_group=", "fsdp2": "FSDP2", "hsdp": "HSDP"}
        name = names.get(self.sharding, f"ZeRO-{self.zero}")
        axes = {"replicate": self.replicate, "shard": self.shard, "tp": self.tp}
        mesh = ", ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1)
        split = sum(size > 1 for size in axes.values()) > 1
        if self.gradient_sync == "lowrank":
            name += ", gradient_sync=lowrank,"
        return f"{name} on {self.ranks} rank{'s' if self.ranks > 1 else ''}" + (f" ({mesh})" if split else "")


MOST_RANKS = 2**17
"""A plan looks at every one of them."""


def parse_layout(sharding: str | None, ranks: int | None, mesh: str | None, gradient_sync: str = "full") -> Layout:
    """The layout that the options ask for.

    Args:
        sharding: one of `SHARDINGS`, or None for what follows from the rest.
        ranks: number of ranks, or None.
        mesh: "replicate=4,shard=16", or None.
        gradient_sync: "full" or "lowrank".
    Raises:
        ValueError: they make none.
    """
    if sharding is not None and sharding not in SHARDINGS:
        raise ValueError(f"--sharding {sharding}: expected one of {', '.join(SHARDINGS)}.")
    if ranks is not None and ranks < 1:
        raise ValueError(f"--ranks {ranks}: expected a positive number.")
    axes = _parse_mesh(mesh)
    if mesh and ranks is not None and math.prod(axes.values()) != ranks:
        raise ValueError(f"--mesh {mesh} has {math.prod(axes.values())} ranks, and --ranks says {ranks}: give one.")
    if sharding is None:
        if axes.get("replicate", 1) > 1:
            sharding = "hsdp" if axes.get("shard", 1) > 1 else "ddp"
        else:
            sharding = "fsdp2" if mesh or (ranks or 1) > 1 else "one"
    if not mesh:
        if sharding == "hsdp":
            raise ValueError(f"--sharding hsdp needs to know both sides of the mesh, {_EXAMPLE}.")
        axes = {"replicate" if sharding == "ddp" else "shard": ranks or 1}
    allowed = {"one": (), "ddp": ("replicate",), "fsdp2": ("shard", "tp"), "hsdp": AXES}.get(sharding, ("shard",))
    wrong = [axis for axis, size in axes.items() if size > 1 and axis not in allowed]
    if wrong:
        found = mesh or f"{axes[wrong[0]]} ranks"
        expected = f"a mesh of {' and '.join(allowed)} only" if allowed else "a single rank"
        raise ValueError(f"--sharding {sharding} with {found}: expected {expected}.")
    if gradient_sync not in ("full", "lowrank"):
        raise ValueError(f"--gradient-sync {gradient_sync}: expected full or lowrank.")
    if gradient_sync == "lowrank" and sharding not in ("ddp", "hsdp"):
        raise ValueError(f"--gradient-sync lowrank with --sharding {sharding}, without replicas: expected ddp or hsdp.")
    if math.prod(axes.values()) > MOST_RANKS:
        raise ValueError(f"{math.prod(axes.values()):,} ranks: expected at most {MOST_RANKS:,}.")
    return Layout(sharding, **axes, gradient_sync=gradient_sync)


def _parse_mesh(mesh: str | None) -> dict[str, int]:
    axes: dict[str, int] = {}
    for item in mesh.split(",") if mesh else ():
        axis, _, size = item.strip().partition("=")
        if axis not in AXES or axis in axes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh {mesh}: expected a number of ranks for {', '.join(AXES)}, once each, {_EXAMPLE}.")
        axes[axis] = int(size)
    return axes


@contextmanager
def world_of(ranks: int, rank: int = 0) -> Iterator[Any]:
    """Within it this process is one rank of a world in which nobody else exists; gives the process group of all.

    Raises:
        RuntimeError: the process is a rank of a real world.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("this process is a rank of a process group already: expected one that is of none.")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def spread(model: nn.Module, layout: Layout, tp_plan: dict[str, str] | None = None) -> dict[str, Any]:
    """Cut a model's parameters as FSDP2, HSDP and tensor parallelism cut them, within `world_of`; others stay whole.

    Args:
        model: on the meta device, or on the CPU.
        layout: its mesh.
        tp_plan: style of each module, as `tp_plan` of a Hugging Face model has them.
    Returns:
        how `LDAdamW` is told of the replicas.
    Raises:
        ValueError: there is tensor parallelism, and no plan, a style that is not known here, or heads that
            it does not divide.
    """
    axes = {"replicate": layout.replicate, "shard": layout.shard, "tp": layout.tp}
    sync = {"gradient_sync": "lowrank"} if layout.gradient_sync == "lowrank" else {}
    if layout.sharding == "ddp":
        return {"process_group": dist.group.WORLD, **sync}
    if layout.sharding not in ("fsdp2", "hsdp"):
        return {}
    sizes = {axis: size for axis, size in axes.items() if size > 1 or (axis == "shard" and layout.sharding == "hsdp")}
    if not sizes:
        sizes = {"shard": 1}
    # Own names for each, as DTensor remembers equal meshes, with the groups of a world that is gone.
    world = next(_world)
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(f"{axis}_{world}" for axis in sizes))
    if layout.tp > 1:
        _cut_by_plan(model, tp_plan or {}, mesh[f"tp_{world}"] if mesh.ndim > 1 else mesh)
    data = tuple(f"{axis}_{world}" for axis in sizes if axis != "tp" and not (sync and axis == "replicate"))
    if data:
        fully_shard(model, mesh=mesh[data] if len(data) < mesh.ndim else mesh)
    return {"replicate_mesh": mesh[f"replicate_{world}"], **sync} if sync else {}


def local_numel(param: Tensor) -> int:
    """Elements of a parameter on this rank."""
    return param.to_local().numel() if isinstance(param, DTensor) else param.numel()


def _cut_by_plan(model: nn.Module, plan: dict[str, str], mesh: DeviceMesh) -> None:
    """Tensor parallelism: rows of the weights of "colwise" layers, columns of those of "rowwise" ones."""
    if not plan:
        raise ValueError(f"{type(model).__name__} has no plan for tensor parallelism: leave tp out of --mesh.")
    _check_heads(model, plan, mesh.size())
    patterns = {said: re.compile(re.escape(said).replace(r"\*", r"\d+")) for said in plan}
    cut: dict[nn.Parameter, nn.Parameter] = {}  # a tied one has several modules
    for name, module in model.named_modules():
        style = next((plan[said] for said, pattern in patterns.items() if pattern.fullmatch(name)), "")
        if not style or style.startswith("replicate"):
            continue
        for attribute, param in list(module.named_parameters(recurse=False)):
            if param not in cut:
                placement = _placement(module, style, attribute, name)
                whole = distribute_tensor(param.detach(), mesh, [placement], src_data_rank=None)
                cut[param] = nn.Parameter(whole, requires_grad=param.requires_grad)
            module.register_parameter(attribute, cut[param])
    names = [name for name, _ in model.named_parameters()]
    for said, pattern in patterns.items():
        if any(map(pattern.fullmatch, names)):
            raise ValueError(
                f"the plan for tensor parallelism of {type(model).__name__} cuts the parameter {said} by "
                f"{plan[said]!r}: expected layers only. Leave tp out of --mesh."
            )


def _check_heads(model: nn.Module, plan: dict[str, str], tp: int) -> None:
    """A layer of queries, keys or values is cut between heads: what a rank has of it is reshaped to whole ones."""
    config: Any = getattr(model, "config", None)
    for layer, count in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        heads = getattr(config, count, None)
        cut = any(said.endswith(layer) and style.startswith("colwise") for said, style in plan.items())
        if cut and isinstance(heads, int) and heads % tp:
            raise ValueError(
                f"tp={tp} does not divide {count}={heads} of {type(model).__name__}: expected one that does."
            )


def _placement(module: nn.Module, style: str, attribute: str, name: str) -> Placement:
    """How one parameter is cut by a style of Hugging Face's plans."""
    layer, embedding = isinstance(module, nn.Linear), isinstance(module, nn.Embedding)
    if (layer and style.startswith("colwise")) or (embedding and style == "embedding_rowwise"):
        return Shard(0)
    if layer and style.startswith("rowwise"):
        return Shard(1) if attribute == "weight" else Replicate()
    raise ValueError(
        f"the plan for tensor parallelism has {style!r} for {name}, a {type(module).__name__}: expected colwise or "
        f"rowwise for linear layers and embedding_rowwise for embeddings. Leave tp out of --mesh."
    )
