"""Process groups of device meshes: of several dimensions together, and of replicas outside a mesh."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ldadam_dist.layout import WHOLE, Axis

MeshDims = tuple[int, ...]
"""Mesh dimensions that cut one tensor dimension, the outermost cut first."""


def with_replicas(mesh: DeviceMesh, group: Any, name: str) -> DeviceMesh:
    """A mesh with one dimension more, over the processes of a group that have the same place in meshes like it."""
    ranks, here = torch.tensor(dist.get_process_group_ranks(group)), dist.get_rank()
    whole = mesh.mesh[..., None] + (ranks - here)
    if len(whole.unique()) < whole.numel() or bool((whole < 0).any()):
        raise ValueError(
            f"parameter {name} lies on a mesh of ranks {mesh.mesh.flatten().tolist()}, and its replicas on ranks "
            f"{ranks.tolist()}: expected that they share this rank only. With gradient_sync='lowrank' give fully_shard "
            f"the mesh of the shards, mesh['shard'], and LDAdamW that of the replicas, "
            f"replicate_mesh=mesh['replicate']."
        )
    groups = [*(mesh.get_group(d) for d in range(mesh.ndim)), group]
    names = (*(mesh.mesh_dim_names or (f"dim_{d}" for d in range(mesh.ndim))), "replicate")
    return DeviceMesh.from_group(groups, mesh.device_type, mesh=whole, mesh_dim_names=names)


def check_regular(mesh: DeviceMesh) -> None:
    """Owners are found by their ranks in groups, which are sorted: every slice of the mesh must be sorted alike."""
    ranks = mesh.mesh
    first = ranks.flatten()[0]
    regular = torch.full_like(ranks, int(first))
    for dim in range(mesh.ndim):
        line = ranks.movedim(dim, -1).reshape(-1, mesh.size(dim))[0] - first
        if (line.diff() <= 0).any():
            break
        regular += line.view([-1 if d == dim else 1 for d in range(mesh.ndim)])
    else:
        if torch.equal(ranks, regular):
            return
    raise ValueError(
        f"a mesh {tuple(ranks.shape)} of ranks {ranks.flatten()[:16].tolist()}... is irregular: expected ranks that "
        f"rise along every dimension, by the same amounts in every slice. Use init_device_mesh, or slices of its mesh."
    )


def make_axis(mesh: DeviceMesh, dims: MeshDims) -> Axis:
    """The group of the processes that differ in these mesh dimensions only."""
    dims = tuple(d for d in dims if mesh.size(d) > 1)
    cuts = tuple(mesh.size(d) for d in dims)
    if not dims:
        return WHOLE
    if len(dims) == 1:
        return Axis(cuts, mesh.get_local_rank(dims[0]), mesh.get_group(dims[0]))
    here = [slice(None) if d in dims else mesh.get_local_rank(d) for d in range(mesh.ndim)]
    block = mesh.mesh[tuple(here)]  # its dimensions in the order of the mesh
    in_order = block.permute([sorted(dims).index(d) for d in dims]).flatten().tolist()
    ranks = sorted(in_order)  # as a group numbers them
    order = tuple(in_order.index(rank) for rank in ranks)
    index = ranks.index(dist.get_rank())
    return Axis(cuts, index, _joint_group(tuple(ranks)), None if in_order == ranks else order)


_joint_groups: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = weakref.WeakKeyDictionary()
"""Groups over several mesh dimensions, by the world they belong to and their ranks: each has a communicator."""


def _joint_group(ranks: tuple[int, ...]) -> Any:
    world = dist.group.WORLD
    if len(ranks) == dist.get_world_size():
        return world
    groups = _joint_groups.setdefault(world, {})
    if ranks not in groups:
        groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return groups[ranks]
