"""Flat tensors that an engine has put in the place of parameters, and the parameters in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.adapters.flat import FlatAdapter, FlatRange
from ldadam_dist.entries import Entry
from ldadam_dist.rules import low_rank_matrices, matrices_of
from ldadam_dist.runtime import ranks_of


@dataclass(frozen=True)
class FlatParam:
    """A parameter in a flat tensor.

    Attributes:
        name: unique among all parameters.
        shape: its own.
        elements: where its row-major elements are.
    """

    name: str
    shape: tuple[int, ...]
    elements: FlatRange


@dataclass(frozen=True)
class FlatPartition:
    """This process's partition of a flat tensor.

    Attributes:
        tensor: the partition, 1-D; it is what the optimizer's group holds while it steps.
        group_index: number of that group.
        params: the parameters in the flat tensor, on whatever process, in the same order on all.
        process_group: the processes over which it is partitioned.
        device: where its matrices are stepped, and where the process group communicates.
    """

    tensor: Tensor
    group_index: int
    params: tuple[FlatParam, ...]
    process_group: Any
    device: torch.device


class Partitions:
    """All flat tensors of an optimizer; false if there are none.

    Args:
        partitions: in the same order on all processes.
        param_groups: the optimizer's groups.
        overflowed: tells, in a step, whether the engine saw a gradient that is not finite, also in tensors that are
            stepped by themselves later; the same on all processes.

    Raises:
        ValueError: a parameter that does not fit into its flat tensor, or two of one name.
    """

    def __init__(
        self,
        partitions: Sequence[FlatPartition] = (),
        param_groups: Sequence[Mapping[str, Any]] = (),
        overflowed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._partitions, self.overflowed = tuple(partitions), overflowed
        self._number_of_groups = len(param_groups)
        self._settings = {p.tensor: _fixed(param_groups[p.group_index]) for p in partitions}
        self._entries = {
            partition.tensor: list(_entries_of(partition, param_groups[partition.group_index]))
            for partition in partitions
        }
        names = [name for entries in self._entries.values() for name, *_ in entries]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise ValueError(f"parameter {twice[0]} is in several flat tensors, or twice in one: expected it once.")

    def __bool__(self) -> bool:
        return bool(self._partitions)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._entries

    def number(self, tensor: Tensor) -> int:
        """Number of a flat tensor in the order in which the engine steps them; 0 for any other tensor."""
        return next((i for i, partition in enumerate(self._partitions) if partition.tensor is tensor), 0)

    def with_groups(self, param_groups: Sequence[dict[str, Any]]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Each flat tensor with its group.

        Raises:
            RuntimeError: the engine is stepping one group by itself just now.
        """
        if len(param_groups) != self._number_of_groups:
            raise RuntimeError("the engine is stepping one parameter group now, and shows no other. Ask between steps.")
        for partition in self._partitions:
            yield partition.tensor, param_groups[partition.group_index]

    def entries(self, tensor: Tensor, group: dict[str, Any], state: Mapping[str, Any]) -> Iterator[Entry]:
        """What is stepped of a flat tensor, whether or not any of it lies on this process.

        Args:
            tensor: the flat tensor.
            group: its parameter group.
            state: its state, by name of what is stepped.
        Raises:
            ValueError: settings of the group were changed that are fixed since the engine was attached.
        """
        if _fixed(group) != self._settings[tensor]:  # on all processes, unlike a state that shows it
            raise ValueError(
                f"a parameter group now has {_fixed(group)}, it had {self._settings[tensor]} when the engine was "
                f"attached, which fixes these. Build a new optimizer."
            )
        for name, shape, adapter in self._entries[tensor]:
            matrices = matrices_of(shape, group["flatten"]) if adapter.is_matrix else None
            yield Entry(name, tensor, group, adapter, matrices, shape, state.get(name, {}))


def _fixed(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("rank", "proj_type", "enable_lowrank", "flatten")}


def _entries_of(
    partition: FlatPartition, group: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], FlatAdapter]]:
    """(name, shape, adapter) of each matrix, of a stack too, and of each other parameter."""
    ranks = ranks_of(partition.process_group)

    def adapter(elements: FlatRange, columns: int) -> FlatAdapter:
        return FlatAdapter(partition.tensor, elements, ranks, partition.process_group, partition.device, columns)

    for param in partition.params:
        elements, total = param.elements, math.prod(param.shape)
        if elements.starts[0] != 0 or elements.starts[-1] != total or len(elements.starts) != len(ranks) + 1:
            raise ValueError(
                f"parameter {param.name} of shape {param.shape} is told to be cut at its elements {elements.starts} "
                f"over {len(ranks)} processes: expected {len(ranks) + 1} numbers from 0 to {total}."
            )
        if elements.length and elements.offset + elements.length > partition.tensor.numel():
            raise ValueError(
                f"parameter {param.name} is told to be at {elements.offset} to {elements.offset + elements.length} of "
                f"a partition of {partition.tensor.numel()} elements."
            )
        matrices = low_rank_matrices(param.shape, group)
        if matrices is None:
            yield param.name, param.shape, adapter(elements, 0)
        elif len(param.shape) == 2 or group["flatten"]:
            yield param.name, param.shape, adapter(elements, matrices[2])
        else:
            number, *shape = matrices
            size = math.prod(shape)
            for i in range(number):
                part = elements.part(i * size, (i + 1) * size)
                yield f"{param.name}[{i}]", tuple(shape), adapter(part, shape[1])
