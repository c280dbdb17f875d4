"""How each backend stores a parameter and its states. Adapters move data; they do no maths."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from ldadam_dist.adapters.dtensor import MeshAdapter
from ldadam_dist.adapters.flat import FlatAdapter
from ldadam_dist.adapters.tensor import TensorAdapter

Adapter = TensorAdapter | MeshAdapter | FlatAdapter


def adapter_for(param: Tensor, process_group: Any | None, averaged: bool, name: str, flatten: bool) -> Adapter:
    """The adapter of one parameter.

    Args:
        param: the parameter that is stepped.
        process_group: group over which parameters are replicas, or None.
        averaged: whether the replicas' gradients are averaged; only then DTensors tell by themselves where they are.
        name: how errors call the parameter.
        flatten: whether it is seen as one matrix (shape[0], rest).
    Raises:
        ValueError: a layout that is not supported.
    """
    if isinstance(param, DTensor):
        return MeshAdapter.of_dtensor(param, name, flatten, None if averaged else process_group)
    if process_group is not None:
        return MeshAdapter.of_replicas(param, process_group, averaged)
    return TensorAdapter(param.device)


__all__ = ["Adapter", "FlatAdapter", "MeshAdapter", "TensorAdapter", "adapter_for"]
