"""What the benchmarks share: shapes of models, facts about the machine, the command line, and what is written."""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = Sequence[tuple[int, tuple[int, ...]]]
"""(how many, shape) of each kind of parameter."""

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "llama-60m": "llama_60m",
    "llama-350m": "llama_350m",
    "llama-1b": "llama_1b",
    "llama-7b": "llama_7b",
    "7b-layer": "llama_7b",
}
"""Names of models, and the file in configs/models/ of each; `7b-layer` is one layer, without embedding and head."""


@dataclass(frozen=True)
class Llama:
    """The shapes of a Llama.

    Attributes:
        name: as on the command line.
        hidden, intermediate, heads, layers, vocab: as in transformers' LlamaConfig.
        embeddings: whether there are an embedding, a head and a last norm; a layer by itself has none.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    layers: int
    vocab: int
    embeddings: bool = True

    @classmethod
    def named(cls, name: str, scale: int = 1, layers: int | None = None) -> Llama:
        """One of `MODELS`, with so many layers, and then every extent divided by `scale`."""
        config = json.loads((ROOT / "configs" / "models" / f"{MODELS[name]}.json").read_text())
        found = cls(
            name,
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=config["num_attention_heads"],
            layers=config["num_hidden_layers"],
            vocab=config["vocab_size"],
        )
        if name.endswith("-layer"):
            found = replace(found, layers=1, embeddings=False)
        if layers is not None:
            found = replace(found, name=f"{name}, {layers} layers", layers=layers)
        if scale == 1:
            return found
        heads = max(1, found.heads // scale)
        return replace(
            found,
            name=f"{found.name} ÷ {scale}",
            hidden=max(1, found.hidden // scale // (2 * heads)) * 2 * heads,  # rotary embeddings want even heads
            intermediate=max(4, found.intermediate // scale),
            heads=heads,
            layers=max(1, found.layers // scale),
            vocab=max(16, found.vocab // scale),
        )

    @property
    def matrices(self) -> Shapes:
        """The projected ones: query, key, value and output; gate and up; down."""
        hidden, intermediate, layers = self.hidden, self.intermediate, self.layers
        return (
            (4 * layers, (hidden, hidden)),
            (2 * layers, (intermediate, hidden)),
            (layers, (hidden, intermediate)),
        )

    @property
    def others(self) -> Shapes:
        """Those that get AdamW: the norms, and embedding and head where there are any."""
        ends: Shapes = ((2, (self.vocab, self.hidden)),) if self.embeddings else ()
        return (*ends, (2 * self.layers + self.embeddings, (self.hidden,)))

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return sum(count * torch.Size(shape).numel() for count, shape in (*self.matrices, *self.others))


def each(shapes: Shapes) -> list[tuple[int, ...]]:
    """One shape for each parameter."""
    return [shape for count, shape in shapes for _ in range(count)]


def in_words(shapes: Shapes) -> str:
    """'16 of 512×512, 8 of 1376×512'."""
    return ", ".join(f"{count} of {'×'.join(map(str, shape))}" for count, shape in shapes)


@dataclass
class Options:
    """Arguments of LDAdamW from the command line, such as error_dtype=int4,error_in_grad=True.

    Attributes:
        text: as it was given.
        values: by name.
    """

    text: str
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Options:
        """Values are Python literals where they can be, else text."""
        found = cls(text)
        for item in filter(None, text.split(",")):
            name, equals, value = item.partition("=")
            if not equals:
                raise argparse.ArgumentTypeError(f"{item!r} in {text!r}: expected name=value, such as error_dtype=int8")
            try:
                found.values[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found.values[name] = value
        return found


def parser(doc: str | None, script: str, device: bool = True) -> argparse.ArgumentParser:
    """A command line with what every benchmark takes; --device and --dtype where there is a choice."""
    found = argparse.ArgumentParser(prog=f"python benchmarks/{script}.py", description=(doc or "").partition("\n")[0])
    if device:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        found.add_argument("--device", default=default, help="cpu, cuda or cuda:1")
        found.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights, gradients")
    found.add_argument("--scale", type=int, default=1, help="divides all extents of the model: a small stand-in")
    found.add_argument("--layers", type=int, help="take so many layers of it only")
    found.add_argument("--out", type=Path, help=f"folder for {script}.md and {script}.json")
    return found


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU matrices are stepped side by side in threads, which torch.profiler does not see: one at a time here."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def normal(shapes: Iterable[tuple[int, ...]], scale: float, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """One tensor for each shape, normally distributed; every call goes on with the device's generator."""
    return [(torch.randn(shape, device=device) * scale).to(dtype) for shape in shapes]


def hardware(device: torch.device) -> str:
    """The device in words: the GPU's name, or the CPU's with the cores there and the threads in use."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model or platform.processor() or platform.machine()}, {cores} cores, {torch.get_num_threads()} threads"


def load() -> str:
    """The machine's load average over a minute, which tells whether it had other work."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


class Report:
    """Facts, tables and notes of one run of a benchmark, printed and written as Markdown and JSON.

    Attributes:
        name: of the script, and of the files.
        facts: what is needed to read and to repeat it.
        result: what goes to the JSON file.
    """

    def __init__(self, name: str, argv: Sequence[str] | None, device: torch.device, dtype: str | None) -> None:
        self.name = name
        given = sys.argv[1:] if argv is None else argv
        self.facts = {
            "command": f"`{shlex.join(['python', f'benchmarks/{name}.py', *given])}`",
            "device": hardware(device),
            "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        }
        if dtype:
            self.facts["dtype"] = f"{dtype}, float32 products at precision {torch.get_float32_matmul_precision()!r}"
        self.result: dict[str, Any] = {"facts": self.facts}
        self._load = load()
        self._lines: list[str] = []

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
        """A table of text; the first column names the row."""
        if title:
            self._lines += ["", f"### {title}"]
        self._lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        self._lines += [f"| {' | '.join(cells)} |" for cells in rows]

    def lines(self, lines: Sequence[str]) -> None:
        """A paragraph or a list."""
        if lines:
            self._lines += ["", *lines]

    def write(self, out: Path | None) -> dict[str, Any]:
        """Print everything, write it if there is a folder, and return what goes to the JSON file."""
        self.facts["load average"] = f"{self._load} before, {load()} after"
        text = "\n".join([*(f"- {key}: {value}" for key, value in self.facts.items()), *self._lines]) + "\n"
        print(text)
        if out:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{self.name}.md").write_text(text)
            (out / f"{self.name}.json").write_text(json.dumps(self.result, indent=1) + "\n")
        return self.result
