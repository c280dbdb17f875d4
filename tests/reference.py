"""The oracle: LDAdam as the paper's equations say, one matrix, float64, every matrix materialised. Never shipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Reference:
    """One matrix under LDAdam. `left` projects the rows; otherwise everything is transposed once, here.

    After `step(grad)`, `weight` and `error` have the shape of the gradient.
    """

    weight: Tensor
    rank: int
    left: bool
    lr: float = 1e-3
    betas: tuple[float, float] = (0.908, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    rho: float = 0.908
    proj_method: str = "power_iteration"
    error_feedback: bool = True
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.weight = self.weight.to(self.dtype).clone()
        self.error = torch.zeros_like(self.weight)
        self.t = 0

    def step(self, grad: Tensor) -> None:
        self.t += 1
        t, (beta1, beta2), r = self.t, self.betas, self.rank
        A = grad.to(self.dtype) + self.error
        if not self.left:
            A = A.T
        if t == 1:
            U = torch.linalg.svd(A, full_matrices=False)[0][:, :r]
            g = U.T @ A
            E = A - U @ g
            M, V = (1 - beta1) * g, (1 - beta2) * g**2
        else:
            b1, b2, k = 1 - beta1 ** (t - 1), 1 - beta2 ** (t - 1), beta1 / (1 - beta1)
            B = self.rho * self.U @ self.M / b1 + (1 - self.rho) * A
            if self.proj_method == "svd":
                U = torch.linalg.svd(B, full_matrices=False)[0][:, :r]
            else:
                U = torch.linalg.qr(B @ self.projected(A, B))[0]
            g, R = U.T @ A, U.T @ self.U
            E = A + k * self.U @ self.M - U @ (g + k * R @ self.M)
            V = b2 * (R**2 @ (self.V / b2 - (self.M / b1) ** 2) + (R @ self.M / b1) ** 2).abs()
            M = beta1 * R @ self.M + (1 - beta1) * g
            V = beta2 * V + (1 - beta2) * g**2
        self.U, self.M, self.V = U, M, V
        update = U @ ((M / (1 - beta1**t)) / ((V / (1 - beta2**t)).sqrt() + self.eps))
        if self.error_feedback:
            self.error = E if self.left else E.T
        self.weight = (1 - self.lr * self.weight_decay) * self.weight - self.lr * (update if self.left else update.T)

    def projected(self, A: Tensor, B: Tensor) -> Tensor:
        """BᵀU."""
        return B.T @ self.U
