"""Replicas: processes that hold the same weights.

With gradient_sync="lowrank" nobody has averaged their gradients. The step averages contractions of matrices (`step`).
Here is the rest: the gradients of parameters that AdamW steps, and whether replicas still have the same weights and,
where somebody has averaged them, the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.entries import MISSING, Entry
from ldadam_dist.layout import Axis
from ldadam_dist.runtime import all_reduce, finish, is_group, maxima, ranks_of

SMALL = 2**20
"""Gradients of at most so many elements are copied into one vector, to be averaged by one call."""


@dataclass
class Replicas:
    """Processes that hold the same weights.

    Attributes:
        group: their process group. None: each process is by itself, but for DTensors whose mesh replicates them.
        averaged: whether their gradients are averaged before a step.
        hooked: whether DDP averages gradients of parameters that AdamW steps all the same (`integrations.ddp`).
    """

    group: Any | None = None
    averaged: bool = True
    hooked: bool = False

    @classmethod
    def chosen(cls, gradient_sync: str, process_group: Any | None, replicate_mesh: Any | None) -> Replicas:
        """From the arguments of `LDAdamW`.

        Raises:
            ValueError: an unknown gradient_sync, or groups that do not go with it.
        """
        if gradient_sync not in ("full", "lowrank"):
            raise ValueError(f"gradient_sync={gradient_sync!r}: expected 'full' or 'lowrank'.")
        if process_group is not None and not is_group(process_group):
            raise ValueError(
                f"process_group={process_group!r}: expected a process group that this process is in, such as "
                f"torch.distributed.group.WORLD, model.process_group of DDP, or mesh['replicate'].get_group(); "
                f"torch.distributed.new_group gives a number to processes that are not in it."
            )
        if replicate_mesh is not None:
            if not hasattr(replicate_mesh, "get_group"):
                raise ValueError(
                    f"replicate_mesh={replicate_mesh!r}: expected a DeviceMesh of one dimension, such as "
                    f"mesh['replicate']. A process group is given as process_group=."
                )
            if gradient_sync == "full" or process_group is not None:
                raise ValueError(
                    "replicate_mesh= names the replicas whose gradients are averaged as factors: expected it with "
                    "gradient_sync='lowrank', and without process_group=, which names the same."
                )
            if replicate_mesh.ndim != 1:
                raise ValueError(
                    f"replicate_mesh= has dimensions {tuple(replicate_mesh.shape)}: expected one, such as "
                    f"mesh['replicate']."
                )
            process_group = replicate_mesh.get_group()
        if gradient_sync == "lowrank" and process_group is None:
            raise ValueError(
                "gradient_sync='lowrank' averages over replicas, and none are named: expected process_group= (DDP, "
                "plain modules) or replicate_mesh= (HSDP, the mesh dimension over which fully_shard does not shard)."
            )
        return cls(process_group, gradient_sync == "full")

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return {"gradient_sync": "full" if self.averaged else "lowrank", "keep_matrices_local": self.hooked}

    def check(self, name: str, group: Mapping[str, Any]) -> None:
        """Raise ValueError for settings of a parameter's group that need the mean gradient whole."""
        for key, value, instead in (("proj_method", "svd", "power_iteration"), ("communication", "gather", "auto")):
            if not self.averaged and group["enable_lowrank"] and group[key] == value:
                raise ValueError(
                    f"parameter {name} has {key}={value!r}, which brings whole gradients together at every step: with "
                    f"gradient_sync='lowrank' expected {instead!r}, or use gradient_sync='full'."
                )

    @contextmanager
    def averaging(self, entries: Sequence[Entry]) -> Iterator[None]:
        """Around what else a step does: average the gradients of these parameters meanwhile.

        Args:
            entries: parameters that are stepped element by element; on replicas with gradients of their own, their
                `local_grad` is the mean afterwards.
        """
        under_way = []
        waiting = [e for e in entries if e.adapter.sync is not None and e.status != MISSING]
        if self.hooked:
            # What DDP has averaged has the same bits everywhere, and is its own mean. Nothing else tells it: a backward
            # under no_sync, which may be one of some replicas only, or clipping may have changed it since.
            waiting = [entry for _, _, differ in _differing(waiting, lambda e: e.grad, _own) for entry in differ]
        for axis, parts in _coalesced(waiting):
            vector = parts[0].grad.contiguous() if len(parts) == 1 else torch.cat([e.grad.reshape(-1) for e in parts])
            reducing = all_reduce(vector.div_(axis.count), axis.group)
            next(reducing)
            under_way.append((parts, vector, reducing))
        yield
        for parts, vector, reducing in under_way:
            finish(reducing)
            pieces = vector.view(-1).split([e.grad.numel() for e in parts])
            for entry, piece in zip(parts, pieces, strict=True):
                entry.local_grad = piece.view(entry.grad.shape)


def check_equal(entries: Sequence[Entry]) -> None:
    """Raise RuntimeError if replicas do not have the same weights, bit by bit, or averaged gradients; collective.

    Args:
        entries: parameters, with their gradients.
    """

    def weight(entry: Entry) -> Tensor:
        return entry.adapter.local(entry.param)

    for axis, members, differ in (*_differing(entries, weight, _own), *_differing(entries, weight, _averaged)):
        if differ:
            raise RuntimeError(
                f"replicas on ranks {ranks_of(axis.group)} differ in {len(differ)} of {len(members)} weights, first in "
                f"{differ[0].name}: expected the same bits. They must start with the same weights "
                f"(DistributedDataParallel and torch.distributed.broadcast see to it), and nothing but the optimizer "
                f"may change them."
            )
    for axis, members, candidates in _differing(entries, lambda entry: entry.grad, _averaged):
        present = _present(candidates, axis)
        differ = [entry for entry in present if _spread(entry.grad, axis) > TOLERANCE * _epsilon(entry)]
        if differ:
            raise RuntimeError(
                f"replicas on ranks {ranks_of(axis.group)} differ in {len(differ)} of {len(members)} gradients, first "
                f"in that of {differ[0].name}: expected averaged gradients, as process_group= says. Wrap the model in "
                f"DistributedDataParallel, end no_sync() before the last backward of a step, or average gradients "
                f"yourself; with gradient_sync='lowrank' LDAdamW averages. To train replicas apart (LocalSGD), leave "
                f"process_group= out."
            )


TOLERANCE = 16
"""Rounding errors, of the largest element, by which averaged gradients may differ, as when ranks of different hardware
have clipped them."""


def _own(entry: Entry) -> Axis | None:
    return entry.adapter.sync


def _averaged(entry: Entry) -> Axis | None:
    return entry.adapter.alike


def _present(entries: Sequence[Entry], axis: Axis) -> list[Entry]:
    """Those that have a gradient on all replicas; a missing one counts as zeros, no mistake. Collective."""
    if not entries:
        return []
    missing = torch.tensor([entry.local_grad is None for entry in entries], dtype=torch.int32)
    anywhere = maxima(missing.to(entries[0].adapter.device), axis.group).tolist()
    return [entry for entry, lacks in zip(entries, anywhere, strict=True) if not lacks]


def _epsilon(entry: Entry) -> float:
    return torch.finfo(entry.grad.dtype).eps


def _spread(grad: Tensor, axis: Axis) -> float:
    """How far an element is apart on two replicas, at most, in parts of the largest; collective."""
    largest, negated_smallest = maxima(torch.stack([grad, -grad]), axis.group).unbind()
    return float((largest + negated_smallest).max() / torch.maximum(largest, negated_smallest).max())


def _differing(
    entries: Iterable[Entry], tensor_of: Callable[[Entry], Tensor], axis_of: Callable[[Entry], Axis | None]
) -> Iterator[tuple[Axis, list[Entry], list[Entry]]]:
    """For each axis of replicas its entries, and those of which its replicas do not have the same bits; collective."""
    shared: dict[Axis, list[Entry]] = {}
    for entry in entries:
        axis = axis_of(entry)
        if axis is not None:
            shared.setdefault(axis, []).append(entry)
    for axis, members in shared.items():
        prints = torch.stack([_fingerprint(tensor_of(entry)) for entry in members])
        largest, negated_smallest = maxima(torch.cat([prints, -prints]), axis.group).chunk(2)
        differ = (largest != -negated_smallest).tolist()
        yield axis, members, [entry for entry, differs in zip(members, differ, strict=True) if differs]


def _fingerprint(tensor: Tensor) -> Tensor:
    """(), int64: another one, all but surely, if any bit changes or elements change places.

    A sum of the words, each mixed with its place as SplitMix64 does (Steele, Lea, Flood 2014). Of the words as they are
    it would miss whole families of changes: half of all multiples of a power of two, as of twice the weights.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for number, piece in enumerate(data.split(8 * WORDS)):
        words = torch.nn.functional.pad(piece, (0, -len(piece) % 8)).view(torch.int64)
        mixed = torch.arange(len(words), device=data.device).add_(number * WORDS + 1).mul_(_GOLDEN).add_(words)
        for shift, factor in _MIXING:
            mixed.bitwise_xor_((mixed >> shift) & (2 ** (64 - shift) - 1)).mul_(factor)  # all wraps around
        total += mixed.sum()
    return total // 2  # so that its negative is a number too


WORDS = 2**20
"""Words of eight bytes that are mixed at once, which bounds the memory it takes."""
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


def _coalesced(entries: Iterable[Entry]) -> Iterator[tuple[Axis, list[Entry]]]:
    """What is averaged by one call: large gradients by themselves, where they are."""
    small: dict[Any, list[Entry]] = {}
    for entry in entries:
        axis, grad = entry.adapter.sync, entry.grad
        assert axis is not None
        if grad.numel() > SMALL:
            yield axis, [entry]
        else:
            small.setdefault((axis, grad.dtype, grad.device), []).append(entry)
    for (axis, *_), members in small.items():
        yield axis, members
