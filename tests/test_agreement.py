"""Ranks that come to differ are named on all ranks, before anything changes; what they agree on goes on unasked."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ldadam_dist import LDAdamW, clip_grad_norm_
from ldadam_dist.consistency import KEPT

RANKS = 2


def built(placement=None, count=3, **settings):
    """Parameters (12, 10) of two ranks, with an optimizer that has made two steps."""
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    params = [nn.Parameter(distribute_tensor(torch.randn(12, 10), mesh, [placement or Shard(0)])) for _ in range(count)]
    named = [(f"layer{i}", param) for i, param in enumerate(params)]
    optimizer = LDAdamW([{"params": named[:1]}, {"params": named[1:]}], rank=4, **settings)
    for _ in range(2):
        stepped(params, optimizer)
    return params, optimizer


def stepped(params, optimizer):
    for param in params:
        param.grad = torch.randn_like(param) if param.requires_grad else None
    optimizer.step()


def freeze(params, optimizer):
    params[1].requires_grad_(False)


def load(params, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def add(params, optimizer):
    params.append(nn.Parameter(params[0].detach().clone()))
    optimizer.add_param_group({"params": [("added", params[-1])]})


def change(number, **settings):
    def apply(params, optimizer):
        optimizer.param_groups[number].update(settings)

    return apply


ALONE = {
    "freeze": (freeze, "layer1"),
    "load": (load, "layer0"),
    "add": (add, "added"),
    "lr": (change(1, lr=0.5), "layer1"),
    "lr tensor": (change(0, lr=torch.tensor(0.5)), "layer0"),
    "lr_scale": (change(1, lr_scale=0.5), "layer1"),
    "weight_decay": (change(0, weight_decay=0.1), "layer0"),
    "betas": (change(1, betas=(0.5, 0.5)), "layer1"),
    "rho": (change(0, rho=0.5), "layer0"),
    "rank": (change(1, rank=2), "layer1"),
    "enable_lowrank": (change(1, enable_lowrank=False), "layer1"),
    "metrics_every": (change(1, metrics_every=1), "layer1"),
}


def one_rank_alone():
    for what, (alone, name) in ALONE.items():
        params, optimizer = built()
        if dist.get_rank() == 1:
            alone(params, optimizer)
        before = [param.to_local().clone() for param in params]
        with pytest.raises(RuntimeError, match=f"ranks 0 and 1 differ in parameter .*{name}"):
            stepped(params, optimizer)
        assert all(torch.equal(a, b.to_local()) for a, b in zip(before, params, strict=True)), what
        if dist.get_rank() == 0:
            alone(params, optimizer)
        if what not in ("rank", "enable_lowrank"):  # fixed by the first step
            stepped(params, optimizer)


def one_rank_refuses():
    """A gradient that cannot be stepped is refused where it is, and the others do not wait."""
    params, optimizer = built()
    for param in params:
        param.grad = torch.zeros_like(param)
    if dist.get_rank() == 1:
        optimizer.state[params[2]]["projector"] = optimizer.state[params[1]]["projector"][:, :2]
    expected = (ValueError, "projector of rank 2") if dist.get_rank() == 1 else (RuntimeError, "another rank refuses")
    with pytest.raises(expected[0], match=expected[1]):
        optimizer.step()


def all_ranks_alike():
    """Freezing, thawing, adding and loading on all ranks: no complaint, and nothing is kept for each combination."""
    params, optimizer = built(count=8)
    chance = torch.Generator().manual_seed(0)
    for _ in range(KEPT + 20):
        frozen = torch.rand(len(params), generator=chance) < 0.5
        for param, freezes in zip(params, frozen.tolist(), strict=True):
            param.requires_grad_(not freezes)
        stepped(params, optimizer)
    assert len(optimizer._plans) == KEPT
    for alike in (load, add, change(0, lr=0.5)):
        alike(params, optimizer)
        stepped(params, optimizer)


def test_a_rank_that_differs_is_named_on_all_ranks():
    run_ranks(RANKS, one_rank_alone)


def test_a_refusal_reaches_all_ranks():
    run_ranks(RANKS, one_rank_refuses)


def test_what_all_ranks_change_alike_is_taken():
    run_ranks(RANKS, all_ranks_alike)


def ddp(**settings):
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 10)))
    optimizer = LDAdamW(model.parameters(), rank=4, process_group=model.process_group, **settings)
    return model, optimizer


def backward(model, seed=None):
    torch.manual_seed(dist.get_rank() if seed is None else seed)
    model(torch.randn(8, 10)).square().sum().backward()


def replicas_with_other_gradients():
    # DDP forgotten, or the last backward of a step within no_sync: at the first step
    model, optimizer = ddp()
    before = [param.clone() for param in model.parameters()]
    with model.no_sync():
        backward(model)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] differ in 4 of 4 gradients, first in that of .*no_sync"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    # later, with check_replicas_every; a last bit, as after clipping by other hardware, is none
    model, optimizer = ddp(check_replicas_every=2)
    backward(model)
    for param in model.parameters():
        param.grad *= 1 + dist.get_rank() * 2.0**-23
    optimizer.step()
    optimizer.zero_grad()
    with model.no_sync():
        backward(model)
    with pytest.raises(RuntimeError, match="gradients"):
        optimizer.step()
    # weights: at the start
    model, optimizer = ddp()
    backward(model)
    with torch.no_grad():
        model.module[1].weight[0, 0] += dist.get_rank()
    with pytest.raises(RuntimeError, match="weights, first in"):
        optimizer.step()
    # a gradient that cannot be used skips the step, and the next is compared
    model, optimizer = ddp()
    for scale, raises in ((float("nan"), False), (1.0, True)):
        optimizer.zero_grad()
        with model.no_sync():
            backward(model)
        model.module[0].weight.grad *= scale
        if raises:
            with pytest.raises(RuntimeError, match="gradients"):
                optimizer.step()
        else:
            with pytest.warns(UserWarning, match="not finite|skipped"):
                optimizer.step()


def test_averaged_gradients_that_differ_are_found():
    run_ranks(RANKS, replicas_with_other_gradients)


def group_on_one_rank():
    params = [nn.Parameter(torch.randn(12, 10))]
    reference = LDAdamW([nn.Parameter(torch.randn(12, 10))], rank=4)  # both build one without, which is left alone
    dist.barrier()
    optimizer = LDAdamW(params, rank=4, process_group=None if dist.get_rank() else dist.group.WORLD)
    dist.barrier()
    reference.param_groups[0]["params"][0].grad = torch.randn(12, 10)
    reference.step()
    if dist.get_rank() == 1:
        params[0].grad = torch.randn(12, 10)
        before = params[0].clone()
        with pytest.raises(RuntimeError, match=r"rank 0 has built this optimizer with process_group=.*\[0, 1\]"):
            optimizer.step()
        assert torch.equal(params[0], before)


def test_a_process_group_on_one_rank_only_is_found():
    run_ranks(RANKS, group_on_one_rank)


def clipped():
    """Parameters on several meshes and none, each of whose gradients is missing on one rank, beside one process."""
    rank, world = dist.get_rank(), init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    layouts = [
        *((world, (Shard(d),)) for d in (0, 1)),
        *((grid, (one, other)) for one in (Replicate(), Shard(0)) for other in (Shard(0), Shard(1), Replicate())),
    ]
    for p in (2.0, 1.0, 3.5, float("inf")):
        torch.manual_seed(1)
        wholes = [torch.randn(9, 14, dtype=torch.float64) for _ in layouts]
        params = []
        for whole, (mesh, placements) in zip(wholes, layouts, strict=True):
            params.append(nn.Parameter(torch.zeros_like(distribute_tensor(whole, mesh, placements))))
            params[-1].grad = distribute_tensor(whole, mesh, placements)
        optimizer = LDAdamW(params, rank=4)
        missing = [(rank + number) % 4 == 0 for number in range(len(params))]
        cut = []  # what the missing parts leave of each gradient
        for param, gone in zip(params, missing, strict=True):
            if gone:
                param.grad = None
            local = torch.zeros_like(param.to_local()) if gone else param.grad.to_local()
            cut.append(local)
        expected = []
        for local, (mesh, placements) in zip(cut, layouts, strict=True):
            power = local.abs().amax((0, 1)) if p == float("inf") and local.numel() else local.abs().pow(p).sum()
            by_kind = sorted(enumerate(placements), key=lambda item: item[1].is_shard())  # copies first
            for dim, placement in by_kind:
                sums = placement.is_shard() and p != float("inf")
                dist.all_reduce(power, dist.ReduceOp.SUM if sums else dist.ReduceOp.MAX, mesh.get_group(dim))
            expected.append(power)
        total = torch.stack(expected)
        total = total.max() if p == float("inf") else total.sum() ** (1 / p)
        kept = [None if param.grad is None else param.grad.to_local().clone() for param in params]
        norm = clip_grad_norm_(optimizer, 1.0, p).full_tensor()
        assert torch.allclose(norm, total, rtol=1e-14, atol=0)
        norms = [torch.zeros_like(norm) for _ in range(4)]
        dist.all_gather(norms, norm)
        assert all(torch.equal(norm, other) for other in norms)
        for param, before in zip(params, kept, strict=True):
            assert (param.grad is None) == (before is None)
            if before is not None:
                assert torch.allclose(param.grad.to_local(), before / (norm + 1e-6), rtol=1e-14, atol=0)
        optimizer.step()
    if rank == 2:
        params[0].grad.to_local().view(-1)[0] = float("nan")
    assert clip_grad_norm_(optimizer, 1.0).full_tensor().isnan()


def test_the_norm_to_clip_by_is_the_same_on_all_ranks():
    run_ranks(4, clipped)


def clipped_replicas():
    model, optimizer = ddp()
    backward(model)
    expected = nn.utils.get_total_norm([param.grad for param in model.parameters()])
    norm = clip_grad_norm_(optimizer, 0.5)
    assert torch.allclose(norm, expected)
    assert torch.allclose(nn.utils.get_total_norm([param.grad for param in model.parameters()]), torch.tensor(0.5))
    optimizer.step()
    if dist.get_rank() == 1:
        optimizer.zero_grad()
    assert torch.allclose(clip_grad_norm_(optimizer, 9.0), torch.tensor(0.5))


def test_clipping_of_replicas():
    run_ranks(RANKS, clipped_replicas)


def test_clipping_in_one_process():
    param = nn.Parameter(torch.zeros(12, 10, dtype=torch.bfloat16))
    optimizer = LDAdamW([param], rank=4)
    assert clip_grad_norm_(optimizer, 1.0) == 0
    param.grad = torch.full_like(param, 0.5)
    assert torch.allclose(clip_grad_norm_(optimizer, 1.0).float(), torch.tensor(120**0.5 / 2), rtol=1e-2)
    assert param.grad.dtype == torch.bfloat16
    assert clip_grad_norm_(optimizer, 1.0, float("inf")) < 0.1
    with pytest.raises(ValueError, match="norm_type=0"):
        clip_grad_norm_(optimizer, 1.0, 0)
    param.grad.fill_(float("inf"))
    assert clip_grad_norm_(optimizer, 1.0).isinf()
    assert not param.grad.isfinite().any()
