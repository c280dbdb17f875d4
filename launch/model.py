"""The Llama of a JSON in configs/models/."""

from __future__ import annotations

import functools
import json

import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from launch.config import Config, ConfigError, ModelOptions, expect
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


def build_model(config: Config, encoder: TextEncoder) -> LlamaForCausalLM:
    """The whole model, with one seed on every rank: its weights do not depend on how it is spread afterwards."""
    torch.manual_seed(config.run.seed)
    model = LlamaForCausalLM(llama_config(config.model, encoder, config.data.seq_len))
    if config.model.activation_checkpointing:
        for layer in model.model.layers:
            # Inside the hooks of fully_shard and ZeRO-3, so that recomputing a layer does not gather its weights twice.
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return model
