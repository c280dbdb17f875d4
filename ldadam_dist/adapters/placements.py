"""How a DTensor's placements cut its dimensions: which mesh dimensions cut each of them, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard


def mesh_dims_by_tensor_dim(
    placements: Sequence[Placement], mesh_shape: Sequence[int], ndim: int
) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """The mesh dimensions that cut each tensor dimension, the outermost cut first, and those that replicate.

    Plain shards of one tensor dimension are cut in the order of the mesh. A strided shard, as FSDP2 makes it of what
    tensor parallelism has cut before, comes after mesh dimensions to its right that make `split_factor` pieces.

    Args:
        placements: one for each mesh dimension.
        mesh_shape: extent of each mesh dimension.
        ndim: dimensions of the tensor.
    Returns:
        for each tensor dimension its mesh dimensions, and the mesh dimensions that replicate.
    Raises:
        ValueError: a placement that is none of Shard, _StridedShard and Replicate, or a stride that does not fit.
    """
    cuts: list[list[int]] = [[] for _ in range(ndim)]
    replicas: list[int] = []
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if type(placement) is Replicate:
            replicas.insert(0, mesh_dim)
        elif type(placement) is Shard:
            cuts[placement.dim].insert(0, mesh_dim)
        elif type(placement) is _StridedShard:
            cut = cuts[placement.dim]
            cut.insert(_after(int(placement.split_factor), [mesh_shape[d] for d in cut], placement), mesh_dim)
        else:
            raise ValueError(f"placement {placement}: expected Shard(dim) or Replicate() for a parameter")
    return [tuple(cut) for cut in cuts], tuple(replicas)


def check_part(what: str, state: DTensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    """Raise ValueError if a tensor that is to be loaded is laid out otherwise, or another process's part."""
    saved, position, here = state.device_mesh, state.device_mesh.get_coordinate(), mesh.get_coordinate()
    same_mesh = torch.equal(saved.mesh, mesh.mesh) and tuple(state.placements) == tuple(placements)
    # Names of mesh dimensions may differ, and so may the replica.
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if same_mesh and position and here and all(position[dim] == here[dim] for dim in cut):
        return
    saver = int(saved.mesh[tuple(position)]) if position is not None else "of another mesh"
    raise ValueError(
        f"{what} is the part that rank {saver} had of it on a mesh {tuple(saved.shape)} with placements "
        f"{state.placements}: expected that of rank {dist.get_rank()} on {tuple(mesh.shape)} with {placements}. "
        f"torch.save keeps only the part of the rank that saves: use torch.distributed.checkpoint, or under DDP an "
        f"LDAdamW without process_group=."
    )


def _after(split_factor: int, sizes: Sequence[int], placement: Placement) -> int:
    pieces = 1
    for position, size in enumerate((*sizes, 1)):
        if pieces == split_factor:
            return position
        pieces *= size
    raise ValueError(f"placement {placement}: no mesh dimensions to its right make {split_factor} pieces")
