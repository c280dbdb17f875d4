"""How much one process differs from itself when its gradients are disturbed by half a unit of float32's rounding.

    python benchmarks/rounding.py

Gradients of the tests' small Llama are recorded in float32 and fed twice to LDAdamW, the second time with relative
noise of 6e-8, as another order of summation gives. What is printed is the largest difference of any error buffer after
any step, relative to its largest entry: no sharded run can agree with a single process better than that.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, Python looks for modules in benchmarks/ alone: name the repository and the tests' models as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import torch
from torch import Tensor, nn

from ldadam_dist import LDAdamW, build_param_groups

NOISE = 6e-8
STEPS = 20
SETTINGS = ((1e-2, 4), (1e-2, 8), (1e-3, 2), (1e-3, 8))
"""(lr, rank)"""

History = list[dict[str, Tensor]]


def record_gradients(lr: float, rank: int) -> History:
    """Gradients of the projected matrices in a float32 run."""
    model = models.tiny_llama(torch.float32)
    optimizer = LDAdamW(build_param_groups(model, rank=rank), lr=lr)
    names = [name for name, p in model.named_parameters() if "proj" in name and min(p.shape) > rank]
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        models.llama_loss(model, models.llama_tokens(step)).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        history.append({name: grads[name].clone() for name in names})
        optimizer.step()
    return history


def errors(gradients: History, lr: float, rank: int, dtype: torch.dtype, noise: float) -> History:
    """Error buffers after every step, in float64."""
    params = {name: nn.Parameter(torch.zeros(g.shape, dtype=dtype)) for name, g in gradients[0].items()}
    optimizer = LDAdamW(list(params.items()), lr=lr, rank=rank)
    generator = torch.Generator().manual_seed(3)
    history = []
    for grads in gradients:
        for name, param in params.items():
            disturbance = noise * torch.randn(param.shape, generator=generator).to(dtype)
            param.grad = grads[name].to(dtype) * (1 + disturbance)
        optimizer.step()
        history.append({name: optimizer.state[p]["error"].double().clone() for name, p in params.items()})
    return history


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| lr, rank | float64 | float32 |\n|---|---|---|")
    for lr, rank in SETTINGS:
        gradients = record_gradients(lr, rank)
        cells = []
        for dtype in (torch.float64, torch.float32):
            quiet, disturbed = (errors(gradients, lr, rank, dtype, noise) for noise in (0.0, NOISE))
            drift = [
                (a[k] - b[k]).abs().max() / a[k].abs().max() for a, b in zip(quiet, disturbed, strict=True) for k in a
            ]
            cells.append(f"{max(drift):.1e}")
        print(f"| {lr:g}, {rank} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
