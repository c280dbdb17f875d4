"""Small models of every kind that build_param_groups must read, on CPU and as transformers makes them."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def mixtral():
    """Experts (6, 96, 32) and (6, 32, 48)."""
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=6))


def qwen3_moe():
    """Experts (6, 48, 32) and (6, 32, 24)."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2)
    )


def gpt_oss():
    """Experts transposed, (6, 32, 96) and (6, 48, 32), with biases (6, 96) and (6, 32)."""
    return GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=6))


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


class GroupedExperts(nn.Module):
    """As in torchtitan and torchtune."""

    def __init__(self, number=3, dim=16, hidden=24):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(number, hidden, dim))
        self.w2 = nn.Parameter(torch.randn(number, dim, hidden))


class ConvNet(nn.Module):
    """Every convolution that is seen differently, and a three-dimensional weight of another kind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5)
        self.sequence = nn.Conv1d(8, 16, 3)
        self.up = nn.ConvTranspose2d(8, 6, 3)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)  # (8, 1, 3) is no larger than rank 4 in both
        self.bilinear = nn.Bilinear(8, 9, 10)
        self.proj = nn.Linear(16, 16)
