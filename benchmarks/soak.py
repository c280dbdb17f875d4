"""Invariants of LDAdamW over a long run: are projectors orthonormal, errors orthogonal to them, all norms stable?

    python benchmarks/soak.py --steps 20000

A byte-level Llama of one layer, 64 wide, learns the sources of Python's standard library. Its linear layers are
projected on both sides: of 64×64 and of 64×176 the rows, of 176×64 the columns. Three runs: float32; bfloat16 weights
with the error in bfloat16, which is the default there; bfloat16 weights with the error in float32. Computed in float64:

    max |UᵀU − I|       over all matrices and all checks; the states U are float32 in every run
    ‖UᵀE‖ / ‖E‖         the largest of all matrices; right after a step it is 0 in real arithmetic
    rounded             the same of E rounded to bfloat16: what storing it so adds
"""

from __future__ import annotations

import argparse
import platform
import shlex
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Run as a file, Python looks for modules in benchmarks/ alone: name the repository as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import hardware
from ldadam_dist import LDAdamW, build_param_groups

RUNS: dict[str, tuple[torch.dtype, str | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16-error32": (torch.bfloat16, "float32"),
}
"""dtype of the weights and `error_dtype` of each run."""

RANK = 16
BATCH, LENGTH = 4, 32
LR, LR_OTHER, WEIGHT_DECAY = 2e-3, 5e-3, 0.1
TEXT_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Check:
    """What was seen after a step.

    Attributes:
        step: number of steps taken.
        loss: mean training loss in bits per byte, since the check before.
        skew: max |UᵀU − I| of any matrix.
        overlap: largest ‖UᵀE‖ / ‖E‖ of any matrix.
        rounded: the same of E rounded to bfloat16.
        weights, errors, first, second: norm of all matrices' weights, errors and two moments.
    """

    step: int
    loss: float
    skew: float
    overlap: float
    rounded: float
    weights: float
    errors: float
    first: float
    second: float


def text() -> Tensor:
    """The standard library's sources as bytes, file after file, the same on every machine with this Python."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= TEXT_BYTES:
            break
    return torch.frombuffer(found, dtype=torch.uint8)


def model_of(dtype: torch.dtype) -> nn.Module:
    """The Llama, with fixed weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=256,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config).to(dtype)


def soak(dtype: torch.dtype, error_dtype: str | None, steps: int, every: int) -> Iterator[Check]:
    """Train, and check every so many steps."""
    model, data = model_of(dtype), text()
    groups = build_param_groups(model, rank=RANK, lr=LR, lr_other=LR_OTHER)
    optimizer = LDAdamW(groups, weight_decay=WEIGHT_DECAY, error_dtype=error_dtype)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for step in range(1, steps + 1):
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1), generator=draw)
        tokens = data[starts + torch.arange(LENGTH)].long()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / torch.log(torch.tensor(2.0)).item())
        if step % every == 0 or step == steps:
            yield check(optimizer, step, statistics.fmean(losses))
            losses.clear()
    if optimizer.skipped_steps:
        raise RuntimeError(f"{optimizer.skipped_steps} steps were skipped: a gradient was not finite")


def check(optimizer: LDAdamW, step: int, loss: float) -> Check:
    """The invariants and norms now."""
    skew, overlap, rounded, found = 0.0, 0.0, 0.0, dict[str, list[Tensor]]()
    for param, state in optimizer.state.items():
        if "projector" not in state:
            continue
        projector, error = state["projector"].double(), state["error"].double()
        oriented = error if param.shape[0] <= param.shape[1] else error.mT  # proj_type "std"
        identity = torch.eye(projector.shape[1], dtype=torch.float64)
        skew = max(skew, (projector.mT @ projector - identity).abs().max().item())
        overlap = max(overlap, ((projector.mT @ oriented).norm() / error.norm()).item())
        rounded = max(rounded, ((projector.mT @ oriented.bfloat16().double()).norm() / error.norm()).item())
        kept = {"weights": param, "errors": error, "first": state["exp_avg"], "second": state["exp_avg_sq"]}
        for name, tensor in kept.items():
            found.setdefault(name, []).append(tensor.detach().double().norm())
    norms = {name: torch.stack(each).norm().item() for name, each in found.items()}
    return Check(step, loss, skew, overlap, rounded, **norms)


def rows(name: str, checks: Sequence[Check]) -> Iterator[str]:
    """Lines of the table: each fifth of the run, with the worst of the invariants in it."""
    for fifth in range(5):
        part = checks[len(checks) * fifth // 5 : len(checks) * (fifth + 1) // 5]
        if part:
            last = part[-1]
            worst = (max(getattr(c, what) for c in part) for what in ("skew", "overlap", "rounded"))
            norms = f"{last.errors:.3g} | {last.first:.3g} | {last.second:.3g} | {last.weights:.3g}"
            cells = " | ".join(f"{value:.1e}" for value in worst)
            yield f"| {name} | {last.step:,} | {cells} | {norms} | {last.loss:.3f} |"


def main(argv: Sequence[str] | None = None) -> dict[str, list[Check]]:
    """Run, print the table, and return all checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=100, help="steps between two checks")
    parser.add_argument("--dtype", nargs="+", choices=list(RUNS), default=list(RUNS), help="runs, one after the other")
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found, taken = {}, []
    for name in args.dtype:
        start = time.perf_counter()
        found[name] = list(soak(*RUNS[name], args.steps, args.every))
        taken.append(f"{name} {(time.perf_counter() - start) / 60:.1f}")
    given = sys.argv[1:] if argv is None else argv
    lines = [
        f"- command: `{shlex.join(['python', 'benchmarks/soak.py', *given])}`",
        f"- device: {hardware(torch.device('cpu'))}",
        f"- versions: torch {torch.__version__}, Python {platform.python_version()}",
        f"- checked every {args.every} steps; minutes taken: {', '.join(taken)}",
        "",
        "| run | step | max abs(UᵀU − I) | ‖UᵀE‖/‖E‖ | rounded | ‖E‖ | ‖M‖ | ‖V‖ | ‖W‖ | bits per byte |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(line for name, checks in found.items() for line in rows(name, checks)),
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(table)
    return found


if __name__ == "__main__":
    main()
