"""How a DTensor's placements cut its dimensions: which mesh dimensions cut each of them, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

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


def _after(split_factor: int, sizes: Sequence[int], placement: Placement) -> int:
    pieces = 1
    for position, size in enumerate((*sizes, 1)):
        if pieces == split_factor:
            return position
        pieces *= size
    raise ValueError(f"placement {placement}: no mesh dimensions to its right make {split_factor} pieces")
