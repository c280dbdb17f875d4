"""Bytes of optimizer state on each rank of a real DeepSpeed engine: LDAdamW and AdamW at every ZeRO stage.

    torchrun --nproc-per-node 2 benchmarks/zero_memory.py --model llama_60m --rank 128

Prints Markdown. Each engine takes one step on random tokens in bfloat16 with float32 master weights, and its states
are counted as they lie in memory. The fullest rank is shown.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"


def build(name: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**json.loads((MODELS / f"{name}.json").read_text()), use_cache=False))


def state_bytes(model_name: str, stage: int, optimizer: dict[str, Any]) -> int:
    """Bytes of state on the fullest rank after a step, without step counts."""
    import deepspeed

    model = build(model_name)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": optimizer,
        "steps_per_print": 10**9,
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    tokens = torch.randint(1000, (1, 16), device=engine.device)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()

    def tensors(state: Any) -> list[torch.Tensor]:
        if isinstance(state, dict):
            return [tensor for value in state.values() for tensor in tensors(value)]
        return [state] if isinstance(state, torch.Tensor) and state.ndim else []

    held = sum(t.numel() * t.element_size() for t in tensors(dict(engine.basic_optimizer.state)))
    fullest = torch.tensor(held, device=engine.device)
    dist.all_reduce(fullest, op=dist.ReduceOp.MAX)
    engine.destroy()
    del engine, model
    gc.collect()
    return int(fullest)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llama_60m", help="a name in configs/models/")
    parser.add_argument("--rank", type=int, default=128, help="rank of the projection")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that takes minutes to compile
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    from deepspeed.utils import logger

    import ldadam_dist.integrations.deepspeed  # noqa: F401  LDAdamW by name

    logger.setLevel(logging.ERROR)
    projected = {"rank": args.rank}
    optimizers = {
        "AdamW": {"type": "AdamW", "params": {"torch_adam": True}},
        f"LDAdamW, rank {args.rank}, error in float32": {"type": "LDAdamW", "params": projected},
        f"LDAdamW, rank {args.rank}, error in bfloat16": {
            "type": "LDAdamW",
            "params": {**projected, "error_dtype": "bfloat16"},
        },
    }
    rows = {
        name: [state_bytes(args.model, stage, chosen) for stage in (1, 2, 3)] for name, chosen in optimizers.items()
    }
    if dist.get_rank() == 0:
        print(f"MiB of state on the fullest of {dist.get_world_size()} ranks, {args.model}\n")
        print("| optimizer | ZeRO-1 | ZeRO-2 | ZeRO-3 | of AdamW |\n|---|---|---|---|---|")
        for name, sizes in rows.items():
            share = max(size / whole for size, whole in zip(sizes, rows["AdamW"], strict=True))
            print(f"| {name} | {' | '.join(f'{size / 2**20:.1f}' for size in sizes)} | {share:.2f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
