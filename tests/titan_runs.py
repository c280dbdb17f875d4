"""torchtitan's Trainer on a CPU: a tiny Llama of its own on gloo ranks; import it where torchtitan is installed.

torchtitan 0.3 is for GPUs, and for a torch newer than 2.13. What is replaced of both stands here, before torchtitan is
imported: which device there is, and a function to change timeouts. Attention is torch's, as torchtitan's
own is compiled or for CUDA alone. All else is torchtitan's: model, sharding, Trainer, schedule, clipping, checkpoints.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.tools.utils as titan_utils
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

HAS_SET_TIMEOUT = hasattr(dist, "set_timeout")
if not HAS_SET_TIMEOUT:
    dist.set_timeout = lambda timeout, group=None: None

titan_utils.device_type = "cpu"
titan_utils.get_local_device = lambda: torch.device("cpu")
titan_utils.device_module = types.SimpleNamespace(
    set_device=lambda device: None,
    current_device=lambda: 0,
    synchronize=lambda: None,
    empty_cache=lambda: None,
    reset_peak_memory_stats=lambda: None,
    memory_stats=lambda device: {},
    get_device_name=lambda device: "cpu",
    get_device_properties=lambda device: types.SimpleNamespace(total_memory=2**30),
)

from torchtitan.components.checkpointer import CheckpointManager  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3 import model_registry  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from ldadam_dist.integrations.torchtitan import LDAdamWContainer, LDAdamWMetrics  # noqa: E402

VOCABULARY, LENGTH, BATCH, STEPS, SAVE_EVERY, WARMUP = 2048, 16, 8, 6, 3, 2
SETTINGS: dict[str, Any] = {"rank": 16, "lr": 1e-3, "lr_other": 3e-3, "weight_decay": 0.1, "eps": 1e-4}
"""With the usual eps Adam magnifies the rounding of gradients that are almost zero to a hundredth of lr."""


def sentences(step: int) -> Tensor:
    """The whole batch of a step, and a token more of each sentence."""
    return torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


class Sentences(BaseDataLoader):
    """Every rank's part of `sentences`."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **ignored: Any):
        self._step, self._rank, self._size, self._rows = 0, dp_rank, dp_world_size, local_batch_size

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            mine = sentences(self._step)[self._rank :: self._size]
            self._step += 1
            for part in mine.split(self._rows):  # of a pipeline, its microbatches
                yield {"input": part[:, :-1].contiguous()}, part[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["step"]


class NoTokenizer(BaseTokenizer):
    """The data are tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **ignored: Any) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return []

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return VOCABULARY


class Recorder:
    """What torchtitan's metrics give to its loggers, by step."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged[step] = metrics

    def close(self) -> None:
        pass


def small_llama() -> Any:
    """torchtitan's description of a Llama of two layers."""
    spec = model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:2]
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return spec


def config_of(folder: str, ranks_of_data: int, parallelism: dict[str, Any], **optimizer: Any) -> Trainer.Config:
    """Configuration of a run; learning rates warm up and decay, gradients are clipped."""
    return Trainer.Config(
        model_spec=small_llama(),
        dump_folder=folder,
        tokenizer=NoTokenizer.Config(),
        dataloader=Sentences.Config(),
        loss=CrossEntropyLoss.Config(global_vocab_size=VOCABULARY),
        optimizer=LDAdamWContainer.Config(**{**SETTINGS, "metrics_every": 1, **optimizer}),
        metrics=LDAdamWMetrics.Config(log_freq=1),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=WARMUP),
        training=TrainingConfig(
            local_batch_size=BATCH // ranks_of_data,
            seq_len=LENGTH,
            steps=STEPS,
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(**parallelism),
        debug=DebugConfig(seed=0),
        checkpoint=CheckpointManager.Config(enable=True, interval=SAVE_EVERY, last_save_model_only=False),
        activation_checkpoint=None,
    )


def built(config: Trainer.Config) -> Trainer:
    """The Trainer; gloo cannot scale while it sums, as FSDP2 wants of it for torchtitan."""
    trainer = config.build()
    for part in trainer.model_parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    trainer.metrics_processor.logger = Recorder()
    return trainer


def whole_weights(parts: list[nn.Module]) -> dict[str, Tensor]:
    """Weights by name, whole on every rank; collective."""
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for part in parts
        for name, param in part.named_parameters()
    }


__all__ = ["LRSchedulersContainer", "OptimizersContainer", "Trainer", "built", "config_of", "sentences", "small_llama"]
