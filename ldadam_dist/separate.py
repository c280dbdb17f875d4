"""Equal matrices that lie apart, for what takes a batch of them: large ones are not copied to be stacked; and tensors
without values."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def is_fake(tensor: Tensor) -> bool:
    """Whether it is one of `FakeTensorMode`, as where memory is estimated: it has no values to read."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # not imported: there are none before somebody does
    return fakes is not None and isinstance(tensor, fakes.FakeTensor)


class Separate:
    """b matrices (m, n) of one dtype and device, which the step sees as a tensor (b, m, n).

    A product with all of them is one call for each; what comes of it is of rank size, and one batch.
    """

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self.matrices = list(matrices)
        self.dtype, self.device = matrices[0].dtype, matrices[0].device
        self.shape = torch.Size((len(matrices), *matrices[0].shape))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, i: int) -> Tensor:
        return self.matrices[i]

    def __matmul__(self, right: Tensor) -> Tensor:
        """(b, m, k), with right (b, n, k) or the same (n, k) for all."""
        rights = right.expand(len(self), *right.shape[-2:])
        product = right.new_empty(*self.shape[:2], right.shape[-1])
        for out, own, other in zip(product, self.matrices, rights, strict=True):
            torch.mm(own, other, out=out)
        return product

    def __rmatmul__(self, left: Tensor) -> Tensor:
        """(b, k, n), with left (b, k, m)."""
        product = left.new_empty(*left.shape[:2], self.shape[-1])
        for out, other, own in zip(product, left, self.matrices, strict=True):
            torch.mm(other, own, out=out)
        return product

    def mul_(self, factor: float | Tensor) -> Separate:
        """Each matrix = factor · itself, in place."""
        for own in self.matrices:
            own.mul_(factor)
        return self

    def baddbmm_(self, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> None:
        """Each matrix = beta · itself + alpha · left right, in place; left (b, m, k) and right (b, k, n)."""
        for own, a, b in zip(self.matrices, left, right, strict=True):
            own.addmm_(a, b, beta=beta, alpha=alpha)
