"""One device against the oracle, through the public interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import Reference
from torch import Tensor, nn

from ldadam_dist import LDAdamW

STEPS = 25

SHAPES = {
    "wide": (12, 31),
    "tall": (31, 12),
    "square": (16, 16),  # both std and reverse_std project the rows
    "stacked": (24, 40),
    "in place": (190, 210),  # too large to be copied into a batch
}


def left(shape: tuple[int, int], proj_type: str) -> bool:
    rows, columns = shape
    return {"left": True, "right": False, "std": rows <= columns, "reverse_std": rows >= columns}[proj_type]


def gradient(weight: Tensor, step: int) -> Tensor:
    """A noisy gradient with a falling spectrum that pulls the weight to zero."""
    noise = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return noise * torch.logspace(0, -1, weight.shape[1], dtype=torch.float64) + 0.3 * weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"error_feedback": False},
        {"weight_decay": 0.2, "betas": (0.9, 0.999)},
        {"rho": 0.0, "betas": (0.0, 0.5)},
        {"rho": 0.5, "betas": (0.95, 0.95), "eps": 1e-4},
        {"proj_method": "svd"},
    ],
    ids=str,
)
def test_equals_the_oracle_after_every_step(shape: str, proj_type: str, options: dict[str, Any]) -> None:
    size = SHAPES[shape]
    weights = [torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    params = [nn.Parameter(w.clone()) for w in weights]  # two of a kind: batched where they are small
    optimizer = LDAdamW(params, lr=1e-2, rank=5, proj_type=proj_type, **options)
    oracles = [Reference(w, 5, left(size, proj_type), lr=1e-2, **options) for w in weights]
    for step in range(STEPS if shape != "in place" else 6):
        for param, oracle in zip(params, oracles, strict=True):
            param.grad = gradient(oracle.weight, step)
            oracle.step(param.grad)
        optimizer.step()
        for param, oracle in zip(params, oracles, strict=True):
            torch.testing.assert_close(param.detach(), oracle.weight, rtol=0, atol=1e-10)
            if options.get("error_feedback", True):
                torch.testing.assert_close(optimizer.state[param]["error"], oracle.error, rtol=0, atol=1e-10)


@pytest.mark.parametrize("proj_type", ["left", "right"])
@pytest.mark.parametrize("decay", [20, 280], ids=["steep", "flat"])
def test_randomised_first_projector_is_as_good_as_the_svd(proj_type: str, decay: int) -> None:
    """Singular values that fall by 10³ over 20 or 280 places: it captures what the SVD captures of the gradient."""
    u, _, v = torch.linalg.svd(torch.randn(300, 280, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    values = torch.logspace(0, -3 * 280 / decay, 280, dtype=torch.float64)
    grad = u[:, :280] * values @ v
    projectors = []
    for init in ("svd", "randomized", "auto"):
        param = nn.Parameter(torch.zeros(300, 280, dtype=torch.float64))
        optimizer = LDAdamW([param], lr=1e-2, rank=8, proj_type=proj_type, projector_init=init)
        param.grad = grad.clone()
        optimizer.step()
        projectors.append(optimizer.state[param]["projector"])
    exact, randomized, auto = projectors
    assert torch.equal(auto, randomized)  # the smaller dimension is above 256
    energy = ((grad if proj_type == "left" else grad.mT).mT @ randomized).square().sum()
    assert energy > 0.99 * values[:8].square().sum()
    if decay == 20:
        assert torch.linalg.svdvals(exact.mT @ randomized).min() > 0.9999


def test_gradient_is_left_as_it_was() -> None:
    for error_feedback in (True, False):
        param = nn.Parameter(torch.randn(190, 210))
        optimizer = LDAdamW([param], rank=4, error_feedback=error_feedback)
        param.grad = torch.randn_like(param)
        before = param.grad.clone()
        optimizer.step()
        optimizer.step()
        assert torch.equal(param.grad, before)
