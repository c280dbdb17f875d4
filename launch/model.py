"""The Llama of a JSON in configs/models/, spread over the ranks."""

from __future__ import annotations

import contextlib
import functools
import json

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from launch.config import Config, ConfigError, ModelOptions, expect
from launch.distributed import World
from launch.tokenizer import TextEncoder


def llama_config(options: ModelOptions, encoder: TextEncoder, seq_len: int) -> LlamaConfig:
    """Shapes from the JSON, vocabulary from the tokenizer; a key that transformers does not know is an error."""
    path = options.model_path
    try:
        shapes = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"model={options.model!r}: {path} is not JSON: {error}") from error
    unknown = sorted(set(shapes) - set(LlamaConfig().to_dict()))
    expect(not unknown, f"model={options.model!r}: {path} has keys that are not of LlamaConfig: {', '.join(unknown)}")
    shapes |= {"vocab_size": encoder.vocab_size, "bos_token_id": None, "eos_token_id": encoder.eos_id}
    config = LlamaConfig(**shapes, use_cache=False)
    expect(
        seq_len <= config.max_position_embeddings,
        f"seq_len={seq_len}: {path} has positions up to {config.max_position_embeddings}; "
        "lower seq_len or raise max_position_embeddings there",
    )
    return config


class LanguageModel:
    """A model and how this run computes with it."""

    def __init__(self, config: Config, encoder: TextEncoder, world: World) -> None:
        self.parallel = resolve_parallel(config.model, world)
        precision = config.model.precision
        self.bf16 = precision == "bf16" or (precision == "auto" and world.device.type == "cuda")
        self.device = world.device
        # Built whole with one seed on every rank, then sharded: the weights do not depend on the number of ranks.
        torch.manual_seed(config.run.seed)
        model = LlamaForCausalLM(llama_config(config.model, encoder, config.data.seq_len))
        self.parameter_count = sum(parameter.numel() for parameter in model.parameters())
        if config.model.activation_checkpointing:
            for layer in model.model.layers:
                # Inside the hooks of fully_shard, so that recomputing a layer does not gather its weights twice.
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        self.module: nn.Module = self._spread(model, world)
        self.module.train()

    def _spread(self, model: LlamaForCausalLM, world: World) -> nn.Module:
        if self.parallel == "fsdp":
            mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("fsdp",))
            dtype = torch.bfloat16 if self.bf16 else torch.float32
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            return fully_shard(model, mesh=mesh, mp_policy=policy)
        model.to(self.device)
        if self.parallel == "ddp":
            return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)
        return model

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of each token given those before it; tokens (sequences, seq_len)."""
        autocast = self.bf16 and self.parallel != "fsdp"  # under FSDP2 the mixed-precision policy does it
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            return self.module(input_ids=tokens, labels=tokens).loss

    def accumulate(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of one micro-batch: ranks exchange gradients with the last one only."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(is_last)
        elif isinstance(self.module, DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return contextlib.nullcontext()


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
