"""On a CUDA device: a whole step in a CUDA graph, and how many kernels a step starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldadam_dist import LDAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0)

# Two large ones of a shape are one batch, two small ones are copied into one; a stack of matrices; AdamW's.
SHAPES = [(190, 210), (190, 210), (24, 40), (24, 40), (40, 24), (3, 24, 40), (30, 4), (31,)]


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make(dtype: torch.dtype, **options: Any) -> tuple[list[nn.Parameter], LDAdamW]:
    params = [nn.Parameter(0.1 * normal(shape, i, dtype)) for i, shape in enumerate(SHAPES)]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params, LDAdamW(params, **{"lr": 1e-2, "rank": 6, **options})


def give(params: list[nn.Parameter], step: int) -> None:
    for i, param in enumerate(params):
        assert param.grad is not None
        param.grad.copy_(normal(tuple(param.shape), 1000 * step + i, param.dtype))


def capture(params: list[nn.Parameter], optimizer: LDAdamW, warmup: int = 3) -> torch.cuda.CUDAGraph:
    """A graph of one step, after `warmup` steps on a stream of their own, as torch.cuda.graph asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(warmup):
            give(params, step)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.2}, {"error_feedback": False}, {"error_dtype": "int8", "stochastic_rounding": True}],
)
def test_replays_equal_other_steps(options: dict[str, Any], dtype: torch.dtype) -> None:
    params, optimizer = make(dtype, capturable=True, **options)
    others, plain = make(dtype, **options)
    graph = capture(params, optimizer)
    for step in range(3):
        give(others, step)
        plain.step()
    unit = torch.finfo(dtype).eps
    for step in range(3, 10):
        give(params, step)
        graph.replay()
        give(others, step)
        plain.step()
        for mine, other in zip(params, others, strict=True):
            torch.testing.assert_close(mine.detach(), other.detach(), rtol=4 * unit, atol=1e-5 + 0.02 * unit)
            with torch.no_grad():
                mine.copy_(other)
            for key, value in plain.state[other].items():
                optimizer.state[mine][key].copy_(value)
    assert optimizer.skipped_steps == 0


def test_an_unusable_gradient_changes_nothing() -> None:
    params, optimizer = make(torch.float32, capturable=True, weight_decay=0.1)
    graph = capture(params, optimizer)
    before = [param.detach().clone() for param in params]
    states = [{key: value.clone() for key, value in optimizer.state[param].items()} for param in params]
    give(params, 3)
    assert params[0].grad is not None
    params[0].grad[3, 4] = torch.inf
    graph.replay()
    for param, old, state in zip(params, before, states, strict=True):
        assert torch.equal(param, old)
        assert all(torch.equal(optimizer.state[param][key], value) for key, value in state.items())
    graph.replay()
    assert optimizer.skipped_steps == 2


def test_a_first_step_cannot_be_captured() -> None:
    params, optimizer = make(torch.float32, capturable=True)
    give(params, 0)
    with pytest.raises(RuntimeError, match="expected a step before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_a_learning_rate_on_the_host_is_refused() -> None:
    with pytest.raises(ValueError, match="has lr on cpu"):
        make(torch.float32, capturable=True, lr=torch.tensor(1e-2))


def test_a_step_of_many_matrices_starts_few_kernels_more() -> None:
    """Large ones: six products (two in one), A = G + E, the check and what of the batch is copied."""

    def kernels(number: int) -> int:
        params = [nn.Parameter(normal((512, 512), i, torch.float32)) for i in range(number)]
        optimizer = LDAdamW(params, rank=16)
        for step in range(3):
            for i, param in enumerate(params):
                param.grad = normal((512, 512), 100 * step + i, torch.float32)
            if step < 2:
                optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    assert (kernels(20) - kernels(4)) / 16 <= 16
