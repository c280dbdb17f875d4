"""Small models and their data, the same on every process."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def tiny_llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A real Llama of two layers. k_proj and v_proj have 6 rows: 2, 2, 2, 0 on four ranks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=42,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=50,
        max_position_embeddings=32,
        attn_implementation="sdpa",
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):  # computes in float32 whatever the dtype, which float64 tests would see
                setattr(module, name, nn.RMSNorm(24, eps=config.rms_norm_eps))
    return model.to(dtype)


def llama_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss of (batch, length) tokens, in the model's dtype."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def llama_tokens(step: int) -> Tensor:
    """Batch of step `step`: (12, 8) tokens, for 1, 2, 3 or 4 equal parts."""
    return torch.randint(50, (12, 8), generator=torch.Generator().manual_seed(step))


class OddNet(nn.Module):
    """Linear layers whose rows do not divide: 5 rows (2, 2, 1, 0 on four ranks) and 3 rows (one rank holds nothing).

    `unused` never gets a gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(7, 5)  # 5 rows on 4 ranks
        self.square = nn.Linear(5, 5, bias=False)
        self.tall = nn.Linear(5, 9, bias=False)  # projects its columns
        self.short = nn.Linear(9, 3, bias=False)  # 3 rows on 4 ranks
        self.unused = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 7) to (batch, 3)."""
        return self.short(torch.tanh(self.tall(torch.tanh(self.square(torch.tanh(self.wide(x)))))))


class Block(nn.Module):
    """An MLP block; 6 inner features on two ranks are 3 and 3, and cut again over two ranks 2 and 1 of each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(10, eps=1e-6)
        self.up = nn.Linear(10, 6, bias=False)
        self.down = nn.Linear(6, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., 10) to (..., 10)."""
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class BlockNet(nn.Module):
    """A language model of MLP blocks, for tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(10, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) to (batch, length, 20)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def block_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A `BlockNet` with fixed weights."""
    torch.manual_seed(0)
    return BlockNet().to(dtype)


def block_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss of (batch, length) tokens."""
    return nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def block_tokens(step: int) -> Tensor:
    """Batch of step `step`: (8, 8) tokens, for 1, 2 or 4 equal parts."""
    return torch.randint(20, (8, 8), generator=torch.Generator().manual_seed(step))


def odd_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """An `OddNet` with fixed weights."""
    torch.manual_seed(0)
    return OddNet().to(dtype)


def odd_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Mean squared output against a fixed function of the input."""
    return (model(x) - torch.sin(x[:, :3] * 3)).square().mean()


def odd_inputs(step: int) -> Tensor:
    """Batch of step `step`: (24, 7) inputs, for 1, 2, 3 or 4 equal parts."""
    return torch.randn(24, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


class Experts(nn.Module):
    """Three 5 × 6 matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) to (batch, 3, 5)."""
        return torch.einsum("eij,bj->bei", self.weight, x)


class ExpertNet(nn.Module):
    """A stack of experts, a convolution, and a matrix whose rows are longer than the run of a rank of four."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(7, 6)
        self.experts = Experts()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        self.long = nn.Linear(20, 3, bias=False)  # 60 elements: runs of 15

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 7) to (batch, 3)."""
        hidden = torch.tanh(self.experts(torch.tanh(self.into(x))))
        return self.long(torch.tanh(self.conv(hidden)).flatten(1))


def expert_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """An `ExpertNet` with fixed weights."""
    torch.manual_seed(0)
    return ExpertNet().to(dtype)
