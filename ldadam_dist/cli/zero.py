"""Flat partitions as DeepSpeed's ZeRO makes them of a model, without DeepSpeed and without a second rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.adapters.flat import FlatRange
from ldadam_dist.optimizer import LDAdamW
from ldadam_dist.partitions import FlatParam, FlatPartition
from ldadam_dist.quantized import row_bytes
from ldadam_dist.rules import low_rank_matrices, oriented_shape, projected_side, stored_error_dtype, stored_state_dtype

ALIGNED_TO = 2
"""Elements of a partition that DeepSpeed rounds up to, at stages 1 and 2."""


def partition_elements(numels: Sequence[int], stage: int, ranks: int) -> int:
    """Elements that a rank has of a group of parameters with their padding, the same on all ranks.

    Args:
        numels: elements of each parameter.
        stage: of ZeRO. Stages 1 and 2 cut the parameters of a group as one tensor, stage 3 each by itself.
        ranks: number of ranks.
    """
    if stage == 3:
        return sum(-(-numel // ranks) for numel in numels)
    return -(-sum(numels) // (ALIGNED_TO * ranks)) * ALIGNED_TO


def elements_in_partition(numels: Sequence[int], ranks: int) -> Tensor:
    """Elements of the parameters of which each rank has any at stages 1 and 2, (ranks,), these parameters as a whole.

    Args:
        numels: elements of each parameter of a group.
        ranks: number of ranks.
    """
    sizes = torch.tensor(numels, dtype=torch.int64)
    ends = sizes.cumsum(0)[:, None]
    bounds = torch.arange(ranks + 1) * partition_elements(numels, 1, ranks)
    here = (ends > bounds[:-1]) & (ends - sizes[:, None] < bounds[1:]) & (sizes[:, None] > 0)
    return (here * sizes[:, None]).sum(0)


def partitions_of(optimizer: LDAdamW, stage: int, rank: int, ranks: int, group: Any) -> list[FlatPartition]:
    """One flat tensor on the meta device for each group of an optimizer, as `attach_partitions` wants them.

    Args:
        optimizer: with the whole parameters on the meta device.
        stage: of ZeRO.
        rank, ranks: this rank, and their number.
        group: the process group of all of them.
    """
    found = []
    for index, settings in enumerate(optimizer.param_groups):
        size = partition_elements([param.numel() for param in settings["params"]], stage, ranks)
        offset, members = 0, []
        for name, param in zip(settings["param_names"], settings["params"], strict=True):
            if stage == 3:
                length = -(-param.numel() // ranks)
                elements = FlatRange.in_runs(param.numel(), length, ranks, rank, offset)
                offset += length
            else:
                elements = FlatRange.in_partitions(param.numel(), offset, size, ranks, rank)
                offset += param.numel()
            members.append(FlatParam(name, tuple(param.shape), elements))
        tensor = torch.empty(size, device="meta", dtype=settings["params"][0].dtype, requires_grad=True)
        found.append(FlatPartition(tensor, index, tuple(members), group, torch.device("cpu")))
    return found


def state_bytes(optimizer: LDAdamW, partitions: Iterable[FlatPartition], ranks: int) -> Tensor:
    """Bytes of LDAdamW's states on each rank, (ranks,), as `placement` has them of one.

    Args:
        optimizer: whose settings count.
        partitions: on any rank.
        ranks: their number.
    """
    total = torch.zeros(ranks, dtype=torch.int64)
    for partition in partitions:
        group, dtype = optimizer.param_groups[partition.group_index], partition.tensor.dtype
        for param in partition.params:
            starts = torch.tensor(param.elements.starts)
            matrices = low_rank_matrices(param.shape, group)
            if matrices is None:
                total += 2 * stored_state_dtype(dtype, group["state_dtype"], low_rank=False).itemsize * starts.diff()
                continue
            number, *shape = matrices
            for i in range(number):
                first, size = i * math.prod(shape), math.prod(shape)
                total += _matrix_bytes((starts - first).clamp(0, size), shape, group, dtype)
    return total


def _matrix_bytes(starts: Tensor, shape: Sequence[int], group: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Bytes of the states of one matrix on each rank.

    Args:
        starts: (ranks + 1,), the element at which the run of each rank begins, and their number.
        shape: (rows, columns).
        group: its group.
        dtype: of the flat tensor.
    """
    rows, columns = shape
    cut = int((starts.diff() > 0).sum()) > 1
    ranks = len(starts) - 1
    block = (-(-starts // columns)).diff() if cut else rows * (starts.diff() > 0)  # a row is where it begins
    left = projected_side(shape, group["proj_type"]) == "left"
    m, n = oriented_shape(shape, group["proj_type"])
    across = n if left else m  # the dimension that runs do not cut
    if cut:
        piece = -(-across // ranks)
        share = (across - piece * torch.arange(ranks)).clamp(0, piece)
    else:
        share = across * (starts.diff() > 0)
    projector, moments = (block, share) if left else (share, block)
    item = stored_state_dtype(dtype, group["state_dtype"], low_rank=True).itemsize
    found: Tensor = item * group["rank"] * (projector + 2 * moments)
    if group["error_feedback"]:
        found = found + block * row_bytes(
            columns, group["error_dtype"], stored_error_dtype(dtype, group["error_dtype"])
        )
    return found
