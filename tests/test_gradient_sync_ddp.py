"""gradient_sync="lowrank" under DDP: what it has averaged of the gradients, and what is the same on all replicas."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from test_gradient_sync_state import SETTINGS, weights
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldadam_dist import LDAdamW, Traffic, replicas
from ldadam_dist.integrations.ddp import keep_matrices_local


def hooked(module: nn.Module, **settings: Any) -> tuple[nn.Module, LDAdamW]:
    """A model under DDP and its optimizer, which looks after every step whether replicas are equal."""
    model = DistributedDataParallel(module, broadcast_buffers=False)  # which a forward on one rank alone would wait for
    options = SETTINGS | dict(process_group=model.process_group, check_replicas_every=1) | settings
    optimizer = LDAdamW(module.named_parameters(), gradient_sync="lowrank", **options)
    keep_matrices_local(model, optimizer)
    return model, optimizer


def accumulated_without_sync(only_some: bool) -> None:
    """The last backward of every other step is under no_sync, or one of the first replica only.

    DDP has then averaged nothing of it, so the optimizer must; otherwise it does not average again.
    """
    module, whole_model = models.tiny_llama(), models.tiny_llama()
    (model, optimizer), rank, count = hooked(module), dist.get_rank(), dist.get_world_size()
    other = LDAdamW(whole_model.named_parameters(), **SETTINGS)
    sent = []
    for step in range(6):
        parts, again = models.llama_tokens(step).chunk(count), bool(step % 2)
        models.llama_loss(model, parts[rank]).backward()
        if again and (rank == 0 or not only_some):
            with model.no_sync():
                models.llama_loss(model, parts[rank]).backward()
        for number, part in enumerate(parts):
            times = 1 + (again and (number == 0 or not only_some))
            (models.llama_loss(whole_model, part) / count * times).backward()
        with Traffic() as traffic:
            optimizer.step()
        other.step()
        for each in (optimizer, other):
            each.zero_grad()
        sent.append(sum(record.elements for record in traffic.records if record.dtype.is_floating_point))
        for mine, theirs in zip(weights(module), weights(whole_model), strict=True):
            assert (mine - theirs).abs().max() < 1e-10
    vectors = sum(param.numel() for param in module.parameters() if id(param) not in optimizer.matrices())
    assert sent[3] == sent[5] == sent[4] + 2 * vectors  # an all-reduce counts twice what it reduces
    assert sent[2] == sent[4]


@pytest.mark.parametrize("only_some", [False, True], ids=["all", "one replica alone"])
def test_what_ddp_has_not_averaged_is_averaged(only_some: bool) -> None:
    run_ranks(2, accumulated_without_sync, only_some)


def clipped_apart() -> None:
    """`torch.nn.utils.clip_grad_norm_` scales each replica's gradients by its own norm, also those of one mean."""
    model, optimizer = hooked(models.tiny_llama())
    other, count = models.tiny_llama(), dist.get_world_size()
    theirs = LDAdamW(other.named_parameters(), **SETTINGS)
    for step in range(3):
        models.llama_loss(model, models.llama_tokens(step).chunk(count)[dist.get_rank()]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1 * (1 + dist.get_rank()))
        for mine, param in zip(model.parameters(), other.parameters(), strict=True):
            mean = mine.grad.clone()
            dist.all_reduce(mean)
            param.grad = mean / count
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
        for a, b in zip(weights(model), weights(other), strict=True):
            assert (a - b).abs().max() < 1e-10


def test_gradients_that_are_clipped_apart_are_averaged() -> None:
    run_ranks(2, clipped_apart)


def added_later() -> None:
    module = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 9)).double()
    model = DistributedDataParallel(module)
    matrices, biases = [module[0].weight, module[1].weight], [module[0].bias, module[1].bias]
    optimizer = LDAdamW(
        matrices, gradient_sync="lowrank", process_group=model.process_group, check_replicas_every=1, **SETTINGS
    )
    keep_matrices_local(model, optimizer)
    optimizer.add_param_group({"params": biases})
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        model(torch.randn(8, 12, dtype=torch.double)).square().mean().backward()
        with model.no_sync():
            model(torch.randn(8, 12, dtype=torch.double)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_parameters_that_are_added_after_the_hook_stay_equal() -> None:
    run_ranks(2, added_later)


ODD = torch.arange(1.0, 49, dtype=torch.float64).view(6, 8)
"""An even number of elements: the sum of so many multiples of a power of two may vanish in 64 bits."""


@pytest.mark.parametrize(
    "other",
    [
        ODD * 2,
        -ODD,
        torch.cat([-ODD[:, :2], ODD[:, 2:]], 1),
        ODD.flip(0),
        ODD.index_put((torch.tensor(5), torch.tensor(7)), ODD[5, 7].nextafter(torch.tensor(0.0, dtype=torch.double))),
    ],
    ids=["twice", "negated", "some negated", "in another order", "one bit"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [2**20, 5], ids=["at once", "in pieces"])
def test_a_difference_shows(monkeypatch: pytest.MonkeyPatch, other: Tensor, dtype: torch.dtype, words: int) -> None:
    monkeypatch.setattr(replicas, "WORDS", words)
    mine, theirs = ODD.to(dtype), other.to(dtype)
    same = torch.equal(mine, theirs)  # the one bit is lost in shorter dtypes
    assert (replicas._fingerprint(mine) == replicas._fingerprint(theirs)) == same
    assert replicas._fingerprint(mine) == replicas._fingerprint(mine.t().contiguous().t())


def test_lengths_that_are_no_words_show_too() -> None:
    prints = [int(replicas._fingerprint(torch.ones(n, dtype=torch.bfloat16))) for n in range(9)]
    assert len(set(prints)) == 9
    before = torch.ones(3, dtype=torch.bfloat16)
    replicas._fingerprint(before)
    assert torch.equal(before, torch.ones(3, dtype=torch.bfloat16))
