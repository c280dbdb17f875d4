"""On a CUDA device: the numbers of the CPU, of the oracle and of `torch.optim.AdamW`, FSDP2 over NCCL, loss scaling.

Needs nothing but torch, transformers and pytest.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import distributed
import models
import pytest
import torch
import torch.distributed as dist
from reference import Reference
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ldadam_dist import LDAdamW
from ldadam_dist.layout import Axis
from ldadam_dist.requests import Gather, ScatterSum, Sum
from ldadam_dist.runtime import collectives

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0)
BACKEND = "nccl"
STEPS = 20

# Two of a kind are batched where they are small; (190, 210) is stepped in place; (3, 24, 40) is a stack of matrices;
# the last three get AdamW.
SHAPES = [(48, 80), (48, 80), (80, 48), (64, 64), (190, 210), (3, 24, 40), (31,), (4, 30), (3, 4, 5)]


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """Full float32 products, as on the CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    """Float64 on the CPU, the same everywhere."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(weight: Tensor, seed: int) -> Tensor:
    """Float64 on the CPU: a noisy gradient with a falling spectrum that pulls the weight to zero."""
    noise = normal(tuple(weight.shape), seed)
    if weight.ndim == 2:
        noise = noise * torch.logspace(0, -1, weight.shape[1], dtype=torch.float64)
    return noise + 0.3 * weight.detach().cpu().double()


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    found, expected = (t.detach().cpu().double() for t in (found, expected))
    return ((found - expected).abs().max() / expected.abs().max()).item()


def pair(dtype: torch.dtype, scale: float = 1.0, **options: Any) -> tuple[list[nn.Parameter], list[nn.Parameter], Any]:
    """The same parameters on the CPU and on the device, and an optimizer for each."""
    here = [nn.Parameter((normal(shape, seed) * scale).to(dtype)) for seed, shape in enumerate(SHAPES)]
    there = [nn.Parameter(p.detach().clone().to(DEVICE)) for p in here]
    settings = {"lr": 1e-2, "rank": 6, "weight_decay": 0.1, **options}
    return here, there, (LDAdamW(here, **settings), LDAdamW(there, **settings))


@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("options", [{}, {"error_feedback": False}, {"proj_method": "svd_lowrank"}], ids=str)
def test_float32_equals_the_cpu_after_every_step(proj_type: str, options: dict[str, Any]) -> None:
    here, there, (on_cpu, on_device) = pair(torch.float32, proj_type=proj_type, **options)
    for step in range(STEPS):
        for i, (mine, other) in enumerate(zip(here, there, strict=True)):
            mine.grad = gradient(mine, 100 * step + i).float()
            other.grad = mine.grad.to(DEVICE)
        on_cpu.step()
        on_device.step()
        for mine, other in zip(here, there, strict=True):
            assert relative(other, mine) <= 1e-5, f"step {step + 1}, shape {tuple(mine.shape)}"
    for param in there:
        state = on_device.state[param]
        assert all(value.device == DEVICE for key, value in state.items() if key != "step")
        assert (state["step"] == STEPS).all()


@pytest.mark.parametrize(("error_dtype", "noise", "share"), [("float32", 1e-2, 0.03), (None, 5e-2, 0.2)], ids=str)
def test_bfloat16_equals_the_cpu_to_the_last_bits(error_dtype: str | None, noise: float, share: float) -> None:
    """Both start each step from the same weights. Only a tie rounds differently: one unit, two at a power of two.

    An error that is stored in bfloat16 carries such differences on, so more of the weights come near a tie.
    """
    lr = 1e-2
    here, there, (on_cpu, on_device) = pair(torch.bfloat16, scale=0.02, lr=lr, error_dtype=error_dtype)
    different = total = 0
    for step in range(STEPS):
        for i, (mine, other) in enumerate(zip(here, there, strict=True)):
            with torch.no_grad():
                other.copy_(mine)
            mine.grad = gradient(mine, 100 * step + i).bfloat16()
            other.grad = mine.grad.to(DEVICE)
        on_cpu.step()
        on_device.step()
        for mine, other in zip(here, there, strict=True):
            assert other.dtype == torch.bfloat16
            # The absolute term: weights near zero resolve the rounding of the update itself.
            torch.testing.assert_close(other.detach().cpu(), mine.detach(), rtol=2.0**-7, atol=noise * lr)
            different += int((other.detach().cpu() != mine.detach()).sum())
            total += mine.numel()
    assert different < share * total
    state = on_device.state[there[0]]
    assert {key: value.dtype for key, value in state.items()} == {
        "step": torch.float32,
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.float32,
        "projector": torch.float32,
        "error": torch.float32 if error_dtype else torch.bfloat16,
    }


@pytest.mark.parametrize("shape", [(12, 31), (31, 12), (190, 210)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"error_feedback": False, "weight_decay": 0.2, "rho": 0.5}, {"proj_method": "svd", "betas": (0.9, 0.999)}],
    ids=str,
)
def test_float64_equals_the_oracle_after_every_step(shape: tuple[int, int], options: dict[str, Any]) -> None:
    weights = [normal(shape, seed) for seed in (1, 2)]
    params = [nn.Parameter(w.clone().to(DEVICE)) for w in weights]
    optimizer = LDAdamW(params, lr=1e-2, rank=5, **options)
    oracles = [Reference(w, 5, shape[0] <= shape[1], lr=1e-2, **options) for w in weights]
    for step in range(STEPS):
        for i, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
            grad = gradient(oracle.weight, 10 * step + i)
            param.grad = grad.to(DEVICE)
            oracle.step(grad)
        optimizer.step()
        for param, oracle in zip(params, oracles, strict=True):
            torch.testing.assert_close(param.detach().cpu(), oracle.weight, rtol=0, atol=1e-10)
            if options.get("error_feedback", True):
                error = optimizer.state[param]["error"].cpu()
                torch.testing.assert_close(error, oracle.error, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_parameters_equal_torch_adamw_bit_for_bit(dtype: torch.dtype) -> None:
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours = [nn.Parameter(normal(s, 0).to(DEVICE, dtype)) for s in ((50, 8), (7,), (3, 4, 5), ())]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    matrix = nn.Parameter(normal((40, 40), 1).to(DEVICE, dtype))
    groups = [{"params": ours, "enable_lowrank": False}, {"params": [matrix], "rank": 4}]
    optimizer, adamw = LDAdamW(groups, **options), torch.optim.AdamW(theirs, **options)
    for step in range(STEPS):
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = normal(tuple(mine.shape), 10 * step + i).to(DEVICE, dtype)
            other.grad = mine.grad.clone()
        matrix.grad = torch.ones_like(matrix)
        optimizer.step()
        adamw.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_randomized_first_projector_spans_what_it_spans_on_the_cpu(dtype: torch.dtype) -> None:
    grad = (normal((1024, 768), 0) * torch.logspace(0, -1, 768, dtype=torch.float64)).to(dtype)
    projectors = []
    for device in (torch.device("cpu"), DEVICE):
        param = nn.Parameter(torch.zeros(1024, 768, dtype=dtype, device=device))
        optimizer = LDAdamW([param], rank=16, projector_init="randomized")
        param.grad = grad.to(device)
        optimizer.step()
        projectors.append(optimizer.state[param]["projector"].cpu().double())
    here, there = projectors
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(there.mT @ there, torch.eye(16, dtype=torch.float64), rtol=0, atol=tolerance)
    assert (there - here @ (here.mT @ there)).abs().max() <= tolerance


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradient_changes_nothing(value: float) -> None:
    model = models.odd_net().to(DEVICE)
    optimizer = LDAdamW(model.named_parameters(), rank=2)
    models.odd_loss(model, models.odd_inputs(0).to(DEVICE)).backward()
    optimizer.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    model.wide.bias.grad[0] = value
    with pytest.warns(UserWarning, match=r"wide\.bias is not finite"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


def test_grad_scaler_with_float16_autocast() -> None:
    """The scale is a power of two, so unscaling is exact: the same as dividing by hand. It starts far too high."""
    models_ = [models.odd_net(torch.float32).to(DEVICE) for _ in range(2)]
    optimizers = [LDAdamW(model.named_parameters(), lr=1e-2, rank=2) for model in models_]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40)
    taken, losses = 0, []
    for _ in range(60):
        scale = scaler.get_scale()
        for model in models_:
            model.zero_grad()
            with torch.autocast(DEVICE.type, torch.float16):
                loss = models.odd_loss(model, models.odd_inputs(0).float().to(DEVICE))
            (scaler.scale(loss) if model is models_[0] else loss * scale).backward()
        losses.append(loss.item())
        finite = all(p.grad.isfinite().all() for p in models_[1].parameters() if p.grad is not None)
        scaler.step(optimizers[0])
        scaler.update()
        if finite:
            for p in models_[1].parameters():
                if p.grad is not None:
                    p.grad.mul_(1 / scale)
            optimizers[1].step()
            taken += 1
        else:
            assert scaler.get_scale() < scale
        assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models_), strict=True))
    assert 10 <= taken < 60
    assert optimizers[0].skipped_steps == 0  # the scaler skips, the optimizer is not called
    assert losses[-1] < 0.9 * losses[0]


def test_resume_from_a_file_written_by_the_device() -> None:
    def make() -> tuple[nn.Module, LDAdamW]:
        model = models.odd_net().to(DEVICE)
        return model, LDAdamW(model.named_parameters(), lr=1e-2, rank=2)

    def train(model: nn.Module, optimizer: LDAdamW, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            models.odd_loss(model, models.odd_inputs(step).to(DEVICE)).backward()
            optimizer.step()

    model, optimizer = make()
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(4, 8))
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    resumed, other = make()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(4, 8))
    torch.testing.assert_close(model.state_dict(), resumed.state_dict(), rtol=0, atol=1e-12)
    for param in resumed.parameters():
        assert other.state[param]["exp_avg"].device == DEVICE
        assert other.state[param]["step"].device.type == "cpu"


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks start as fresh processes: in a forked one CUDA does not start if anything has asked for it before."""
    monkeypatch.setattr(distributed, "_context", multiprocessing.get_context("spawn"))


def join_nccl(folder: str, world_size: int) -> torch.device:
    """Leave the gloo group of `run_ranks` for one of NCCL, one device a rank."""
    rank = dist.get_rank()
    device = torch.device(DEVICE.type, rank)
    dist.barrier()
    dist.destroy_process_group()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("highest")
    store = dist.FileStore(f"{folder}/store", world_size)
    limit = timedelta(seconds=100)
    dist.init_process_group(BACKEND, store=store, rank=rank, world_size=world_size, timeout=limit)
    return device


def llama_history(
    dtype: torch.dtype, device: torch.device, proj_type: str, shard: bool, offload: bool = False
) -> list[dict[str, Tensor]]:
    """Weights and errors, whole, after every step of a small Llama; alone, or as one rank of the default group."""
    model = models.tiny_llama(dtype).to(device)
    if shard:
        policy = {"offload_policy": CPUOffloadPolicy()} if offload else {}
        for block in model.model.layers:
            fully_shard(block, **policy)
        fully_shard(model, **policy)
    optimizer = LDAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, rank=4, proj_type=proj_type)
    history = []
    for step in range(STEPS):
        tokens = models.llama_tokens(step)
        tokens = tokens.chunk(dist.get_world_size())[dist.get_rank()] if shard else tokens
        optimizer.zero_grad()
        models.llama_loss(model, tokens.to(device)).backward()
        optimizer.step()
        seen: dict[str, Tensor] = dict(model.named_parameters())
        seen |= {f"error of {n}": optimizer.state[p]["error"] for n, p in model.named_parameters() if p.ndim == 2}
        history.append({name: whole(tensor) for name, tensor in seen.items()})
    for param in model.parameters() if shard else ():
        for key, value in optimizer.state[param].items():
            if key != "step":
                assert isinstance(value, DTensor)
                assert value.to_local().device == (torch.device("cpu") if offload else device)
    return history


def whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # NCCL gathers no CPU tensors
    return tensor.detach().cpu().clone()


def sharded_history(
    folder: str, world_size: int, dtype: torch.dtype, proj_type: str, offload: bool
) -> list[dict[str, Tensor]]:
    return llama_history(dtype, join_nccl(folder, world_size), proj_type, shard=True, offload=offload)


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
@pytest.mark.parametrize("proj_type", ["left", "right"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_fsdp2_over_nccl_equals_one_device(
    tmp_path: Path, world_size: int, offload: bool, proj_type: str, dtype: torch.dtype, tolerance: float
) -> None:
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} CUDA devices")
    expected = llama_history(dtype, DEVICE, proj_type, shard=False)
    settings = (str(tmp_path), world_size, dtype, proj_type, offload)
    for found in distributed.run_ranks(world_size, sharded_history, *settings):
        for step, (mine, single) in enumerate(zip(found, expected, strict=True), start=1):
            assert mine.keys() == single.keys()
            for name, tensor in single.items():
                # In float32 the rounding of the gradients comes back in them, and first in the error.
                factor = 10 if name.startswith("error") and dtype == torch.float32 else 1
                assert relative(mine[name], tensor) <= factor * tolerance, f"step {step}, {name}"


def answers_over_nccl(folder: str) -> None:
    """Every collective of the runtime on a group of one rank, where each must give back what went in."""
    device = join_nccl(folder, 1)
    axis = Axis((1,), 0, dist.group.WORLD)
    a, b = torch.randn(3, 5, 7, device=device), torch.randn(2, 4, 6, device=device).mT  # one is not contiguous
    answers = [
        *collectives.answer_sums([Sum(axis, a), Sum(axis, b)], axis),
        *collectives.answer_scatter_sums([ScatterSum(axis, a), ScatterSum(axis, b)], axis),
        *collectives.answer_gathers([Gather(axis, a, -1, 7), Gather(axis, b, -2, 6)], axis),
    ]
    for found, tensor in zip(answers, [a, b] * 3, strict=True):
        assert torch.equal(found, tensor)
    (found,) = collectives.exchange([[a]], [a.numel()], axis, a)
    assert torch.equal(found, a.flatten())
    for function in (collectives.reduce_to, collectives.broadcast_from):
        function(vectors := {0: a.flatten().clone()}, axis)
        assert torch.equal(vectors[0], a.flatten())
    status = collectives.agree(torch.tensor([-1, 0, 2], dtype=torch.int32), dist.group.WORLD, device)
    assert status.tolist() == [-1, 0, 2]
    assert collectives.gather_objects("text", dist.group.WORLD) == ["text"]


@pytest.mark.usefixtures("spawned")
def test_collectives_over_nccl(tmp_path: Path) -> None:
    distributed.run_ranks(1, answers_over_nccl, str(tmp_path))
