"""How many steps a sharded run stays with one process, and how long one process stays with itself.

    python benchmarks/horizon.py

A matrix is trained in one process, cut over two gloo ranks, and in one process whose gradients are disturbed in their
last bit (the control). Printed is the largest difference of any weight to the first run, relative to the largest
weight, after so many steps. What the control loses is lost by rounding alone: no mesh can do better.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

# Run as a file, Python looks for modules in benchmarks/ alone: name the repository and the tests' helpers as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ldadam_dist import LDAdamW

ROWS, COLUMNS, RANK = 40, 56, 4
STEPS = (1, 10, 30, 100, 300)

Gradient = Callable[[int], Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRADIENTS: dict[str, Gradient] = {
    "new at every step": lambda step: normal(ROWS, COLUMNS, seed=step),
    "one, and a tenth of noise": lambda step: normal(ROWS, COLUMNS, seed=0) + 0.1 * normal(ROWS, COLUMNS, seed=step),
    "one of full rank, constant": lambda _: normal(ROWS, COLUMNS, seed=0),
    "of rank 1, constant": lambda _: normal(ROWS, 1, seed=0) @ normal(1, COLUMNS, seed=1),
    "of rank 1, new at every step": lambda step: normal(ROWS, 1, seed=step) @ normal(1, COLUMNS, seed=-step),
}


def differences(name: str, dtype: torch.dtype) -> list[tuple[float, float]]:
    """(two ranks, control) after each of `STEPS`."""
    mesh = init_device_mesh("cpu", (2,))
    start = 0.02 * normal(ROWS, COLUMNS, seed=7).to(dtype)
    one, control = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    cut = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    optimizers = [LDAdamW([p], lr=1e-3, rank=RANK) for p in (one, cut, control)]
    noise, found = torch.Generator().manual_seed(1), []
    for step in range(1, STEPS[-1] + 1):
        grad = GRADIENTS[name](step).to(dtype)
        bits = torch.randint(-1, 2, grad.shape, generator=noise).to(dtype)
        one.grad, control.grad = grad.clone(), grad * (1 + torch.finfo(dtype).eps * bits)
        cut.grad = distribute_tensor(grad.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
        if step in STEPS:
            size = one.abs().max()
            others = (cut.full_tensor(), control)
            found.append(tuple(((other - one).abs().max() / size).item() for other in others))
    return found


def main() -> None:
    for dtype in (torch.float64, torch.float32):
        print(f"\n| {str(dtype)[6:]}: gradient | " + " | ".join(f"{step} steps" for step in STEPS) + " |")
        print("|---" * (len(STEPS) + 1) + "|")
        for name in GRADIENTS:
            rows = run_ranks(2, differences, name, dtype)[0]
            print(f"| {name} | " + " | ".join(f"{cut:.0e} ({control:.0e})" for cut, control in rows) + " |", flush=True)


if __name__ == "__main__":
    main()
