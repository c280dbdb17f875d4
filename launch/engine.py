"""What trains: a model and its optimizer, spread over the ranks by PyTorch, or by DeepSpeed (launch/zero.py)."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, async_save, load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from launch.config import Config, ModelOptions, expect
from launch.distributed import World
from launch.optim import build_optimizer
from ldadam_dist import LDAdamW, clip_grad_norm_
from ldadam_dist.integrations.ddp import keep_matrices_local


class Update(NamedTuple):
    """What became of one batch."""

    loss: torch.Tensor
    """Mean over this rank's sequences."""
    grad_norm: torch.Tensor
    """Over all ranks, before it is clipped; not finite in a step that was skipped, or if it is not known."""
    seconds: float
    """Of the optimizer's step; DeepSpeed clips and gathers the weights in it."""


class Engine(ABC):
    """A model that computes and learns; subclasses say how it is spread.

    Attributes:
        module: computes the loss.
        optimizer: its groups hold the learning rates that the next update takes.
        parallel: how the model is spread, in a word.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    parallel: str
    autocast = False

    def __init__(self, model: LlamaForCausalLM, config: Config, world: World) -> None:
        self.world = world
        self.bf16 = uses_bf16(config.model, world)
        self.parameter_count = sum(parameter.numel() for parameter in model.parameters())

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of each token given those before it; tokens (sequences, seq_len)."""
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.autocast):
            return self.module(input_ids=tokens, labels=tokens).loss

    @abstractmethod
    def update(self, micro_batches: Sequence[torch.Tensor]) -> Update:
        """Train on this rank's share of a batch: gradients averaged over all of it, clipped, one optimizer step."""

    @property
    def skipped_steps(self) -> int:
        return int(getattr(self.optimizer, "skipped_steps", 0))

    def metrics(self) -> dict[str, float]:
        """What the optimizer's last measured step was like, if it measures; every rank takes part."""
        return self.optimizer.metrics().total if self.optimizer.defaults.get("metrics_every") else {}

    @abstractmethod
    def save(self, folder: Path, world: World, background: bool) -> Callable[[], Any]:
        """Write model and optimizer as they are now; every rank takes part.

        Args:
            world: to communicate over, from another thread.
            background: return as soon as training may go on, if the engine can.
        Returns:
            to be called before training goes on, or, with `background`, any time: ends the writing, and raises what
            went wrong.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    def seconds(self, function: Callable[[], Any]) -> float:
        """How long a call takes on the device."""
        self._synchronize()
        started = time.perf_counter()
        function()
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


class TorchEngine(Engine):
    """FSDP2, DDP or one device; its checkpoints load on any number of ranks."""

    def __init__(self, model: LlamaForCausalLM, config: Config, world: World, saved_groups: int | None = None) -> None:
        super().__init__(model, config, world)
        self.parallel = resolve_parallel(config.model, world)
        self.autocast = self.bf16 and self.parallel != "fsdp"  # under FSDP2 the mixed-precision policy does it
        lowrank = config.optimizer.gradient_sync == "lowrank"
        mesh = fsdp_mesh(config.model, world) if self.parallel == "fsdp" else None
        self.module = self._spread(model, mesh["shard"] if mesh is not None and lowrank else mesh)
        self.module.train()
        replicas: dict[str, Any] = {}
        if lowrank and mesh is not None:
            replicas = {"replicate_mesh": mesh["replicate"]}
        elif lowrank:
            replicas = {"process_group": self.module.process_group}
        self.optimizer = build_optimizer(self.module, config.optimizer, saved_groups, **replicas)
        if isinstance(self.module, DistributedDataParallel) and lowrank:
            keep_matrices_local(self.module, self.optimizer)
        self.clip, self.error_in_grad = config.optimizer.clip, config.optimizer.error_in_grad
        # One process without a process group saves and loads alone, as it should.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def _spread(self, model: LlamaForCausalLM, mesh: DeviceMesh | None) -> nn.Module:
        device = self.world.device
        if mesh is not None:
            dtype = torch.bfloat16 if self.bf16 else torch.float32
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            return fully_shard(model, mesh=mesh, mp_policy=policy)
        model.to(device)
        if self.parallel == "ddp":
            return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        return model

    def update(self, micro_batches: Sequence[torch.Tensor]) -> Update:
        total = torch.zeros((), device=self.world.device)
        for index, tokens in enumerate(micro_batches, start=1):
            with self._accumulate(is_last=index == len(micro_batches)):
                loss = self.loss(tokens) / len(micro_batches)
                loss.backward()
            total += loss.detach()
        norm = self._clip()
        seconds = self.seconds(self.optimizer.step)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(total, norm.full_tensor() if isinstance(norm, DTensor) else norm, seconds)

    def _clip(self) -> torch.Tensor:
        """Clip the gradients; their norm, which is not known (NaN) where they are one with the errors."""
        if self.error_in_grad and not self.clip:
            return torch.full((), math.nan)
        return clip_grad_norm_(self.optimizer, self.clip or math.inf)

    def _accumulate(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of one micro-batch: ranks exchange gradients with the last one only."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(is_last)
        elif isinstance(self.module, DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return contextlib.nullcontext()

    def save(self, folder: Path, world: World, background: bool) -> Callable[[], Any]:
        state = self._state()
        writing = async_save(state, checkpoint_id=folder, process_group=world.group) if background else None

        def end() -> None:
            try:
                if isinstance(writing, Future):
                    writing.result()
                else:
                    save(state, checkpoint_id=folder, process_group=world.group)
            except CheckpointException as error:  # which is no Exception, and tells every rank's traceback
                told = (f"rank {rank}: {type(why).__name__}: {why}" for rank, (why, _) in error.failures.items())
                raise OSError("; ".join(told)) from error

        return end

    def load(self, folder: Path) -> None:
        state = self._state()
        saved = FileSystemReader(folder).read_metadata().state_dict_metadata
        same = [getattr(saved.get(f"{OWN}.{name}"), "size", None) == t.shape for name, t in state[OWN].items()]
        if not all(same):  # of another number of replicas, or of none: the mean, which is in the state, will do
            del state[OWN]
        load(state, checkpoint_id=folder)
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        if state.get(OWN):
            self.optimizer.load_own_errors(state[OWN])

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.module, self.optimizer)
        own = self.optimizer.own_errors() if isinstance(self.optimizer, LDAdamW) else {}
        return {"model": model, "optimizer": optimizer, OWN: own}


OWN = "own_errors"
"""In a checkpoint, with gradient_sync=lowrank: the replicas' own errors; the state of the optimizer has their mean."""


def fsdp_mesh(options: ModelOptions, world: World) -> DeviceMesh:
    """All ranks, or the replicas and the shards of each."""
    expect(
        world.size % options.replicas == 0,
        f"replicas={options.replicas} do not share {world.size} ranks evenly: choose a divisor",
    )
    device, shards = world.device.type, world.size // options.replicas
    if options.replicas == 1:
        return init_device_mesh(device, (shards,), mesh_dim_names=("fsdp",))
    return init_device_mesh(device, (options.replicas, shards), mesh_dim_names=("replicate", "shard"))


def uses_bf16(options: ModelOptions, world: World) -> bool:
    return options.precision == "bf16" or (options.precision == "auto" and world.device.type == "cuda")


def resolve_parallel(options: ModelOptions, world: World) -> str:
    if options.parallel == "auto":
        return "fsdp" if world.is_distributed else "none"
    if options.parallel == "none":
        expect(world.size == 1, f"parallel=none is one process, found {world.size}: use fsdp or ddp")
    else:
        expect(
            world.is_distributed,
            f"parallel={options.parallel} needs a process group: start with torchrun --standalone --nproc-per-node N",
        )
    return options.parallel
