"""Two windows run side by side: while the collectives of one are on their way, the other computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import ldadam_dist.runtime.collectives as collectives
from ldadam_dist import LDAdamW
from ldadam_dist.layout import Axis, MatrixLayout
from ldadam_dist.requests import Sum
from ldadam_dist.runtime import Job, run


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in a step: a collective "starts", and is "waited for"."""
    events: list[str] = []
    original = collectives.complete

    def watched(calls: Any, group: Any) -> Iterator[None]:
        waiting = original(calls, group)
        next(waiting)
        events.append("starts")
        yield
        events.append("waited for")
        yield from waiting

    monkeypatch.setattr(collectives, "complete", watched)
    return events


def test_a_window_computes_while_another_waits(fake_world: Callable[..., None], seen: list[str]) -> None:
    fake_world(2)
    layout = MatrixLayout(4, 8, 2, over_m=Axis((2,), 1, dist.group.WORLD))

    def exchange(name: str) -> Any:
        for number in range(2):
            seen.append(f"{name}{number}")
            yield Sum(layout.over_m, torch.zeros(1, 2, 2))

    run([[Job(layout, torch.device("cpu"), (0,), partial(exchange, name))] for name in "ab"])
    assert seen == [
        *("a0", "starts", "b0", "starts"),  # both are on their way
        *("waited for", "a1", "starts", "waited for", "b1", "starts"),
        *("waited for", "waited for"),
    ]


@pytest.mark.parametrize("window", [2**25, 10_000])
def test_a_step_has_two_windows_in_flight(fake_world: Callable[..., None], seen: list[str], window: int) -> None:
    fake_world(2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(f"overlap {window}",))
    params = [nn.Parameter(DTensor.from_local(torch.randn(32, 48), mesh, [Shard(0)])) for _ in range(4)]
    optimizer = LDAdamW(params, rank=4, proj_type="right", communication="lowrank", window_elements=window)
    for _ in range(2):
        seen.clear()
        for param in params:
            param.grad = DTensor.from_local(torch.randn(32, 48), mesh, [Shard(0)])
        optimizer.step()
    flying, most = 0, 0
    for event in seen[2:]:  # but for the status of the gradients
        flying += 1 if event == "starts" else -1
        most = max(most, flying)
    assert flying == 0
    assert most == (1 if window == 2**25 else 2)
