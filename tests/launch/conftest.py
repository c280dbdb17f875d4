"""A tiny corpus, a tiny Llama, and a way to run the trainer on several ranks with a hang limit."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import yaml
from distributed import HANG_LIMIT, run_like_torchrun

from launch.pretrain import main

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The trainer takes all cores; other tests get back what they had."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 6))) for _ in range(60)]
    return [" ".join(generator.choices(words, k=150)) + "\n" for _ in range(40)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """A folder of text files, one document each."""
    folder = tmp_path_factory.mktemp("corpus")
    for index, text in enumerate(documents):
        (folder / f"{index:02}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A YAML file of a run that takes a second."""
    folder = tmp_path_factory.mktemp("config")
    shapes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    (folder / "model.json").write_text(json.dumps({**shapes, "max_position_embeddings": 64}))
    options = {
        "model": str(folder / "model.json"),
        "data": str(corpus),
        "cache_dir": str(folder / "cache"),
        "validation_fraction": 0.2,
        "vocab_size": 300,
        "seq_len": 32,
        "rank": 4,
        "warmup_steps": 3,
        "steps": 10,
        "batch_size": 8,
        "eval_every": 4,
        "save_every": 6,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., None]:
    return run_torchrun


@pytest.fixture(scope="session")
def ranks() -> Callable[..., None]:
    """launch/pretrain.py on several ranks, without torchrun's own start."""
    return lambda size, *arguments: run_like_torchrun(size, main, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def launched() -> Callable[..., str]:
    """launch/pretrain.py by its users' commands: launched([launcher, ...], option, ...)."""
    return run_launcher


def run_torchrun(size: int, *arguments: object) -> None:
    """launch/pretrain.py under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    run_launcher(launcher, *arguments)


def run_launcher(
    launcher: list[str],
    *arguments: object,
    program: Path = REPOSITORY / "launch" / "pretrain.py",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """launch/pretrain.py, started by a launcher, and what it printed; no process outlives the call."""
    command = [*launcher, str(program), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=HANG_LIMIT)
    finally:
        # torchrun's ranks have sessions of their own: it is asked to end them before it is ended itself.
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        # The deepspeed launcher ends and leaves its ranks, which are in its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output
    return output
