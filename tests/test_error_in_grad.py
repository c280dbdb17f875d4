"""error_in_grad: the numbers of a separate gradient, its memory saved, and everything that would spoil it refused."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from test_sharded import BUILD, shard
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ldadam_dist import LDAdamW, clip_grad_norm_

STEPS = 6
MATRICES = ("wide.weight", "square.weight", "tall.weight", "short.weight")


def make(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, LDAdamW]:
    model = models.odd_net(dtype)
    options = {"lr": 1e-2, "rank": 2, "weight_decay": 0.1, "error_in_grad": True, **options}
    return model, LDAdamW(model.named_parameters(), **options)


def backward(model: nn.Module, step: int, micro_batches: int = 1) -> None:
    for part in models.odd_inputs(step).to(next(model.parameters()).dtype).chunk(micro_batches):
        (models.odd_loss(model, part) / micro_batches).backward()


def train(
    model: nn.Module, optimizer: LDAdamW, steps: range = range(STEPS), clip: float | None = None, **options: Any
) -> None:
    for step in steps:
        backward(model, step, **options)
        if clip is not None:
            clip_grad_norm_(optimizer, clip)
        optimizer.step()
        optimizer.zero_grad()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def seen(model: nn.Module, optimizer: LDAdamW) -> dict[str, Tensor]:
    """Weights and errors on this process."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = local(param).detach().clone()
        if "error" in optimizer.state[param]:
            found[f"error of {name}"] = local(optimizer.state[param]["error"]).clone()
    return found


def in_place(optimizer: LDAdamW) -> list[bool]:
    """Of each parameter with an error, whether it is the gradient."""
    return [
        param.grad is not None and local(param.grad).data_ptr() == local(state["error"]).data_ptr()
        for param, state in optimizer.state.items()
        if "error" in state and local(state["error"]).numel()
    ]


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


ZERO: dict[str, Callable[[nn.Module, LDAdamW], None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, to zero": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "first one, then the other": lambda model, optimizer: [model.zero_grad(), optimizer.zero_grad()][0],
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("zero", ZERO)
def test_the_numbers_are_those_of_a_separate_gradient(zero: str, micro_batches: int) -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    for step in range(STEPS):
        for m, o in ((model, optimizer), (other, plain)):
            ZERO[zero](m, o)
            backward(m, step, micro_batches)
            o.step()
        close(seen(model, optimizer), seen(other, plain))
        assert in_place(optimizer) == [True] * 4 + [False]  # `unused` has no error yet


def test_backward_accumulates_into_the_error() -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    for m, o in ((model, optimizer), (other, plain)):
        train(m, o, range(1))
        backward(m, 1)
    for name in MATRICES:
        param, apart = model.get_parameter(name), other.get_parameter(name)
        assert param.grad is optimizer.state[param]["error"]
        torch.testing.assert_close(param.grad, plain.state[apart]["error"] + apart.grad, rtol=0, atol=1e-13)


class Allocations(TorchDispatchMode):
    """Counts new storages of a size."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.count += tensor.numel() >= self.elements
        return out


def test_a_step_allocates_nothing_as_large_as_the_matrix() -> None:
    """400 × 300 with rank 4: factors are at most 1,600 elements."""
    param = nn.Parameter(torch.randn(400, 300))
    x = torch.randn(300, generator=torch.Generator().manual_seed(0))
    optimizer = LDAdamW([param], rank=4, error_in_grad=True)
    for step in range(3):
        (param @ x).square().sum().backward()
        with Allocations(param.numel()) as allocated:
            optimizer.step()
            optimizer.zero_grad()
        assert step == 0 or allocated.count == 0


def test_bfloat16_is_as_close_as_it_rounds() -> None:
    (model, optimizer), (other, plain) = make(torch.bfloat16), make(torch.bfloat16, error_in_grad=False)
    for m, o in ((model, optimizer), (other, plain)):
        train(m, o)
    close(seen(model, optimizer), seen(other, plain), 3e-2)


def test_stacks_and_convolutions() -> None:
    found = []
    for error_in_grad in (True, False):
        model = models.expert_net()
        groups = [
            {"params": [p for n, p in model.named_parameters() if "conv" in n], "flatten": True},
            {"params": [p for n, p in model.named_parameters() if "conv" not in n]},
        ]
        optimizer = LDAdamW(groups, lr=1e-2, rank=2, error_in_grad=error_in_grad)
        for step in range(3):
            models.odd_loss(model, models.odd_inputs(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(seen(model, optimizer))
        assert all(in_place(optimizer)) == error_in_grad
    close(*found)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_clipping_is_that_of_a_separate_gradient(micro_batches: int) -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    for step in range(STEPS):
        norms = []
        for m, o in ((model, optimizer), (other, plain)):
            backward(m, step, micro_batches)
            norms.append(
                clip_grad_norm_(o, 0.05) if m is model else nn.utils.clip_grad_norm_(list(m.parameters()), 0.05)
            )
            o.step()
        assert norms[0] == norms[1] > 0.05
        assert all(model.get_parameter(name).grad is None for name in MATRICES)
        optimizer.zero_grad()
        plain.zero_grad()
        close(seen(model, optimizer), seen(other, plain), 0.0)


def test_clipping_works_for_other_optimizers_too() -> None:
    for error_in_grad in (False, True):
        model, optimizer = make(error_in_grad=error_in_grad)
        backward(model, 0)
        adamw = torch.optim.AdamW(model.parameters())
        assert clip_grad_norm_(optimizer, 0.05) > 0.05
        assert clip_grad_norm_(adamw, 1.0, norm_type=torch.inf) <= 0.05


def test_clipping_that_begins_too_late_is_refused_and_can_begin_at_the_next_backward() -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    for m, o in ((model, optimizer), (other, plain)):
        train(m, o, range(2))
        backward(m, 2)
    before = seen(model, optimizer)
    with pytest.raises(RuntimeError, match=r"wide\.weight has already been accumulated into its error"):
        clip_grad_norm_(optimizer, 1e-3)
    close(seen(model, optimizer), before, 0.0)
    for m, o in ((model, optimizer), (other, plain)):
        o.step()
        o.zero_grad()
    optimizer.keep_gradients_apart()
    for m, o in ((model, optimizer), (other, plain)):
        train(m, o, range(3, 5), clip=1e-3)
    close(seen(model, optimizer), seen(other, plain))


def clip_torchs(model: nn.Module, optimizer: LDAdamW) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def unscale(model: nn.Module, optimizer: LDAdamW) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    scaler.unscale_(optimizer)


def average(model: nn.Module, optimizer: LDAdamW) -> None:
    for param in model.parameters():
        if param.grad is not None:
            param.grad /= 2


def write_behind_versions(model: nn.Module, optimizer: LDAdamW) -> None:
    for name in MATRICES:
        model.get_parameter(name).grad.data.mul_(0.5)


def replace(model: nn.Module, optimizer: LDAdamW) -> None:
    for name in MATRICES:
        model.get_parameter(name).grad = model.get_parameter(name).grad.clone()


def create_graph(model: nn.Module, optimizer: LDAdamW) -> None:
    grads = {p: p.grad for p in model.parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models.odd_loss(model, models.odd_inputs(9)).backward(create_graph=True)
    for param, grad in grads.items():  # as torch asks for, or the graph stays
        param.grad = grad


SPOILS: dict[str, tuple[Callable[[nn.Module, LDAdamW], None], str]] = {
    "torch's clipping": (clip_torchs, "was written to after backward"),
    "GradScaler.unscale_": (unscale, "has other values than after backward"),
    "averaging": (average, "was written to after backward"),
    "model.zero_grad to zero": (lambda m, _: m.zero_grad(set_to_none=False), "was written to after backward"),
    "data": (write_behind_versions, "has other values than after backward"),
    "another tensor": (replace, "was replaced by another tensor"),
    "create_graph": (create_graph, "create_graph"),
}
LEAVE_VERSIONS = ("GradScaler.unscale_", "data")
"""Seen after the last backward only."""


@pytest.mark.parametrize(
    ("how", "when"),
    [
        *((how, "after") for how in SPOILS),
        *((how, when) for how in SPOILS if how not in LEAVE_VERSIONS for when in ("before", "between")),
    ],
)
def test_what_else_writes_into_the_buffer_is_refused(how: str, when: str) -> None:
    """Before the backward, between two of them, and after: at the step, which changes nothing, and again."""
    model, optimizer = make()
    train(model, optimizer, range(2))
    spoil, message = SPOILS[how]
    if when != "before":
        backward(model, 2)
    spoil(model, optimizer)
    if when != "after":
        backward(model, 3)
        message = "the buffer of error and gradient of wide.weight"
    before = seen(model, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        close(seen(model, optimizer), before, 0.0)


def test_hooks_that_scale_gradients_in_the_backward_are_refused() -> None:
    model, optimizer = make()
    train(model, optimizer, range(1))
    model.tall.weight.register_post_accumulate_grad_hook(lambda p: [p.grad.mul_(0.5), None][1])
    backward(model, 1)
    with pytest.raises(RuntimeError, match=r"tall\.weight was written to 2 times while 1 gradients were accumulated"):
        optimizer.step()


def test_loss_scaling_is_refused_at_the_first_step() -> None:
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(models.odd_loss(model, models.odd_inputs(0))).backward()
    with pytest.raises(RuntimeError, match="expected no scaled loss"):
        scaler.step(optimizer)
    assert not optimizer.state
    _, plain = make(error_in_grad=False)
    assert not plain._step_supports_amp_scaling


def test_settings_that_do_not_fit_are_refused() -> None:
    param = nn.Parameter(torch.zeros(12, 20))
    half = nn.Parameter(torch.zeros(12, 20, dtype=torch.float16))
    for params, options, message in (
        ([param], {"error_feedback": False}, "error_feedback=False"),
        ([param], {"error_dtype": "bfloat16"}, "error_dtype='bfloat16'"),
        ([half], {}, "float16"),
        ([half], {"error_dtype": "float32"}, "float16"),
        ([param], {"process_group": object()}, "process_group="),
        ([param], {"error_in_grad": 1}, "expected True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            LDAdamW(params, rank=4, **{"error_in_grad": True, **options})
    LDAdamW([param], rank=4, error_in_grad=True, error_dtype="float32")
    optimizer = LDAdamW([param], rank=4, error_in_grad=True)
    with pytest.raises(ValueError, match="float16"):
        optimizer.add_param_group({"params": [half]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [half], "enable_lowrank": False})
    plain = LDAdamW([nn.Parameter(torch.zeros(12, 20))], rank=4, error_dtype="bfloat16")
    alone = LDAdamW([nn.Parameter(torch.zeros(12, 20))], rank=4, error_in_grad=True)
    with pytest.raises(ValueError, match=r"of the saved state .* has dtype torch.float32 and error_dtype='bfloat16'"):
        alone.load_state_dict(plain.state_dict())
    assert alone.param_groups[0]["error_dtype"] is None
    with pytest.raises(ValueError, match="without process_group= and error_in_grad"):
        optimizer.attach_partitions([])


def test_a_missing_gradient_is_missing() -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    for m, o in ((model, optimizer), (other, plain)):
        train(m, o, range(2))
        m.square.weight.requires_grad_(False)
        backward(m, 2)
        m.square.weight.requires_grad_(True)
        o.step()
        o.zero_grad()
    close(seen(model, optimizer), seen(other, plain))
    assert optimizer.state[model.square.weight]["step"] == 2
    assert all(in_place(optimizer)[:4])


def test_a_gradient_that_was_given_by_hand_is_added() -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    for m, o in ((model, optimizer), (other, plain)):
        train(m, o, range(2))
        for param in m.parameters():
            param.grad = torch.ones_like(param)
        o.step()
    close(seen(model, optimizer), seen(other, plain))


@pytest.mark.parametrize("value", [float("nan"), 1e200])
def test_a_gradient_that_is_not_usable_costs_its_matrix_the_error(value: float) -> None:
    model, optimizer = make()
    train(model, optimizer, range(2))
    weights = copy.deepcopy(model.state_dict())
    backward(model, 2)
    kept = seen(model, optimizer)
    model.tall.register_forward_pre_hook(lambda _, inputs: (inputs[0] * value,))
    model.tall.weight.register_hook(lambda grad: torch.full_like(grad, value))
    for name in ("wide", "square", "short"):
        model.get_parameter(f"{name}.weight").requires_grad_(False)
    (model.tall.weight.sum() * 1.0).backward()
    for name in ("wide", "square", "short"):
        model.get_parameter(f"{name}.weight").requires_grad_(True)
    with pytest.warns(UserWarning, match=r"Errors that start again from zero: tall\.weight; the other gradients stay"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    found = seen(model, optimizer)
    assert not found.pop("error of tall.weight").any()
    kept.pop("error of tall.weight")
    close(found, kept, 0.0)


def test_one_expert_that_is_not_usable_costs_no_other_its_error() -> None:
    experts = nn.Parameter(torch.randn(3, 5, 6, dtype=torch.float64))
    optimizer = LDAdamW([experts], rank=2, error_in_grad=True)
    inputs = torch.randn(3, 6, dtype=torch.float64)
    for step in range(2):
        scale = torch.tensor([1.0, float("nan") if step else 1.0, 1.0], dtype=torch.float64)
        (torch.einsum("eij,ej->ei", experts, inputs) * scale[:, None]).square().sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        optimizer.zero_grad()
    error = optimizer.state[experts]["error"]
    assert [bool(matrix.any()) for matrix in error] == [True, False, True]
    assert error.isfinite().all()


def test_a_gradient_that_is_dropped_stays_in_the_error_and_says_so() -> None:
    model, optimizer = make()
    train(model, optimizer, range(1))
    backward(model, 1)
    before = seen(model, optimizer)
    with pytest.warns(UserWarning, match=r"stay in the errors of wide\.weight, square\.weight"):
        optimizer.zero_grad()
    close(seen(model, optimizer), before, 0.0)
    optimizer.step()  # of nothing
    close(seen(model, optimizer), before, 0.0)
    backward(model, 2)
    model.zero_grad()
    backward(model, 3)
    with pytest.warns(UserWarning, match=r"stay in the errors of wide\.weight"):
        optimizer.step()


def resumed(model: nn.Module, optimizer: LDAdamW) -> tuple[nn.Module, LDAdamW]:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, fresh = make()
    train(other, fresh, range(20, 22))  # it has errors of its own
    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    return other, fresh


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("how", [resumed, lambda *both: copy.deepcopy(both)], ids=["file", "copy"])
def test_a_run_goes_on_exactly(how: Any, clip: float | None) -> None:
    model, optimizer = make()
    train(model, optimizer, range(3), clip=clip)
    other, fresh = how(model, optimizer)
    assert not any(in_place(fresh))
    train(model, optimizer, range(3, 6), clip=clip)
    train(other, fresh, range(3, 6), clip=clip)
    close(seen(other, fresh), seen(model, optimizer))


def test_a_state_of_a_separate_gradient_loads_and_a_pending_gradient_is_dropped_with_its_buffer() -> None:
    (model, optimizer), (other, plain) = make(), make(error_in_grad=False)
    train(model, optimizer, range(5))
    backward(model, 5)
    train(other, plain, range(2))
    model.load_state_dict(other.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    for m, o in ((model, optimizer), (other, plain)):
        m.wide.bias.grad = None  # a gradient that lies apart stays, as with any optimizer
        train(m, o, range(2, 4))
    close(seen(model, optimizer), seen(other, plain))


def on_ranks(layout: str) -> dict[str, Any]:
    """What a rank sees of one layout, next to a separate gradient, and of what is refused there."""
    model_name = "blocks" if layout == "tp" else "odd"
    build, loss_of, data, rank = BUILD[model_name]
    world, me = dist.get_world_size(), dist.get_rank()

    def start(error_in_grad: bool) -> tuple[nn.Module, LDAdamW, int, int]:
        model = build(torch.float64)
        if layout.startswith("ddp"):
            view = layout == "ddp-view"
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view, find_unused_parameters=True)
            return wrapped, LDAdamW(model.named_parameters(), rank=rank, error_in_grad=error_in_grad), world, me
        parts, part = shard(model, layout)
        return model, LDAdamW(model.named_parameters(), rank=rank, error_in_grad=error_in_grad), parts, part

    def train_one(model: nn.Module, optimizer: LDAdamW, parts: int, part: int, step: int) -> None:
        for micro_batch in data(step).chunk(parts)[part].chunk(2):
            (loss_of(model, micro_batch) / 2).backward()

    runs = [start(True), start(False)]
    differ, found = 0.0, {}
    try:
        for step in range(4):
            for run in runs:
                train_one(*run, step)
                run[1].step()
                run[1].zero_grad()
            for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
                errors = [o.state[x].get("error") for x, (_, o, *_) in zip((p, q), runs, strict=True)]
                pairs = [(p, q), tuple(errors)] if errors[0] is not None else [(p, q)]
                for ours, theirs in pairs:
                    difference = local(ours.detach()) - local(theirs.detach())
                    differ = max(differ, difference.abs().max().item() if difference.numel() else 0.0)
        found["differ"], found["in place"] = differ, in_place(runs[0][1]).count(True)
    except RuntimeError as error:
        found["refused"] = str(error)
        return found
    model, optimizer, parts, part = runs[0]
    train_one(model, optimizer, parts, part, 9)
    if me == 0 or layout == "ddp":  # under DDP nobody tells
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None and p.ndim == 2], 0.5)
    before = [local(p).detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    found["spoilt"] = str(raised.value)
    found["unchanged"] = all(torch.equal(a, local(b).detach()) for a, b in zip(before, model.parameters(), strict=True))
    return found


def clipped_and_saved() -> dict[str, float]:
    """Under FSDP2: clipping next to torch's, and a checkpoint before the first step and in the middle."""
    build, loss_of, data, rank = BUILD["odd"]
    runs = []
    for error_in_grad in (True, False):
        model = build(torch.float64)
        parts, part = shard(model, "rows")
        runs.append((model, LDAdamW(model.named_parameters(), rank=rank, error_in_grad=error_in_grad)))

    def advance(steps: range, clip: float | None) -> float:
        for step in steps:
            for model, optimizer in runs:
                loss_of(model, data(step).chunk(parts)[part]).backward()
                if clip:
                    norm = clip_grad_norm_(optimizer, clip)
                optimizer.step()
                optimizer.zero_grad()
        differences = [
            local(p.detach() - q.detach())
            for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True)
        ]
        assert clip is None or norm.full_tensor() > clip
        return max(d.abs().max().item() for d in differences if d.numel())

    get_optimizer_state_dict(*runs[0])  # a step with zero gradients
    found = {"after a state dict": advance(range(3), None)}
    assert any(in_place(runs[0][1]))
    weights, state = copy.deepcopy(get_state_dict(*runs[0]))
    advance(range(3, 4), None)
    backward(runs[0][0], 4)
    set_state_dict(*runs[0], model_state_dict=weights, optim_state_dict=state)
    set_state_dict(*runs[1], model_state_dict=weights, optim_state_dict=copy.deepcopy(state))
    for p, q in zip(*(run[0].parameters() for run in runs), strict=True):
        p.grad = q.grad = None
    found["resumed"] = advance(range(5, 7), None)
    runs[0][1].keep_gradients_apart()
    found["clipped"] = advance(range(7, 10), 0.05)
    return found


def everything(layouts: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, float]]:
    return {layout: on_ranks(layout) for layout in layouts}, clipped_and_saved()


@pytest.mark.parametrize(("ranks", "layouts"), [(2, ("rows", "tp", "ddp", "ddp-view")), (3, ("rows", "ddp"))])
def test_ranks_see_the_numbers_of_a_separate_gradient(ranks: int, layouts: tuple[str, ...]) -> None:
    """5 and 3 rows on 2 and 3 ranks: uneven, and one shard of 5 rows on 3 ranks is shorter."""
    for found, saved in run_ranks(ranks, everything, layouts):
        assert max(saved.values()) <= 1e-12, saved
        for layout in layouts:
            if layout == "ddp-view":
                assert "was replaced by another tensor" in found[layout]["refused"]
                continue
            assert found[layout]["differ"] <= 1e-12, layout
            assert found[layout]["in place"] >= 4
            assert "error" in found[layout]["spoilt"]
            assert found[layout]["unchanged"]


def replicas() -> str:
    model = models.odd_net()
    shard(model, "hsdp")
    with pytest.raises(ValueError) as raised:
        LDAdamW(model.named_parameters(), rank=2, error_in_grad=True)
    return str(raised.value)


@pytest.mark.slow
def test_replicas_of_a_mesh_are_refused() -> None:
    for message in run_ranks(4, replicas):
        assert "expected no replicas" in message
