"""Plain tensors that are whole on their process: one device, or DDP with every replica stepping everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldadam_dist.layout import Axis, Bounds, MatrixLayout, RowCut


class TensorAdapter:
    """A parameter that nobody shares; the interface is that of `MeshAdapter`.

    Attributes:
        device: where its matrices are stepped.
        groups: nobody to agree with.
        sharded: whether the states are DTensors.
        copies: how many processes hold each element of the parameter.
        present: whether this process takes part in its steps.
        cut: how its rows are cut, if they are.
        sync: who has the same weights and gradients of its own: nobody.
        alike: who has the same weights and, as somebody has averaged them, the same gradients: nobody.
    """

    groups: tuple[tuple[Any, torch.device], ...] = ()
    sharded = False
    copies = 1
    present = True
    cut: RowCut | None = None
    sync: Axis | None = None
    alike: Axis | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def averaged_in_backward(self) -> bool:
        """Whether DDP may write the average of all processes into gradients at the end of a backward."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def reductions(self) -> tuple[str, ...]:
        """What becomes of sums over elements on other processes; see `MeshAdapter.reductions`."""
        return ()

    def as_grad(self, error: Tensor, param: Tensor) -> Tensor:
        """The error as a gradient of the parameter: the same tensor, or a view for what is flattened to a matrix."""
        return error if error.shape == param.shape else error.view(param.shape)

    def check(self, param: Tensor, name: str) -> None:
        """A whole tensor is as it says."""

    def layout(self, rows: int, columns: int, side: str, rank: int) -> MatrixLayout:
        """Layout of a (rows, columns) matrix of which `side` is projected onto `rank` directions."""
        return MatrixLayout(*((rows, columns) if side == "left" else (columns, rows)), rank)

    def held(self, number: int) -> tuple[Bounds, int]:
        """Of a stack of `number` matrices, (start, stop) of those held here, and the most that any process holds."""
        return (0, number), number

    def new_state(self, param: Tensor, shape: Sequence[int], part: str, side: str, dtype: torch.dtype) -> Tensor:
        """A new state tensor of zeros, of global `shape`."""
        return torch.zeros(tuple(shape), dtype=dtype, device=param.device)

    def as_state(self, local: Tensor, param: Tensor, shape: Sequence[int], part: str, side: str) -> Tensor:
        """The state of global `shape` of which this process has `local`."""
        return local

    def new_moment(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        """A new moment of AdamW, of zeros, like the parameter."""
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def state_shape(self, shape: Sequence[int], part: str, side: str) -> tuple[int, ...]:
        """Shape of the tensor that `new_state` makes."""
        return tuple(shape)

    def local_shape(self, shape: Sequence[int], part: str, side: str) -> tuple[int, ...]:
        """Shape of what this process holds of a state."""
        return tuple(shape)

    def places(self, param: Tensor, shape: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Where elements are in the parameter, seen as a matrix (shape[0], rest).

        Args:
            param: the parameter.
            shape: its global shape.
            start, stop: bounds of the first dimension of its storage on this process.
        Returns:
            rows (stop − start, 1), and columns that are broadcast with them.
        """
        device = self.local(param).device
        return (
            torch.arange(start, stop, device=device)[:, None],
            torch.arange(math.prod(shape[1:]), device=device)[None],
        )

    def owner_rank(self, owner: int, side: str) -> int | None:
        """Nobody owns what nobody shares."""
        return None

    def describe(self) -> str:
        """What is cut by what."""
        return "whole"

    def local(self, tensor: Tensor) -> Tensor:
        """The storage of a parameter or a state on this process."""
        return tensor.detach()

    def must_redistribute(self, param: Tensor) -> bool:
        """Whether the gradient is not laid out like the parameter."""
        return False

    def grad(self, param: Tensor) -> Tensor | None:
        """The gradient on this process, laid out like the parameter's storage."""
        return param.grad
