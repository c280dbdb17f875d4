"""Plain tensors that are whole on their process: one device, or DDP with every replica stepping everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.layout import MatrixLayout


class TensorAdapter:
    """A parameter that nobody shares."""

    groups: tuple[tuple[Any, torch.device], ...] = ()

    def layout(self, shape: Sequence[int], side: str, rank: int) -> MatrixLayout:
        """Layout of a (rows, columns) matrix of which `side` is projected onto `rank` directions."""
        rows, columns = shape
        return MatrixLayout(*((rows, columns) if side == "left" else (columns, rows)), rank)

    def zeros(self, param: Tensor, shape: Sequence[int], dim: int, dtype: torch.dtype) -> Tensor:
        """A new state tensor of global `shape`; `dim` is the dimension that a mesh would cut."""
        return torch.zeros(tuple(shape), dtype=dtype, device=param.device)

    def zeros_like(self, param: Tensor, kept_dim: int, dtype: torch.dtype) -> Tensor:
        """A new state tensor of the parameter's shape, cut like the block that is stepped here."""
        return torch.zeros_like(param, dtype=dtype)

    def local(self, tensor: Tensor) -> Tensor:
        """The storage of a parameter or a state on this process."""
        return tensor.detach()

    def grad(self, param: Tensor) -> Tensor | None:
        """The gradient on this process, laid out like the parameter's storage."""
        return param.grad
