"""A tiny corpus, a tiny Llama, and a way to run the trainer on several ranks with a hang limit."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
HANG_LIMIT = 240  # seconds; a run takes about ten

sys.path.insert(0, str(REPOSITORY))  # launch/ is not installed


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
    return run_ranks


def run_torchrun(size: int, *arguments: object) -> None:
    """launch/pretrain.py under torchrun; no process outlives the call."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += [str(REPOSITORY / "launch" / "pretrain.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=HANG_LIMIT)
    finally:
        # Ranks have sessions of their own: torchrun is asked to end them before it is ended itself.
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    assert process.returncode == 0, output


def run_ranks(size: int, *arguments: object) -> None:
    """The same with processes forked from one that has imported torch, so that it takes two seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "transformers", "launch.trainer"])
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=_rank, args=(rank, size, store.port, list(map(str, arguments))), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + HANG_LIMIT
    try:
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0) for process in processes):
                break
            time.sleep(0.05)
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    assert codes == [0] * size, f"exit codes of the ranks (None: still running): {codes}"


def _rank(rank: int, size: int, port: int, arguments: list[str]) -> None:
    """What torchrun sets, then the program."""
    from launch.pretrain import main

    local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    joined = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**local, **joined}.items()})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is the test's
    sys.exit(main(arguments))
