"""Time of a training step of two hosts over a slow link: AdamW and LDAdamW under DDP, and gradient_sync=lowrank.

    sudo python benchmarks/slow_link.py --rates 100mbit 1gbit --steps 8 --out runs/bench

The hosts are two network namespaces of this machine (tests/namespaces.py), one process each, and `tc` limits what each
sends. Runs are those of launch/pretrain.py, without clipping, so that all have the same gradients; the losses of the
two LDAdamW must be the same, up to rounding. The time of a step is the median after the first two, with data, forward
and backward.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a file, Python looks for modules in benchmarks/ alone: name the repository and the tests' helpers as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from namespaces import ADDRESSES, Network, UnavailableError, network

from benchmarks.common import ROOT, Report
from ldadam_dist.curves import read_log

CONTENDERS = {
    "AdamW, DDP": ["--optimizer", "adamw"],
    "LDAdamW, DDP": [],
    "LDAdamW, gradient_sync=lowrank": ["--gradient_sync", "lowrank"],
}
PORT = 29400


def limit(net: Network, rate: str) -> None:
    """So many bits a second leave each host, and reach the other."""
    for host in net.hosts:
        shape = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "100ms"]
        host.run("tc", "qdisc", "replace", "dev", "eth0", *shape)


def train(net: Network, options: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """The log of a run on both hosts."""
    running = []
    for number, host in enumerate(net.hosts):
        meet = ["--nnodes", 2, "--node-rank", number, "--master-addr", ADDRESSES["host-a"], "--master-port", PORT]
        start = [
            "env",
            "OMP_NUM_THREADS=1",
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            1,
            *meet,
        ]
        run = [ROOT / "launch" / "pretrain.py", "--output_dir", folder, *options]
        log = (folder.parent / f"{folder.name}-{host.name}.txt").open("wb")
        running.append(subprocess.Popen(host.command(*start, *run), cwd=ROOT, stdout=log, stderr=log))
    codes = [process.wait() for process in running]
    if any(codes):
        said = (folder.parent / f"{folder.name}-host-a.txt").read_text(errors="replace")[-3000:]
        raise SystemExit(f"exit codes {codes} of {' '.join(map(str, options))}\n{said}")
    return read_log(folder)


def seconds(records: Sequence[dict[str, Any]]) -> float:
    """Of a step: the median, without the first two, of which one finds the projectors."""
    ends = [record["elapsed_seconds"] for record in records]
    return statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train all of them over each link, and print the table. Options not known here go to launch/pretrain.py."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("python benchmarks/slow_link.py", description=description, allow_abbrev=False)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], help="of the link, as tc has them")
    parser.add_argument("--model", default="llama_60m", help="a name in configs/models/")
    parser.add_argument("--rank", default="16", help="of the projection")
    parser.add_argument("--steps", default="8", help="of each run")
    parser.add_argument("--batch_size", default="4", help="sequences of a step, over both hosts")
    parser.add_argument("--out", type=Path, help="folder for slow_link.md and slow_link.json")
    args, extra = parser.parse_known_args(argv)
    common = [
        "--config",
        str(ROOT / "configs" / "pretrain" / "default.yaml"),
        "--model",
        args.model,
        "--parallel",
        "ddp",
    ]
    common += ["--rank", args.rank, "--steps", args.steps, "--warmup_steps", "1", "--batch_size", args.batch_size]
    common += ["--clip", "0", "--eval_every", "0", "--validation_tokens", "128", "--save_minutes", "0", *extra]
    report = Report("slow_link", argv, torch.device("cpu"), "float32")
    rows, found = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            with network(folder) as net:
                for rate in args.rates:
                    limit(net, rate)
                    for name, options in CONTENDERS.items():
                        records = train(net, [*common, *options], folder / f"{rate}-{len(found)}")
                        losses = [record["loss"] for record in records]
                        found.append({"rate": rate, "name": name, "seconds": seconds(records), "losses": losses})
                        rows.append([rate, name, f"{seconds(records):.2f}", f"{losses[-1]:.5f}"])
                        print(*rows[-1], file=sys.stderr, flush=True)
        except UnavailableError as error:
            raise SystemExit(f"slow_link.py: {error}") from None
    report.table(["link", "optimizer", "seconds a step", f"loss of step {args.steps}"], rows)
    report.result["runs"] = found
    return report.write(args.out)


if __name__ == "__main__":
    main()
