"""What a training loop does with an optimizer: closures, schedulers, clipping, scaling, hooks, swaps, checkpoints."""

from __future__ import annotations

import copy
import io
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from ldadam_dist import LDAdamW


def make(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, LDAdamW]:
    model = models.odd_net(dtype)
    return model, LDAdamW(model.named_parameters(), **{"lr": 1e-2, "rank": 2, **options})


def train(model: nn.Module, optimizer: LDAdamW, steps: range = range(5)) -> None:
    for step in steps:
        optimizer.zero_grad()
        models.odd_loss(model, models.odd_inputs(step).to(model.wide.weight.dtype)).backward()
        optimizer.step()


def same_weights(a: nn.Module, b: nn.Module, atol: float = 0.0) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model, optimizer = make()
    train(model, optimizer)
    return model


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-6, "lr": 3e-2}])
def test_other_parameters_equal_torchs_fused_adamw_bit_for_bit(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(s)) for s in ((50, 8), (7,), (3, 4, 5), ())]
    theirs, others = ([nn.Parameter(p.detach().clone()) for p in ours] for _ in range(2))
    options = {"lr": 1e-3, "betas": (0.908, 0.99), "eps": 1e-8, "weight_decay": 0.0, **options}
    matrix = nn.Parameter(torch.randn(9, 9))
    groups = [{"params": ours, "enable_lowrank": False}, {"params": [matrix], "rank": 2}]
    optimizer, fused = LDAdamW(groups, **options), torch.optim.AdamW(theirs, **options, fused=True)
    default = torch.optim.AdamW(others, **options)  # on some processors its roots are rounded otherwise
    for step in range(10):
        for mine, same, close in zip(ours, theirs, others, strict=True):
            mine.grad = torch.randn_like(mine) * (step % 3)  # zero gradients too
            same.grad, close.grad = mine.grad.clone(), mine.grad.clone()
        for each in (optimizer, fused, default):
            each.step()
        for mine, same, close in zip(ours, theirs, others, strict=True):
            assert torch.equal(mine, same)
            torch.testing.assert_close(mine, close)


def test_closure(trained: nn.Module) -> None:
    model, optimizer = make()
    for step in range(5):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = models.odd_loss(model, models.odd_inputs(step))
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
    same_weights(model, trained)


def test_learning_rate_is_read_at_each_step() -> None:
    model, optimizer = make(lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 1 else 1e-2)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(1))
    scheduler.step()
    middle = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(1, 2))
    assert not torch.equal(before["tall.weight"], middle["tall.weight"])
    torch.testing.assert_close(dict(model.state_dict()), dict(middle), rtol=0, atol=0)


def test_tensor_learning_rate(trained: nn.Module) -> None:
    model, optimizer = make(lr=torch.tensor(1e-2, dtype=torch.float64))
    train(model, optimizer)
    same_weights(model, trained)


@pytest.mark.parametrize("whose", ["model", "optimizer"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_keeps_the_error(trained: nn.Module, whose: str, set_to_none: bool) -> None:
    model, optimizer = make()
    for step in range(5):
        (model if whose == "model" else optimizer).zero_grad(set_to_none=set_to_none)
        models.odd_loss(model, models.odd_inputs(step)).backward()
        optimizer.step()
    same_weights(model, trained)


def test_gradient_accumulation(trained: nn.Module) -> None:
    model, optimizer = make()
    for step in range(5):
        optimizer.zero_grad()
        for part in models.odd_inputs(step).chunk(3):
            (models.odd_loss(model, part) / 3).backward()
        optimizer.step()
    same_weights(model, trained, atol=1e-10)


def test_clipping_scales_the_gradient_and_not_the_error() -> None:
    model, optimizer = make(lr=0.0)
    train(model, optimizer, range(3))
    error = optimizer.state[model.tall.weight]["error"].clone()
    optimizer.zero_grad()
    models.odd_loss(model, models.odd_inputs(3)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-30)
    assert torch.equal(optimizer.state[model.tall.weight]["error"], error)


def test_grad_scaler(trained: nn.Module) -> None:
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(models.odd_loss(model, models.odd_inputs(step))).backward()
        if step == 2:  # an overflow: the scaler skips, the state waits
            model.wide.bias.grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 4.0
            optimizer.zero_grad()
            scaler.scale(models.odd_loss(model, models.odd_inputs(step))).backward()
        scaler.step(optimizer)
        scaler.update()
    same_weights(model, trained)


def test_step_hooks() -> None:
    model, optimizer = make()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, range(2))
    assert calls == ["before", "after"] * 2


def test_added_group_and_unfrozen_parameter() -> None:
    model = models.odd_net()
    model.short.weight.requires_grad_(False)
    optimizer = LDAdamW([model.tall.weight, model.short.weight], lr=1e-2, rank=2)
    train(model, optimizer, range(2))
    assert model.short.weight not in optimizer.state
    model.short.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [model.square.weight], "lr": 1e-3, "rank": 3})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, range(2, 4))
    assert optimizer.state[model.square.weight]["projector"].shape == (5, 3)
    for name in ("short.weight", "square.weight"):
        assert not torch.equal(dict(model.named_parameters())[name], before[name])
    assert optimizer.state[model.tall.weight]["step"] == 4
    assert optimizer.state[model.square.weight]["step"] == 2


def test_swapped_parameters(trained: nn.Module) -> None:
    """accelerate replaces the parameters in the groups after construction."""
    model, optimizer = make()
    swapped = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for module in model.children():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, swapped[p])
    for group in optimizer.param_groups:
        group["params"] = [swapped[p] for p in group["params"]]
    train(model, optimizer)
    same_weights(model, trained)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resume_from_a_file_is_exact(dtype: torch.dtype) -> None:
    options = {"error_dtype": torch.float32} if dtype == torch.bfloat16 else {}
    model, optimizer = make(dtype, **options)
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(4, 8))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other = make(dtype, **options)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(4, 8))
    same_weights(model, resumed)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert {k: v.dtype for k, v in optimizer.state[p].items()} == {k: v.dtype for k, v in other.state[q].items()}
        torch.testing.assert_close(optimizer.state[p], other.state[q], rtol=0, atol=0)


def test_load_hooks_of_the_user_count() -> None:
    """torch's way to load by name: a hook that puts the saved parameters into this optimizer's order."""
    first, second = nn.Parameter(torch.randn(9, 9)), nn.Parameter(torch.randn(9, 9))
    saved = LDAdamW([("first", first), ("second", second)], rank=2)
    for p in (first, second):
        p.grad = torch.randn_like(p)
    saved.step()
    other = LDAdamW([("second", second), ("first", first)], rank=2)

    def by_name(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        assert state["param_groups"][0]["param_names"] == ["first", "second"]
        return {**state, "state": {0: state["state"][1], 1: state["state"][0]}}

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(saved.state_dict())
    for p in (first, second):
        torch.testing.assert_close(other.state[p], saved.state[p], rtol=0, atol=0)
    assert len(other._optimizer_load_state_dict_post_hooks) == 0


def test_copies_and_pickles(trained: nn.Module) -> None:
    model, optimizer = make()
    train(model, optimizer, range(3))
    optimizer.skipped_steps = 7
    model, optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(3, 5))
    same_weights(model, trained)
    assert optimizer.skipped_steps == 7


def refused_copies() -> list[str]:
    """A copy of an optimizer with a process group, and a whole state for a sharded one."""
    model, optimizer = make(process_group=dist.group.WORLD)
    with pytest.raises(RuntimeError) as copied:
        copy.deepcopy(optimizer)
    train(model, optimizer, range(1))
    alone, whole = make()
    train(alone, whole, range(1))
    with pytest.raises(ValueError) as loaded:
        optimizer.load_state_dict(whole.state_dict())
    train(model, optimizer, range(1, 2))  # it goes on with its own
    return [str(copied.value), str(loaded.value)]


def test_what_does_not_travel_is_refused() -> None:
    for copied, loaded in run_ranks(2, refused_copies):
        assert "process group does not travel" in copied
        assert "was saved whole, this optimizer keeps shards of it" in loaded


def resume_with_dcp(options: StateDictOptions) -> list[bool]:
    """Save after 4 steps, go on to 8, and let a fresh run that loads the state do the same."""

    def sharded() -> tuple[nn.Module, LDAdamW]:
        model = models.odd_net()
        fully_shard(model)
        return model, LDAdamW(model.named_parameters(), lr=1e-2, rank=2)

    model, optimizer = sharded()
    train(model, optimizer, range(4))
    weights, state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    train(model, optimizer, range(4, 8))

    resumed, other = sharded()
    set_state_dict(resumed, other, model_state_dict=weights, optim_state_dict=state, options=options)
    train(resumed, other, range(4, 8))
    return [
        torch.equal(p.to_local(), q.to_local()) for p, q in zip(model.parameters(), resumed.parameters(), strict=True)
    ]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    "options",
    [StateDictOptions(), StateDictOptions(full_state_dict=True), StateDictOptions(flatten_optimizer_state_dict=True)],
    ids=["sharded", "full", "flat"],
)
def test_distributed_checkpoint_resumes_exactly(world_size: int, options: StateDictOptions) -> None:
    for same in run_ranks(world_size, resume_with_dcp, options):
        assert all(same)
