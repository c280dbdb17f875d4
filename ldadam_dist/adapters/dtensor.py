"""Parameters on a one-dimensional device mesh: FSDP2 shards, replicated DTensors, and plain replicas (DDP).

A sharded parameter cuts one dimension of its matrix. A replicated one is stepped in slices of the kept dimension, one
slice per replica. Either way all states are DTensors on the mesh with a global shape that does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ldadam_dist.layout import Axis, MatrixLayout


class MeshAdapter:
    """A parameter on a one-dimensional mesh.

    Attributes:
        mesh: the mesh, of one dimension.
        sharded_dim: the tensor dimension that is cut over the mesh; None where every process holds the whole.
        groups: the mesh's process group and its device.
    """

    def __init__(self, mesh: DeviceMesh, sharded_dim: int | None) -> None:
        self.mesh = mesh
        self.sharded_dim = sharded_dim
        self.axis = Axis(mesh.size(), mesh.get_local_rank(), mesh.get_group())
        self.groups = ((self.axis.group, torch.device(mesh.device_type)),)

    @classmethod
    def of_dtensor(cls, param: DTensor, name: str) -> MeshAdapter:
        """The adapter of a DTensor parameter.

        Raises:
            ValueError: a mesh of several dimensions, a placement other than Shard and Replicate, or offloaded weights.
        """
        mesh, placements = param.device_mesh, param.placements
        if mesh.ndim != 1:
            raise ValueError(
                f"parameter {name} lies on a mesh of {mesh.ndim} dimensions {tuple(mesh.shape)} "
                f"{mesh.mesh_dim_names or ''}; a mesh of one dimension is supported. "
                f"Use fully_shard over one dimension, without tensor parallelism."
            )
        (placement,) = placements
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"parameter {name} has placement {placement}; Shard(dim) and Replicate() are supported. "
                f"Redistribute the parameter before it is given to the optimizer."
            )
        if param.device.type not in (mesh.device_type, "meta"):
            raise ValueError(
                f"parameter {name} is stored on {param.device.type} and its mesh is on {mesh.device_type}: expected "
                f"one device for both. CPU offload is not supported; use fully_shard without CPUOffloadPolicy."
            )
        return cls(mesh, placement.dim if isinstance(placement, Shard) else None)

    @classmethod
    def of_replicas(cls, param: Tensor, process_group: Any) -> MeshAdapter:
        """The adapter of a plain parameter that every process of `process_group` holds whole."""
        return cls(DeviceMesh.from_group(process_group, param.device.type), None)

    def layout(self, shape: Sequence[int], side: str, rank: int) -> MatrixLayout:
        """Layout of a (rows, columns) matrix of which `side` is projected onto `rank` directions."""
        rows, columns = shape
        m, n = (rows, columns) if side == "left" else (columns, rows)
        projected_dim = 0 if side == "left" else 1
        if self.sharded_dim == projected_dim:
            return MatrixLayout(m, n, rank, over_m=self.axis)
        return MatrixLayout(m, n, rank, over_n=self.axis, replicated=self.sharded_dim is None)

    def zeros(self, param: Tensor, shape: Sequence[int], dim: int, dtype: torch.dtype) -> DTensor:
        """A new state tensor of global `shape`, cut along `dim` over the mesh."""
        start, stop = self.axis.bounds(shape[dim])
        local_shape = list(shape)
        local_shape[dim] = stop - start
        local = torch.zeros(local_shape, dtype=dtype, device=self.local(param).device)
        # An uneven shard does not tell the global shape: it must be given.
        stride = torch.empty(tuple(shape), device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, (Shard(dim),), run_check=False, shape=torch.Size(shape), stride=stride
        )

    def zeros_like(self, param: Tensor, kept_dim: int, dtype: torch.dtype) -> DTensor:
        """A new state tensor of the parameter's shape, cut like the block that is stepped here."""
        dim = kept_dim if self.sharded_dim is None else self.sharded_dim
        return self.zeros(param, param.shape, dim, dtype)

    def local(self, tensor: Tensor) -> Tensor:
        """The storage of a parameter or a state on this process."""
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()

    def grad(self, param: Tensor) -> Tensor | None:
        """The gradient on this process, laid out like the parameter's storage."""
        grad = param.grad
        if isinstance(grad, DTensor) and isinstance(param, DTensor):
            if grad.placements != param.placements:
                grad = grad.redistribute(placements=param.placements)
            return grad.to_local()
        return grad
