"""Training runs with the real DeepSpeed engine, watched from the optimizer's side."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import models
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldadam_dist import LDAdamW

STEPS = 20
MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Tensor], Callable[[int], Tensor]]] = {
    "llama": (models.tiny_llama, models.llama_loss, models.llama_tokens),
    "odd": (models.odd_net, models.odd_loss, models.odd_inputs),
    "experts": (models.expert_net, models.odd_loss, models.odd_inputs),
}
PARAMS = {"lr": 1e-2, "weight_decay": 0.1, "rank": 2}

PRECISION: dict[torch.dtype, dict[str, Any]] = {
    torch.bfloat16: {"bf16": {"enabled": True}},
    torch.float16: {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}},  # the first steps overflow
}

Pieces = dict[str, tuple[int, Tensor]]
"""By parameter: the first of the elements that a rank has, and those."""


@dataclass(frozen=True)
class Run:
    """A model and the DeepSpeed configuration to train it with."""

    name: str
    model: str
    zero: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    in_init: bool = False

    def __str__(self) -> str:
        return self.name

    def full_config(self) -> dict[str, Any]:
        """With what all runs have: buckets so small that every matrix takes several."""
        zero = {"reduce_bucket_size": 150, "allgather_bucket_size": 150, **self.zero}
        if zero["stage"] == 3:
            zero = {"stage3_param_persistence_threshold": 10, **zero}  # vectors are kept whole, matrices are not
        return {
            "train_micro_batch_size_per_gpu": 1,  # only the number of micro-batches matters
            "gradient_clipping": 0.5,
            "steps_per_print": 10**9,
            "zero_optimization": zero,
            "optimizer": {"type": "LDAdamW", "params": {**PARAMS, **self.params}},
            **PRECISION.get(self.dtype, {}),
            **self.config,
        }


def quiet_deepspeed() -> Any:
    """Our integration; DeepSpeed is then imported without its log and its minutes of compilation on CPU."""
    warnings.simplefilter("ignore")  # deepspeed's own
    for name, value in (
        ("RANK", dist.get_rank()),
        ("LOCAL_RANK", dist.get_rank()),
        ("WORLD_SIZE", dist.get_world_size()),
    ):
        os.environ[name] = str(value)
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    from ldadam_dist.integrations import deepspeed as integration

    return integration


@contextmanager
def engine_of(run: Run, **arguments: Any) -> Iterator[tuple[Any, nn.Module]]:
    """The engine that the configuration alone makes, and its model."""
    quiet_deepspeed()
    import deepspeed

    build = MODELS[run.model][0]
    config = run.full_config()
    if run.in_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = build(run.dtype)
    else:
        model = build(run.dtype)
    if "optimizer" in arguments:
        del config["optimizer"]
    engine, *_ = deepspeed.initialize(model=model, config=config, **arguments)
    try:
        yield engine, model
    finally:
        engine.destroy()


def train_step(run: Run, engine: Any, step: int) -> None:
    """One update on this rank's part of the batch, in as many micro-batches as the configuration says."""
    _, loss_of, data = MODELS[run.model]
    batch = data(step).to(engine.device)
    batch = batch.to(run.dtype) if batch.is_floating_point() else batch
    mine = batch.chunk(dist.get_world_size())[dist.get_rank()]
    for part in mine.chunk(engine.gradient_accumulation_steps()):
        engine.backward(loss_of(engine, part))
        engine.step()


class Watch:
    """Sees the optimizer's flat tensors: master weights, and the gradients of a step just before it is taken."""

    def __init__(self, optimizer: LDAdamW) -> None:
        assert optimizer._partitions is not None
        self.partitions = optimizer._partitions._partitions
        self.grads: Pieces = {}
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def weights(self) -> Pieces:
        return {name: piece for p in self.partitions for name, piece in _pieces(p, p.tensor.detach())}

    def take_grads(self) -> Pieces:
        """The gradients since the last call."""
        grads, self.grads = self.grads, {}
        return grads

    def _before_step(self, optimizer: LDAdamW, *_: Any) -> None:
        stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
        for p in self.partitions:
            if id(p.tensor) in stepped and p.tensor.grad is not None:
                self.grads.update(_pieces(p, p.tensor.grad))


def _pieces(partition: Any, flat: Tensor) -> Iterator[tuple[str, tuple[int, Tensor]]]:
    for param in partition.params:
        run = param.elements
        yield param.name, (run.starts[run.index], flat[run.offset :][: run.length].clone().cpu())


def train(run: Run) -> dict[str, Any]:
    """What one rank saw: its pieces of weights and gradients in every step, its states, and the model's weights."""
    found: dict[str, Any] = {"weights": [], "grads": []}
    with engine_of(run) as (engine, model):
        optimizer = engine.basic_optimizer
        optimizer.attach_found()
        watch = Watch(optimizer)
        found["weights"].append(watch.weights())
        for step in range(STEPS):
            train_step(run, engine, step)
            found["weights"].append(watch.weights())
            found["grads"].append(watch.take_grads())
        found["skipped"] = engine.skipped_steps
        found["state"] = {name: state for flat in optimizer.state.values() for name, state in flat.items()}
        found["placement"] = optimizer.placement()
        found["shapes"] = {param.name: param.shape for p in watch.partitions for param in p.params}
        found["model"] = whole_model(engine, model)
    return found


def whole_model(engine: Any, model: nn.Module) -> dict[str, Tensor]:
    """The weights that the model computes with."""
    import deepspeed

    params = list(model.parameters()) if engine.zero_optimization_stage() == 3 else []
    with deepspeed.zero.GatheredParameters(params):
        return {name: param.detach().clone().cpu() for name, param in model.named_parameters()}


def assembled(pieces: list[Pieces], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Whole tensors from the pieces of all ranks, each element of which one rank must have."""
    whole = {}
    for name, shape in shapes.items():
        flat = torch.full((torch.Size(shape).numel(),), torch.nan)
        for start, piece in (rank[name] for rank in pieces):
            assert flat[start : start + len(piece)].isnan().all(), f"two ranks have the same elements of {name}"
            flat[start : start + len(piece)] = piece
        assert not flat.isnan().any(), f"nobody has some elements of {name}"
        whole[name] = flat.view(shape)
    return whole
