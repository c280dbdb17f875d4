"""Small models of every kind that build_param_groups must read, on CPU and as transformers makes them."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)


def llama(**changes):
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16))


def bert():
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=9
    )
    return BertForSequenceClassification(config)


class LoraLinear(nn.Module):
    """As PEFT builds it: a frozen layer beside two trainable factors, which are nn.Linear themselves."""

    def __init__(self, size):
        super().__init__()
        self.base_layer = nn.Linear(size, size).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(size, 8, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(8, size, bias=False)})
        self.lora_magnitude_vector = nn.ParameterDict({"default": nn.Parameter(torch.ones(size))})


class Custom(nn.Module):
    """A matrix that no rule knows, and tensors that are no matrices."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(16, 16))
        self.experts = nn.Parameter(torch.randn(3, 16, 16))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.conv = nn.Conv2d(8, 8, 3)
        self.attention = nn.MultiheadAttention(16, 2)
        self.recurrent = nn.LSTM(16, 16)
        self.proj = nn.Linear(16, 16)
