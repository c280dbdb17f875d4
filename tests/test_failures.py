"""A rank that stalls or dies in a step is named by the others, with the matrices, and nobody hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import run_failing, run_ranks
from test_sharded import shard
from torch.nn.parallel import DistributedDataParallel
from zero_runs import Run, engine_of, train_step

from ldadam_dist import LDAdamW
from ldadam_dist.runtime import collectives, failures, schedule
from ldadam_dist.runtime.failures import Report

ROOT = Path(__file__).resolve().parent.parent
VICTIM = 2


def stall(how: str) -> None:
    """Die, or sleep until the others have given up."""
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(9)


def strike(how: str, when: str, victim: int = VICTIM) -> None:
    """Have one rank stall before or within its next step."""
    failures.PERIOD, failures.REPORTS_WITHIN = 0.2, 3.0 if dist.get_world_size() > 2 else 0.5
    if dist.get_rank() != min(victim, dist.get_world_size() - 1):
        return
    if when == "before":
        stall(how)
    rounds, answer = [], schedule._answer

    def answer_or_stall(*arguments: Any) -> Any:
        rounds.append(1)
        if len(rounds) == 2:
            stall(how)
        return answer(*arguments)

    schedule._answer = answer_or_stall


def train(layout: str, how: str, when: str, victim: int = VICTIM) -> None:
    model = module = models.odd_net()
    group = None
    if layout == "replicas":
        model, group = DistributedDataParallel(module, find_unused_parameters=True), dist.group.WORLD
    else:
        shard(model, layout)
        for mesh_group in module.tall.weight.device_mesh.get_all_groups():
            mesh_group.set_timeout(timedelta(seconds=3))  # it is half an hour, whatever the default group's
    optimizer = LDAdamW(module.named_parameters(), rank=2, process_group=group)
    for step in range(3):
        optimizer.zero_grad()
        models.odd_loss(model, models.odd_inputs(step)).backward()
        if step == 1:
            strike(how, when, victim)
        optimizer.step()


def check_messages(found: list[str | None], how: str, when: str) -> None:
    """Every rank names itself, the victim and a matrix; the victim, if it lives, says that it came late."""
    victim = min(VICTIM, len(found) - 1)
    for rank, text in enumerate(found):
        if rank == victim and how == "dies":
            assert text is None
            continue
        assert text is not None
        message = text[text.rindex("RuntimeError: ") :]
        assert f"rank {rank} gave up while it " in message
        doing = "compared gradients with others, before the first matrix, " if when == "before" else "stepped "
        assert re.search(doing + r"[\w.]+", message), message
        named = (
            f"Rank {victim} had stalled: it came" if rank == victim else f"Rank {victim} did not come: it has stalled"
        )
        assert named in message, message
        assert "from the last checkpoint. The back-end said: " in message
        assert "The above exception was the direct cause" in text


CASES = [
    (4, "rows", "dies", "before"),
    (4, "rows", "dies", "within"),
    (4, "rows", "sleeps", "before"),
    (4, "rows", "sleeps", "within"),
    (4, "replicas", "dies", "within"),
    (4, "replicas", "sleeps", "before"),
    (4, "replicas", "sleeps", "within"),
    (4, "hsdp", "dies", "within"),
    (4, "hsdp", "sleeps", "within"),
]


@pytest.mark.parametrize(
    ("ranks", "layout", "how", "when"),
    [(2, "rows", "dies", "within"), *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)],
)
def test_who_did_not_come_is_named_with_the_matrices(ranks: int, layout: str, how: str, when: str) -> None:
    check_messages(run_failing(ranks, train, layout, how, when), how, when)


def call_without_the_other(name: str) -> None:
    """Rank 1 dies while rank 0 waits for it, and the group's time limit is far away."""
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    whole, mine = torch.ones(4), torch.ones(2)
    calls = {
        "all_reduce": partial(dist.all_reduce, mine),
        "all_gather": partial(collectives._all_gather, whole, mine),
        "reduce_scatter": partial(collectives._reduce_scatter, mine, whole),
    }
    failures.finish(failures.complete([calls[name]], dist.group.WORLD))


@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_collective_that_has_failed_is_not_waited_for(name: str) -> None:
    """gloo's reduce-scatter does not say that it is complete when it has failed."""
    survivor, dead = run_failing(2, call_without_the_other, name, timeout=600.0)
    assert dead is None
    assert survivor is not None
    assert f"CollectiveError: {name}" in survivor


def train_after_a_failure_that_torchrun_survived() -> int:
    """The store still has a report; then a rank is late for longer than the others wait before they look."""
    failures.PERIOD = 0.05
    if dist.get_rank() == 0:
        dist.group.WORLD.get_group_store().set(f"{failures._COUNT}/1", json.dumps(asdict(Report(1, [0, 1], 0.0, 1.0))))
        assert dist.group.WORLD.get_group_store().add(failures._COUNT, 1) == 1
    dist.barrier()
    optimizer = LDAdamW((model := models.odd_net()).named_parameters(), rank=2, process_group=dist.group.WORLD)
    for step in range(2):
        models.odd_loss(model, models.odd_inputs(step)).backward()
        time.sleep(0.4 * dist.get_rank())
        optimizer.step()
    return len(optimizer.state)


def test_reports_of_processes_that_were_started_again_do_not_count() -> None:
    assert min(run_ranks(2, train_after_a_failure_that_torchrun_survived)) > 0


def train_with_a_store_on_rank_0(victim: int) -> None:
    """The default group again, over a store that goes with rank 0."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if dist.get_rank() == 0 else None
    port = [store.port if store else 0]
    dist.broadcast_object_list(port)
    rank, size = dist.get_rank(), dist.get_world_size()
    store = store or dist.TCPStore("localhost", port[0])
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=3))
    train("rows", "dies", "within", victim)


@pytest.mark.slow
def test_a_store_that_is_served_by_a_rank() -> None:
    found = run_failing(3, train_with_a_store_on_rank_0, 2)
    check_messages(found, "dies", "within")


@pytest.mark.slow
def test_a_store_that_died_with_its_rank_does_not_hide_the_failure() -> None:
    dead, *others = run_failing(3, train_with_a_store_on_rank_0, 0)
    assert dead is None
    for rank, text in enumerate(others, 1):
        assert text is not None
        assert re.search(rf"rank {rank} gave up while it stepped [\w.]+", text)
        assert "Which rank did not come is not known" in text


def train_zero(stage: int, how: str) -> None:
    run = Run("stall", "odd", {"stage": stage})
    with engine_of(run) as (engine, _):
        for group in engine.optimizer.real_dp_process_group if stage < 3 else ():
            group.set_timeout(timedelta(seconds=3))  # DeepSpeed's own groups have half an hour
        for step in range(3):
            if step == 1:
                strike(how, "within")
            train_step(run, engine, step)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("how", ["sleeps", "dies"])
def test_the_same_under_deepspeed(stage: int, how: str) -> None:
    check_messages(run_failing(2, train_zero, stage, how), how, "within")


ENDS = """
import threading, time
import torch
import torch.distributed as dist
from ldadam_dist import LDAdamW

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
LDAdamW([torch.nn.Parameter(torch.zeros(8, 8))], rank=2, lr=1e-3)
dist.destroy_process_group()
threading.Thread(target=lambda: (time.sleep(0.05), print("let go", flush=True)), daemon=True).start()
"""


def test_gloos_threads_can_let_go_before_the_interpreter_ends() -> None:
    """Else a program aborts after its last line, now and then: a daemon thread is in the place of one of gloo's."""
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (0, "let go\n"), ended.stderr
