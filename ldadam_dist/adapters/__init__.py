"""How each backend stores a parameter and its states. Adapters move data; they do no maths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

from torch import Tensor

from ldadam_dist.adapters.flat import FlatAdapter
from ldadam_dist.adapters.tensor import TensorAdapter
from ldadam_dist.dtensors import dtensor_type

if TYPE_CHECKING:  # dtensor.py imports DTensor
    from ldadam_dist.adapters.dtensor import MeshAdapter

Adapter: TypeAlias = "TensorAdapter | MeshAdapter | FlatAdapter"


def adapter_for(param: Tensor, process_group: Any | None, name: str, flatten: bool) -> Adapter:
    """The adapter of one parameter.

    Args:
        param: the parameter that is stepped.
        process_group: group over which plain parameters are replicas, or None.
        name: how errors call the parameter.
        flatten: whether it is seen as one matrix (shape[0], rest).
    Raises:
        ValueError: a layout that is not supported.
    """
    on_mesh = isinstance(param, dtensor_type())
    if not on_mesh and process_group is None:
        return TensorAdapter(param.device)
    from ldadam_dist.adapters.dtensor import MeshAdapter

    if on_mesh:
        return MeshAdapter.of_dtensor(cast(Any, param), name, flatten)
    return MeshAdapter.of_replicas(param, process_group)


__all__ = ["Adapter", "FlatAdapter", "TensorAdapter", "adapter_for"]
