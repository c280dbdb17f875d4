"""What a run takes of each rank: memory of LDAdamW and of other optimizers, and bytes on the wire, from metadata alone.

LDAdamW's numbers are those that the optimizer itself tells (`placement`) of the model as torch shards it; the other
optimizers' follow from the elements on the rank.

    AdamW        two moments in the weights' dtype, as torch.optim.AdamW has them
    8-bit Adam   two moments of one byte, with a float32 scale for every 256 elements; embeddings, and tensors of less
                 than 4096 elements, in float32, as bitsandbytes has them
    Muon         one momentum in the weights' dtype for the matrices that could be projected, AdamW for the rest

Under ZeRO weights are whole (stages 1 and 2) or partitioned (3), gradients whole (1), those of all parameters of which
a rank has elements (2) or partitioned (3); each rank has a partition of float32 master weights, and moments are float32
as these are. Partitions have ZeRO's padding; AdamW has one flat tensor, 8-bit Adam and Muon one for each kind of
parameter, and LDAdamW one for each of its groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ldadam_dist.cli.layouts import Layout, local_numel, spread, world_of
from ldadam_dist.cli.zero import elements_in_partition, partition_elements, partitions_of, state_bytes
from ldadam_dist.optimizer import LDAdamW
from ldadam_dist.param_groups import build_param_groups
from ldadam_dist.partitions import FlatPartition
from ldadam_dist.placement import Placement
from ldadam_dist.rules import DEFAULT_RANK
from ldadam_dist.selection import decide

BLOCK_8BIT = 256
SMALLEST_8BIT = 4096

Groups = Sequence[Sequence[int]]
"""For each group of an optimizer the elements that this rank has of each parameter; under ZeRO all there are."""


@dataclass(frozen=True)
class Settings:
    """What LDAdamW is asked for.

    Attributes:
        rank: of the projection.
        groups: arguments of `build_param_groups`, but for the rank.
        options: arguments of `LDAdamW`.
    """

    rank: int = DEFAULT_RANK
    groups: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the end of backward; activations and buffers are not among them.

    Attributes:
        weights, masters: those to compute with, and ZeRO's float32 ones.
        gradients: as micro-batches are accumulated.
        states: of the optimizer, without error.
        error: LDAdamW's.
    """

    weights: int
    masters: int
    gradients: int
    states: int
    error: int = 0

    @property
    def total(self) -> int:
        """All of these."""
        return self.weights + self.masters + self.gradients + self.states + self.error

    def as_dict(self) -> dict[str, int]:
        """By name, with the total."""
        return {**asdict(self), "total": self.total}


class Run:
    """A model on a layout, within `planning`.

    Args:
        name: what the model is.
        model: on the meta device, sharded; under ZeRO whole, in float32.
        layout: its layout.
        dtype: of the weights to compute with.
        grad_dtype: of gradients as they are kept.
        everyone: the process group of all ranks.
        replicas: how `LDAdamW` is told of the replicas.

    Attributes:
        elements: of the whole model that are trained, and `frozen` those that are not.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        layout: Layout,
        dtype: torch.dtype,
        grad_dtype: torch.dtype,
        everyone: Any,
        replicas: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.model, self.layout, self.dtype, self.grad_dtype = name, model, layout, dtype, grad_dtype
        self._everyone, self._replicas = everyone, replicas or {}
        params = list(model.parameters())
        self.elements = sum(param.numel() for param in params if param.requires_grad)
        self.frozen = sum(param.numel() for param in params if not param.requires_grad)
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self._kinds: dict[str, list[int]] = {"matrices": [], "embeddings": [], "rest": []}
        self._here = 0
        stage, count = layout.zero, layout.shard
        for decision in decide(model, rank=1):
            param = decision.info.param
            if not param.requires_grad:
                self._here += -(-param.numel() // count) if stage == 3 else local_numel(param)
                continue
            kind = "embeddings" if id(param) in embeddings else "matrices" if decision.low_rank else "rest"
            self._kinds[kind].append(local_numel(param))

    def ldadamw(self, settings: Settings) -> tuple[Memory, Placement, int]:
        """Of the fullest rank: memory, what the optimizer tells of itself, and which rank that is.

        Raises:
            ValueError: settings that the optimizer refuses.
        """
        optimizer, fullest = self._optimizer(settings), 0
        if self.layout.zero:
            fullest = int(self._uneven_bytes(optimizer).argmax())
            optimizer.attach_partitions(self._partitions(optimizer, fullest))
        placed = optimizer.placement()
        error = sum(row.error_bytes for row in placed)
        states = sum(row.state_bytes for row in placed) - error
        memory = self._memory(_groups(optimizer), states, error, fullest)
        spared = self.grad_dtype.itemsize * self._without_gradients(optimizer)
        return replace(memory, gradients=memory.gradients - spared), placed, fullest

    def total(self, settings: Settings) -> int:
        """Bytes of the fullest rank with LDAdamW; sooner than by `ldadamw`."""
        if not self.layout.zero:
            return self.ldadamw(settings)[0].total
        optimizer = self._optimizer(settings)
        groups, uneven = _groups(optimizer), self._uneven_bytes(optimizer)
        even = self._memory(groups, 0)
        return even.total - even.gradients + int(uneven.max())

    def _optimizer(self, settings: Settings) -> LDAdamW:
        groups = build_param_groups(self.model, rank=settings.rank, **settings.groups)
        return LDAdamW(groups, rank=settings.rank, **settings.options, **self._replicas)

    def _partitions(self, optimizer: LDAdamW, rank: int) -> list[FlatPartition]:
        return partitions_of(optimizer, self.layout.zero, rank, self.layout.ranks, self._everyone)

    def _uneven_bytes(self, optimizer: LDAdamW) -> torch.Tensor:
        """Of each rank under ZeRO, (ranks,): what not all have alike, states and gradients."""
        states = state_bytes(optimizer, self._partitions(optimizer, 0), self.layout.ranks)
        return states + self.grad_dtype.itemsize * self._gradients(_groups(optimizer))

    def _without_gradients(self, optimizer: LDAdamW) -> int:
        """Elements here whose gradients are accumulated into the error, and take no memory of their own."""
        if not optimizer.error_in_grad:
            return 0
        matrices = {row.name for row in optimizer.placement() if row.side}
        return sum(
            local_numel(param)
            for group in optimizer.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
            if name in matrices
        )

    def others(self) -> dict[str, Memory]:
        """Memory of the optimizers that LDAdamW is compared with, on the fullest rank, by name."""
        item = 4 if self.layout.zero else self.dtype.itemsize
        kinds = list(self._kinds.values())
        everything = [[numel for kind in kinds for numel in kind]]
        matrices, embeddings, rest = (self._held([self._kinds[kind]]) for kind in ("matrices", "embeddings", "rest"))
        eight_bit = 8 * embeddings + self._eight_bit("matrices") + self._eight_bit("rest")
        return {
            "AdamW": self._memory(everything, 2 * item * self._held(everything)),
            "8-bit Adam": self._memory(kinds, eight_bit),
            "Muon": self._memory(kinds, item * (matrices + 2 * (embeddings + rest))),
        }

    def _held(self, groups: Groups) -> int:
        """Elements on a rank, with padding, of the parameters of an optimizer's groups."""
        if self.layout.zero:
            return sum(partition_elements(numels, self.layout.zero, self.layout.ranks) for numels in groups)
        return sum(map(sum, groups))

    def _gradients(self, groups: Groups) -> torch.Tensor:
        """Elements of gradients on each rank, (ranks,); without ZeRO on this one, (1,)."""
        stage, ranks = self.layout.zero, self.layout.ranks
        # Gradients wider than the weights are added up in a buffer that has just the partition.
        if stage == 2 and self.grad_dtype.itemsize <= self.dtype.itemsize:
            return sum(
                (elements_in_partition(numels, ranks) for numels in groups), torch.zeros(ranks, dtype=torch.int64)
            )
        return torch.tensor([self._held(groups) if stage > 1 else sum(map(sum, groups))]).expand(ranks if stage else 1)

    def _eight_bit(self, kind: str) -> int:
        held = [self._held([self._kinds[kind]])] if self.layout.zero else self._kinds[kind]
        return sum(2 * (numel + 4 * -(-numel // BLOCK_8BIT)) if numel >= SMALLEST_8BIT else 8 * numel for numel in held)

    def _memory(self, groups: Groups, states: int, error: int = 0, rank: int | None = None) -> Memory:
        """Memory of an optimizer with these groups on a rank, by default the one with most gradients."""
        stage, held = self.layout.zero, self._held(groups)
        weights = held * (self.layout.ranks if stage in (1, 2) else 1) + self._here
        each = self._gradients(groups)
        gradients = int(each.max() if rank is None else each[rank])
        masters = 4 * held if stage else 0
        return Memory(weights * self.dtype.itemsize, masters, gradients * self.grad_dtype.itemsize, states, error)

    def engine_bytes(self) -> int:
        """That moving weights and gradients takes of a rank and step, by the count of `Traffic`; padding is left out.

        FSDP2, ZeRO-3   gathers weights for forward and for backward, and reduces and scatters gradients
        HSDP            besides sums up the gradients of a shard over the replicas, which counts twice
        DDP             sums up gradients
        gradient_sync   "lowrank": none of these over replicas; the optimizer's bytes have what takes their place
        ZeRO-1, 2       sums up gradients, and gathers the new weights
        """
        layout, whole = self.layout, self.elements // self.layout.tp
        gathered, reduced = whole * self.dtype.itemsize, whole * self.grad_dtype.itemsize
        if layout.ranks == layout.tp:
            return 0
        own_gradients = layout.gradient_sync == "lowrank"
        if layout.sharding == "ddp":
            return 0 if own_gradients else 2 * reduced
        if layout.zero in (1, 2):
            return 2 * reduced + gathered
        over_replicas = 2 * reduced // layout.shard if layout.replicate > 1 and not own_gradients else 0
        return 2 * gathered + reduced + over_replicas

    def largest_rank(self, settings: Settings, limit: int) -> int:
        """The largest rank of the projection for which everything fits; 0 if none does.

        Args:
            settings: all others.
            limit: bytes.
        """
        decisions = decide(self.model, rank=1, **{k: v for k, v in settings.groups.items() if k != "proj_type"})
        # From its smaller dimension on a matrix gets AdamW, and so the total is a rising function only in between.
        edges = sorted({1, *(_smaller_dimension(d.info.shape, d.flatten) for d in decisions if d.low_rank)})

        def fits(rank: int) -> bool:
            return self.total(Settings(rank, settings.groups, settings.options)) <= limit

        for first, end in reversed(list(itertools.pairwise(edges))):
            if fits(first):
                return _last(fits, first, end)
        return 0


def _groups(optimizer: LDAdamW) -> Groups:
    return [[local_numel(param) for param in group["params"]] for group in optimizer.param_groups]


def _smaller_dimension(shape: Sequence[int], flatten: bool) -> int:
    return min(shape[0], math.prod(shape[1:])) if flatten else min(shape[-2:])


def _last(fits: Callable[[int], bool], first: int, end: int) -> int:
    """The last number before `end` that fits, of which `first` does."""
    while end - first > 1:
        middle = (first + end) // 2
        first, end = (middle, end) if fits(middle) else (first, middle)
    return first


@contextmanager
def planning(
    build: Callable[[torch.dtype], nn.Module],
    layout: Layout,
    dtype: torch.dtype,
    grad_dtype: torch.dtype | None = None,
) -> Iterator[Run]:
    """A `Run` on the first rank of a layout; within it this process is of a fake process group.

    Args:
        build: makes the model on the meta device, in a dtype.
        layout: how it is spread.
        dtype: of its weights.
        grad_dtype: of gradients as they are kept; by default that of the weights.
    Raises:
        ValueError: a model that cannot be spread so.
    """
    if layout.zero and dtype == torch.float64:
        raise ValueError("weights in float64 under ZeRO, whose master weights are float32: expected a narrower dtype.")
    with world_of(layout.ranks) as everyone:
        model = build(torch.float32 if layout.zero else dtype)
        name = type(model).__name__  # fully_shard gives it another
        replicas = spread(model, layout, getattr(model, "tp_plan", None))
        yield Run(name, model, layout, dtype, grad_dtype or dtype, everyone, replicas)


def wire_bytes(placed: Iterable[Any]) -> int:
    """Bytes that a step of LDAdamW sends, per rank."""
    return sum(row.wire_bytes for row in placed)
