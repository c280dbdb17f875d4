"""What is relied on of DeepSpeed's ZeRO: where its flat partitions have each parameter, and which settings fit.

Nothing of this is DeepSpeed's public interface, so it is all here, and `verify` compares it with the engine's weights,
element by element.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldadam_dist.adapters.flat import FlatRange
from ldadam_dist.entries import Entry
from ldadam_dist.gradients import largest_gradient
from ldadam_dist.integrations.zero_access import answer_for_states, is_where_the_engine_writes, was_set
from ldadam_dist.partitions import FlatParam, FlatPartition
from ldadam_dist.runtime import agree

KNOWN_VERSIONS = ("0.19.8",)
"""Versions of DeepSpeed that the tests ran with; others are checked like these."""


def _unsupported(engine: Any) -> Iterable[tuple[bool, str, str]]:
    """(whether it is so, what was found, what to do)"""
    config = engine._config
    zero, offload, param = config.zero_config, config.zero_config.offload_optimizer, config.zero_config.offload_param
    stage = int(zero.stage)
    device = str(getattr(offload, "device", "none")).rsplit(".", 1)[-1]
    yield stage == 0, "ZeRO is off (stage 0)", "set zero_optimization.stage to 1, 2 or 3, or train with DDP"
    yield engine.pipeline_parallelism, "the model is a PipelineModule", "use ZeRO without pipeline stages"
    yield engine.has_moe_layers, "the model has DeepSpeed MoE layers", "train it without deepspeed.moe"
    yield (
        engine.autotp_size() > 1 or (engine.mpu is not None and engine.mpu.get_model_parallel_world_size() > 1),
        "the model is split by tensor parallelism, so that no rank knows a whole matrix",
        "use ZeRO alone, or FSDP2 with tensor parallelism",
    )
    yield (
        bool(zero.elastic_checkpoint),
        "zero_optimization.elastic_checkpoint is on, which knows Adam's states only",
        "switch it off",
    )
    yield (
        "nvme" in (device, str(getattr(param, "device", "none")).rsplit(".", 1)[-1]),
        "optimizer or parameters are offloaded to NVMe",
        'offload to "cpu"',
    )
    yield (
        offload is not None and getattr(offload, "ratio", 1.0) < 1.0,
        f"offload_optimizer.ratio={getattr(offload, 'ratio', 1.0)}: a second optimizer steps the rest",
        "set it to 1.0",
    )
    yield bool(getattr(offload, "super_offload", False)), "offload_optimizer.super_offload is on", "switch it off"
    yield getattr(zero, "zenflow", None) is not None, "zero_optimization.zenflow is on", "remove it"
    yield (
        engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16,
        "torch_autocast with float16, whose overflow each rank decides by itself",
        "use bfloat16, or DeepSpeed's own fp16",
    )
    yield engine.is_deepcompile_enabled(), "compile.deepcompile is on", "switch it off"
    yield (
        not getattr(zero, "compute_grad_norm", True) and not engine.fp16_enabled(),
        "zero_optimization.compute_grad_norm is off, so that nobody knows of a gradient that is not finite before the "
        "first group is stepped",
        "switch it on",
    )


def refuse_unsupported(engine: Any) -> None:
    """Raise ValueError for a setting under which LDAdamW would not do what it says."""
    for found, what, remedy in _unsupported(engine):
        if found:
            raise ValueError(f"LDAdamW does not support this DeepSpeed configuration: {what}. To go on, {remedy}.")


@dataclass(frozen=True)
class _Weights:
    """A parameter of the engine, to compare with."""

    name: str
    elements: FlatRange
    partition: Tensor
    param: Any

    def agree(self) -> bool:
        """Whether the master weights are this process's weights."""
        start, length = self.elements.starts[self.elements.index], self.elements.length
        master = self.partition.detach()[self.elements.offset :][:length]
        if was_set(self.param):  # by safe_set_full_fp32_param, and the engine's weights follow at the step
            return is_where_the_engine_writes(self.param, start, master)
        if hasattr(self.param, "ds_tensor"):  # ZeRO-3: just the elements of this process, and padding
            own = self.param.ds_tensor.data.reshape(-1)[:length]
        else:
            own = self.param.data.reshape(-1)[start : start + length]
        return torch.equal(master.to(device=own.device, dtype=own.dtype), own)


class ZeroLayout:
    """Where the parameters are in the flat partitions of one of the engine's optimizers."""

    def __init__(self, zero: Any) -> None:
        self.partitions: list[FlatPartition] = []
        self._zero, self._weights, self._verified = zero, list[_Weights](), False

    @classmethod
    def of_stage_1_and_2(cls, zero: Any, names: Mapping[Any, str], device: torch.device) -> ZeroLayout:
        """The parameters of a group with padding between them, cut into one partition for each rank."""
        tensors, groups = zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups
        return cls._of_flat_groups(zero, names, device, tensors, groups, zero.round_robin_bit16_offsets)

    @classmethod
    def of_bf16_optimizer(cls, zero: Any, names: Mapping[Any, str], device: torch.device) -> ZeroLayout:
        """The same for bfloat16 with gradients accumulated in float32, with no padding but at the end."""
        return cls._of_flat_groups(zero, names, device, zero.fp32_groups_flat_partition, zero.bf16_groups, None)

    @classmethod
    def _of_flat_groups(
        cls,
        zero: Any,
        names: Mapping[Any, str],
        device: torch.device,
        tensors: Sequence[Tensor],
        groups: Sequence[Sequence[Any]],
        offsets: Sequence[Sequence[int]] | None,
    ) -> ZeroLayout:
        layout = cls(zero)
        for i, (tensor, params) in enumerate(zip(tensors, groups, strict=True)):
            group, size = zero.real_dp_process_group[i], tensor.numel()
            count, me = dist.get_world_size(group), dist.get_rank(group)
            ends = list(itertools.accumulate(param.numel() for param in params))
            begins = offsets[i] if offsets is not None else [0, *ends[:-1]]
            members = []
            for param, offset in zip(params, begins, strict=True):
                elements = FlatRange.in_partitions(param.numel(), offset, size, count, me)
                members.append(FlatParam(names[param], tuple(param.shape), elements))
                layout._weights.append(_Weights(names[param], elements, tensor, param))
            layout.partitions.append(FlatPartition(tensor, i, tuple(members), group, device))
        return layout

    @classmethod
    def of_stage_3(cls, zero: Any, names: Mapping[Any, str], device: torch.device) -> ZeroLayout:
        """Each parameter is cut into as many equal runs as there are ranks; a sub-group has one run of each."""
        layout = cls(zero)
        for i, (tensor, params) in enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)):
            group = getattr(params[0], "ds_process_group", zero.dp_process_group)
            count, me = dist.get_world_size(group), dist.get_rank(group)
            members = []
            for param in params:
                sub_group, offset, length = zero.grad_position[zero.get_param_id(param)]
                if sub_group != i or length != param.partition_numel():
                    raise unknown_layout(f"parameter {names[param]} lies in sub-group {sub_group} and in {i}")
                elements = FlatRange.in_runs(param.ds_numel, length, count, me, offset)
                members.append(FlatParam(names[param], tuple(param.ds_shape), elements))
                layout._weights.append(_Weights(names[param], elements, tensor, param))
            group_index = zero.sub_group_to_group_id[i]
            layout.partitions.append(FlatPartition(tensor, group_index, tuple(members), group, device))
        return layout

    def slice_mappings(self, address: Callable[..., Any]) -> list[dict[str, Any]]:
        """Where this process has its elements of each parameter, for each flat tensor.

        Args:
            address: makes a note of (numel, start), as DeepSpeed does.
        """
        return [
            {
                param.name: address(start=param.elements.offset, numel=param.elements.length)
                for param in partition.params
                if param.elements.length
            }
            for partition in self.partitions
        ]

    def answer_for_states(self, entries: Callable[[], Iterable[Entry]]) -> None:
        """Have DeepSpeed's functions ask LDAdamW for its states; see `zero_access`."""
        answer_for_states(self._zero, {weights.param: weights.name for weights in self._weights}, entries)

    def verify(self) -> None:
        """Compare the master weights with the engine's weights, element by element where they are said to be.

        Raises:
            RuntimeError: they differ on some rank; raised on all that share a group.
        """
        self._verified = True
        wrong = [weights.name for weights in self._weights if not weights.agree()]
        found = torch.tensor([len(wrong)], dtype=torch.int32)
        for group, device in dict.fromkeys((p.process_group, p.device) for p in self.partitions):
            found = agree(found, group, device)
        if found:
            which = f"of parameter {wrong[0]}" if wrong else "on another rank"
            raise RuntimeError(
                f"the master weights {which} are not the engine's weights. Either weights were changed after "
                f"deepspeed.initialize: load them before it, call engine.optimizer.refresh_fp32_params(), or set "
                f"master weights with deepspeed.utils.safe_set_full_fp32_param. Or DeepSpeed {version('deepspeed')} "
                f"lays out parameters otherwise than the versions known to work ({', '.join(KNOWN_VERSIONS)})."
            )
        self._weights.clear()

    def overflowed(self) -> bool:
        """Whether a gradient of this step cannot be used, on any rank; asked at the beginning of every step.

        The engine steps group by group, so it must be known before the first. It skips a step with gradients that are
        not finite itself, but for ZeRO-1 and 2 with bfloat16 where bf16.check_grad_overflow is off.
        """
        if not self._verified:
            self.verify()
        norm = self._zero._global_grad_norm
        if norm is None:
            return False
        largest, clip = float(norm), self._zero.clip_grad  # no element is larger than the norm
        if not 0.0 <= largest < math.inf:
            return True
        return (min(largest, clip) if clip > 0 else largest) >= largest_gradient(self.partitions[0].tensor.dtype)


def unknown_layout(what: str) -> RuntimeError:
    """The error for an engine that is not as the known versions of DeepSpeed make it."""
    return RuntimeError(
        f"DeepSpeed {version('deepspeed')} does not lay out the parameters as expected: {what}. Known to work: "
        f"{', '.join(KNOWN_VERSIONS)}."
    )
