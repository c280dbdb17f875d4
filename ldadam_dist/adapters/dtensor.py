"""Parameters on a device mesh: FSDP2, HSDP, tensor parallelism, any mix of them, and plain replicas (DDP).

Mesh dimensions that cut rows, columns or a stack cut the matrices so. Those that replicate hold the same weights; each
replica then steps a slice of the kept dimension. All states are DTensors with a global shape that does not depend on
the mesh, and every mesh dimension cuts each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ldadam_dist.adapters.meshes import MeshDims, check_regular, make_axis, with_replicas
from ldadam_dist.adapters.placements import check_part, mesh_dims_by_tensor_dim
from ldadam_dist.layout import Axis, Bounds, MatrixLayout, cut


class MeshAdapter:
    """A parameter on a mesh.

    Args:
        mesh: the mesh.
        stack, rows, columns: the mesh dimensions that cut the stack of matrices, their rows and their columns.
        replicas: the mesh dimensions that replicate.
        sync: a mesh dimension whose processes hold the same weights, and gradients that nobody has averaged.

    Raises:
        ValueError: ranks that do not lie in the mesh like the elements of a strided array.

    Attributes:
        device: where matrices are stepped: the mesh's, also if the parameter is offloaded to the CPU.
        groups: the process groups over which the parameter's ranks agree, with their device.
        sharded: whether the states are DTensors.
        copies: how many processes hold each element of the parameter.
        present: whether this process takes part in its steps, be it with an empty shard.
        cut: no row is cut.
        averaged_in_backward: nobody writes averages into gradients.
        alike: the processes that hold this plain parameter and, as somebody has averaged it, the same gradient.
    """

    sharded = True
    present = True
    cut = None
    averaged_in_backward = False
    alike: Axis | None = None

    def __init__(
        self,
        mesh: DeviceMesh,
        stack: MeshDims = (),
        rows: MeshDims = (),
        columns: MeshDims = (),
        replicas: MeshDims = (),
        sync: MeshDims = (),
    ) -> None:
        self.mesh, self.stack, self.rows, self.columns = mesh, stack, rows, columns
        self.replicas, self._sync = replicas, sync
        check_regular(mesh)
        self.copies = math.prod(mesh.size(d) for d in replicas)
        self.device = torch.device(mesh.device_type)
        self.groups = tuple((mesh.get_group(d), self.device) for d in range(mesh.ndim))
        self._meshes = {tuple(range(mesh.ndim)): mesh}
        # Made here, whichever side will be projected: ranks whose settings differ must not wait for each other yet.
        alike = replicas + sync
        cutting = (rows, columns, rows + alike, columns + alike, replicas, sync)
        self._axes = {dims: make_axis(mesh, dims) for dims in cutting}

    @classmethod
    def of_dtensor(cls, param: Any, name: str, flatten: bool, sync_group: Any | None = None) -> MeshAdapter:
        """The adapter of a DTensor parameter.

        Args:
            param: the parameter.
            name: how errors call it.
            flatten: whether it is seen as one matrix (shape[0], rest).
            sync_group: the processes that hold the same shard of it, and gradients of their own; outside its mesh.
        Raises:
            ValueError: a placement that is not supported, or a group that shares more than this process with the mesh.
        """
        mesh, sync = param.device_mesh, cast(MeshDims, ())
        if sync_group is not None:  # it comes last, so that the parameter's own mesh dimensions keep their numbers
            mesh, sync = with_replicas(mesh, sync_group, name), (mesh.ndim,)
        try:
            cuts, replicas = mesh_dims_by_tensor_dim(param.placements, mesh.shape, param.ndim)
        except ValueError as error:
            raise ValueError(
                f"parameter {name} lies on a mesh {tuple(mesh.shape)} with placements {param.placements}; {error}. "
                f"Redistribute the parameter before it is given to the optimizer."
            ) from None
        if flatten and param.ndim > 2:
            if any(cuts[1:]):
                raise ValueError(
                    f"parameter {name} of shape {tuple(param.shape)} is seen as a matrix of shape[0] rows "
                    f"(flatten=True), and its other dimensions are cut: {param.placements}. Shard dimension 0, or set "
                    f"enable_lowrank=False for its group."
                )
            return cls(mesh, rows=cuts[0], replicas=replicas, sync=sync)
        if param.ndim == 3:
            return cls(mesh, cuts[0], cuts[1], cuts[2], replicas, sync)
        rows, columns = (*cuts, (), ())[:2]  # what is no matrix is stepped element by element, however it is cut
        return cls(mesh, rows=rows, columns=columns, replicas=replicas, sync=sync)

    @classmethod
    def of_replicas(cls, param: Tensor, process_group: Any, averaged: bool) -> MeshAdapter:
        """The adapter of a plain parameter that every process of `process_group` holds whole; see `adapter_for`."""
        mesh = DeviceMesh.from_group(process_group, param.device.type)
        if not averaged:
            return cls(mesh, sync=(0,))
        made = cls(mesh, replicas=(0,))
        made.alike = made._axes[(0,)] if mesh.size() > 1 else None
        return made

    @property
    def sync(self) -> Axis | None:
        """The processes that hold the same weights as this one and gradients of their own, if there are any."""
        axis = self._axes[self._sync]
        return axis if axis.count > 1 else None

    def reductions(self) -> tuple[str, ...]:
        """What a norm makes of its processes' sums over elements, by `groups`: "sum", "max" (copies) or "mean"."""
        return tuple(
            "max" if d in self.replicas else "mean" if d in self._sync else "sum" for d in range(self.mesh.ndim)
        )

    def replicated(self, scalar: Tensor) -> DTensor:
        """What all processes of the mesh have alike."""
        return DTensor.from_local(scalar, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)

    def layout(self, rows: int, columns: int, side: str, rank: int) -> MatrixLayout:
        """Layout of a (rows, columns) matrix of which `side` is projected onto `rank` directions."""
        m_dims, n_dims = (self.rows, self.columns) if side == "left" else (self.columns, self.rows)
        m, n = (rows, columns) if side == "left" else (columns, rows)
        over_m, over_n = self._axes[m_dims], self._axes[n_dims + self.replicas + self._sync]
        return MatrixLayout(m, n, rank, over_m, over_n, self._axes[self.replicas], self._axes[self._sync])

    def held(self, number: int) -> tuple[Bounds, int]:
        """Of a stack of `number` matrices, (start, stop) of those held here, and the most that any process holds."""
        return self._bounds(number, self.stack), cut(number, self._sizes(self.stack)).longest

    def new_state(self, param: Tensor, shape: Sequence[int], part: str, side: str, dtype: torch.dtype) -> DTensor:
        """A new state tensor of zeros, cut over every mesh dimension.

        Args:
            param: the parameter.
            shape: the global shape of the state, (number, ., .) for a stack.
            part: "projector", (m, r), its rows cut like those of the block and then over what cuts the kept dimension;
                "moments", (r, n), its columns cut like those of the block and then over what cuts the projected one;
                "error", (rows, columns), like the block that is stepped, and over `sync`, as the mean error is told;
                "own error", the same without that, as each replica has it.
            side: the projected side, "left" for rows.
            dtype: of the state.
        """
        local = torch.zeros(self.local_shape(shape, part, side), dtype=dtype, device=self.device)
        return self.as_state(local, param, shape, part, side)

    def as_state(self, local: Tensor, param: Tensor, shape: Sequence[int], part: str, side: str) -> DTensor:
        """The state of global `shape` of which this process has `local`; the arguments are those of `new_state`."""
        state = _from_local(local, shape, *self._place(len(shape), part, side))
        device = self.local(param).device
        return state if device.type == self.mesh.device_type else cast(DTensor, state.to(device))  # offloaded

    def as_own(self, local: Tensor, shape: Sequence[int], side: str) -> DTensor:
        """The errors of all replicas of `sync`, (replicas, *shape), of which this process has `local`."""
        by_dim = [self._sync, *self._cuts("own error", side)[-len(shape) :]]
        return _from_local(local[None], (self.mesh.size(self._sync[0]), *shape), *self._place_cut(by_dim))

    def as_grad(self, error: Tensor, param: Tensor) -> Tensor:
        """The error, cut like the parameter, as a gradient of it: the same storage."""
        assert isinstance(error, DTensor)
        assert isinstance(param, DTensor)
        mesh, placements = param.device_mesh, param.placements
        if (error.device_mesh, tuple(error.placements), error.shape) == (mesh, tuple(placements), param.shape):
            return error
        local = error.to_local().view(param.to_local().shape)
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())

    def _place(self, ndim: int, part: str, side: str) -> tuple[DeviceMesh, tuple[Placement, ...]]:
        """The mesh and the placements of a state of so many dimensions."""
        return self._place_cut(self._cuts(part, side)[-ndim:])

    def _place_cut(self, by_dim: Sequence[MeshDims]) -> tuple[DeviceMesh, tuple[Placement, ...]]:
        """The mesh and the placements of a tensor whose dimensions are cut so."""
        return self._permuted(sum(by_dim, ())), tuple(Shard(dim) for dim, dims in enumerate(by_dim) for _ in dims)

    def check_stored(self, what: str, state: Tensor, param: Tensor, part: str | None, side: str) -> None:
        """Raise ValueError if a state that is to be loaded is not this process's part of it.

        Args:
            what: how errors call it.
            state: the state; of a DTensor, torch.save keeps the part of the process that saves, and loads it anywhere.
            param: the parameter.
            part, side: as for `new_state`; None for a moment of AdamW.
        """
        if not isinstance(state, DTensor):
            return
        if part is not None:
            mesh, placements = self._place(state.ndim, part, side)
        elif isinstance(param, DTensor):
            mesh, placements = param.device_mesh, param.placements
        else:
            return
        check_part(what, state, mesh, placements)

    def check_own(self, what: str, error: Tensor, side: str) -> None:
        """Raise ValueError if errors of replicas, as of `as_own`, are not laid out so or not this process's part."""
        if not isinstance(error, DTensor):
            raise ValueError(
                f"{what} is a plain tensor: expected a DTensor as own_errors() gives, of which each process has its "
                f"part. Save and load them with torch.distributed.checkpoint."
            )
        check_part(what, error, *self._place_cut([self._sync, *self._cuts("own error", side)[1 - error.ndim :]]))

    def new_moment(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        """A new moment of AdamW, of zeros, like the parameter."""
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def state_shape(self, shape: Sequence[int], part: str, side: str) -> tuple[int, ...]:
        """Shape of the tensor that `new_state` makes: a DTensor tells the global one."""
        return tuple(shape)

    def local_shape(self, shape: Sequence[int], part: str, side: str) -> tuple[int, ...]:
        """Shape of what this process holds of a state; the arguments are those of `new_state`."""
        return tuple(self._local_shape(shape, self._cuts(part, side)[-len(shape) :]))

    def places(self, param: Tensor, shape: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Where elements are in the parameter, seen as a matrix (shape[0], rest); see `TensorAdapter.places`."""
        bounds: list[Bounds] = [(0, length) for length in shape]
        if isinstance(param, DTensor):
            cuts, _ = mesh_dims_by_tensor_dim(param.placements, self.mesh.shape, param.ndim)
            bounds = [self._bounds(length, dims) for length, dims in zip(shape, cuts, strict=True)]
        device = self.local(param).device
        columns = torch.zeros(1, dtype=torch.int64, device=device)
        for length, (first, last) in zip(shape[1:], bounds[1:], strict=True):
            columns = (columns[:, None] * length + torch.arange(first, last, device=device)).flatten()
        offset = bounds[0][0] if bounds else 0
        return torch.arange(offset + start, offset + stop, device=device)[:, None], columns[None]

    def owner_rank(self, owner: int, side: str) -> int:
        """Global rank of a matrix's owner, from its number among the processes that share the matrix."""
        m_dims, n_dims = (self.rows, self.columns) if side == "left" else (self.columns, self.rows)
        n_dims += self.replicas + self._sync
        over_m, over_n = self._axes[m_dims], self._axes[n_dims]
        place = [self.mesh.get_local_rank(d) for d in range(self.mesh.ndim)]
        for dims, axis, index in (
            (m_dims, over_m, owner // over_n.count),
            (n_dims, over_n, owner % over_n.count),
        ):
            position = index if axis.order is None else axis.order[index]
            for d in reversed(dims):
                position, place[d] = divmod(position, self.mesh.size(d))
        return int(self.mesh.mesh[tuple(place)])

    def describe(self) -> str:
        """What the mesh dimensions cut: 'rows/fsdp 8, columns/tp 2'."""
        names = self.mesh.mesh_dim_names or [f"dim {d}" for d in range(self.mesh.ndim)]
        cut_by = {"stack": self.stack, "rows": self.rows, "columns": self.columns}
        cut_by |= {"replicas": self.replicas, "own gradients": self._sync}
        return ", ".join(f"{what}/{names[d]} {self.mesh.size(d)}" for what, dims in cut_by.items() for d in dims)

    def local(self, tensor: Tensor) -> Tensor:
        """The storage of a parameter or a state on this process."""
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()

    def must_redistribute(self, param: Tensor) -> bool:
        """Whether the gradient is not laid out like the parameter; `grad` is then a collective."""
        grad = param.grad
        return isinstance(grad, DTensor) and isinstance(param, DTensor) and grad.placements != param.placements

    def grad(self, param: Tensor) -> Tensor | None:
        """The gradient on this process, laid out like the parameter's storage."""
        grad = param.grad
        if isinstance(grad, DTensor) and isinstance(param, DTensor):
            if self.must_redistribute(param):
                grad = grad.redistribute(placements=param.placements)
            return grad.to_local()
        return grad

    def check(self, param: Tensor, name: str) -> None:
        """Raise ValueError if this rank's shard is not what the parameter's placements say."""
        if not isinstance(param, DTensor):
            return
        cuts, _ = mesh_dims_by_tensor_dim(param.placements, self.mesh.shape, param.ndim)
        expected, found = self._local_shape(param.shape, cuts), list(param.to_local().shape)
        if found != expected:
            raise ValueError(
                f"parameter {name} of shape {tuple(param.shape)} has a shard of {tuple(found)} on this rank: "
                f"{param.placements} on a mesh {tuple(self.mesh.shape)} give {tuple(expected)}. "
                f"Give DTensor.from_local the global shape and stride of uneven shards."
            )

    def _cuts(self, part: str, side: str) -> list[MeshDims]:
        """The mesh dimensions that cut the stack, the rows and the columns of a state."""
        m_dims, n_dims = (self.rows, self.columns) if side == "left" else (self.columns, self.rows)
        n_dims += self.replicas
        if part == "projector":
            return [self.stack, m_dims + n_dims + self._sync, ()]
        if part == "moments":
            return [self.stack, (), n_dims + m_dims + self._sync]
        if part == "error":
            n_dims += self._sync
        rows, columns = (m_dims, n_dims) if side == "left" else (n_dims, m_dims)
        return [self.stack, rows, columns]

    def _sizes(self, dims: MeshDims) -> tuple[int, ...]:
        return tuple(self.mesh.size(d) for d in dims)

    def _bounds(self, length: int, dims: MeshDims) -> Bounds:
        """This process's piece of a dimension that mesh dimensions cut one after the other."""
        position = 0
        for dim in dims:
            position = position * self.mesh.size(dim) + self.mesh.get_local_rank(dim)
        return cut(length, self._sizes(dims)).bounds[position]

    def _local_shape(self, shape: Sequence[int], cuts: Sequence[MeshDims]) -> list[int]:
        bounds = [self._bounds(length, dims) for length, dims in zip(shape, cuts, strict=True)]
        return [stop - start for start, stop in bounds]

    def _permuted(self, order: MeshDims) -> DeviceMesh:
        """The same mesh with its dimensions in the order in which they cut a state, so that plain shards say it."""
        if order not in self._meshes:
            mesh = self.mesh
            names = mesh.mesh_dim_names or tuple(f"dim_{d}" for d in range(mesh.ndim))  # several groups need names
            self._meshes[order] = DeviceMesh.from_group(
                [mesh.get_group(d) for d in order],
                mesh.device_type,
                mesh=mesh.mesh.permute(order).contiguous(),
                mesh_dim_names=tuple(names[d] for d in order),
            )
        return self._meshes[order]


def _from_local(local: Tensor, shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """The DTensor of global `shape` of which this process has `local`."""
    # An uneven shard does not tell the global shape: it must be given.
    stride = tuple(math.prod(max(length, 1) for length in shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
