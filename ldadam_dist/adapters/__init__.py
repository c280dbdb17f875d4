"""How each backend stores a parameter and its states. Adapters move data; they do no maths.

That of meshes is imported when it is first needed: torch takes longer to import DTensor than all the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from torch import Tensor

from ldadam_dist.adapters.flat import FlatAdapter
from ldadam_dist.adapters.tensor import TensorAdapter

if TYPE_CHECKING:
    from ldadam_dist.adapters.dtensor import MeshAdapter

Adapter: TypeAlias = "TensorAdapter | MeshAdapter | FlatAdapter"


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
    is_dtensor = hasattr(param, "device_mesh")
    if not is_dtensor and process_group is None:
        return TensorAdapter(param.device)
    from ldadam_dist.adapters.dtensor import MeshAdapter

    if is_dtensor:
        return MeshAdapter.of_dtensor(param, name, flatten, None if averaged else process_group)
    return MeshAdapter.of_replicas(param, process_group, averaged)


def on_mesh(adapter: Adapter) -> TypeGuard[MeshAdapter]:
    """Whether a parameter is on a mesh, and its states are DTensors."""
    return adapter.sharded


__all__ = ["Adapter", "FlatAdapter", "TensorAdapter", "adapter_for", "on_mesh"]
