"""The rule for every parameter that is not a low-rank matrix: AdamW, by torch's own functional implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim.adamw import adamw


@dataclass
class Vector:
    """Local storage of one AdamW parameter; all tensors have its local shape, `step` is a scalar on the CPU."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def adamw_step(
    vectors: Sequence[Vector], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """One step of `torch.optim.AdamW` on each, in place. It is element-wise, so shards need no communication."""
    if not vectors:
        return
    adamw(
        [v.param for v in vectors],
        [v.grad for v in vectors],
        [v.exp_avg for v in vectors],
        [v.exp_avg_sq for v in vectors],
        [],
        [v.step for v in vectors],
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
