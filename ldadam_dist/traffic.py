"""Measures what a piece of code sends through torch.distributed.

with Traffic() as traffic:
    optimizer.step()
print(traffic)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from ldadam_dist.tables import format_bytes, table

# Operators of torch by what they do, without leading and trailing underscores.
_OPERATORS = {
    "all_reduce": "allreduce allreduce_coalesced all_reduce all_reduce_coalesced",
    "all_gather": "allgather allgather_base allgather_coalesced allgather_into_tensor_coalesced "
    "all_gather_into_tensor all_gather_into_tensor_out all_gather_into_tensor_coalesced",
    "reduce_scatter": "reduce_scatter reduce_scatter_base reduce_scatter_tensor reduce_scatter_tensor_out "
    "reduce_scatter_tensor_coalesced",
    "all_to_all": "alltoall alltoall_base all_to_all_single shard_dim_alltoall",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather gather_into_tensor",
    "scatter": "scatter",
    "send": "send isend",
    "recv": "recv recv_any_source irecv",
}
_KINDS = {operator: kind for kind, operators in _OPERATORS.items() for operator in operators.split()}
# The others call c10d inside, where a mode does not look: each collective is seen once.
_NAMESPACES = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"}
_SENDS_NOTHING = {
    *("barrier", "monitored_barrier", "wait_tensor", "wait_tensors", "check_for_nan", "wrap_tensor_autograd"),
}


@dataclass(frozen=True)
class Collective:
    """One collective operation, as one process sees it.

    Attributes:
        kind: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "gather", "scatter",
            "send" or "recv"; torch's name of any other operator.
        group: the process group's description ("default_pg", "mesh_dp"), or else its name.
        group_size: number of its processes; 0 if torch does not tell.
        dtype: of the tensors; of the first, if they differ.
        elements: elements of all its tensors, whole; twice that for an all-reduce.
        bytes: of these elements.
        largest: elements of its largest tensor, whole; once, also for an all-reduce.
    """

    kind: str
    group: str
    group_size: int
    dtype: torch.dtype
    elements: int
    bytes: int
    largest: int


class Traffic(TorchDispatchMode):
    """Counts the collectives that this process issues within a `with` block, backward passes included.

        with Traffic() as traffic:
            optimizer.step()
        print(traffic)                                              # a table
        traffic.calls, traffic.elements, traffic.bytes              # totals
        assert all(c.largest < m * n for c in traffic.records)      # one by one

    Counted is the whole tensor that a collective deals with, in any group size and whatever the algorithm: an
    all-reduce twice, as it is a reduce-scatter and an all-gather, or a reduce and a broadcast; any other collective
    once.

        all-reduce      2 × its tensor              all-to-all      the larger of what this process sends and receives
        all-gather      its output                  gather          what arrives at the root, on every process
        reduce-scatter  its input                   scatter         what leaves the root, on every process
        broadcast       its tensor                  send, recv      the tensor, on its process
        reduce          its tensor                  barrier, wait   nothing

    A coalesced operation is one call with several tensors. Collectives of Python objects are those of the tensors that
    they are pickled into. An operator that is none of these counts with its tensors under torch's name of it.
    The operations themselves run as without it, on any back-end, the fake one included, and blocks may be nested.

    Not seen are other threads (but those of autograd are), collectives that a back-end or a C++ extension issues past
    torch's dispatcher, and operators of symmetric memory. A block adds to what earlier ones of the same object counted.

    Attributes:
        records: a `Collective` for each operation, in the order of issue.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Collective] = []

    @property
    def calls(self) -> int:
        return len(self.records)

    @property
    def elements(self) -> int:
        return sum(record.elements for record in self.records)

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.records)

    def __str__(self) -> str:
        """A line for each kind, group and dtype, the largest first, then the totals."""
        alike: dict[tuple[str, ...], list[Collective]] = {}
        for c in self.records:
            key = (c.kind, c.group, str(c.group_size or "?"), str(c.dtype).removeprefix("torch."))
            alike.setdefault(key, []).append(c)
        rows = sorted(alike.items(), key=lambda item: -sum(c.bytes for c in item[1]))
        lines = table(
            [
                ("collective", "group", "processes", "dtype", "calls", "elements", "bytes"),
                *((*key, *_totals(same)) for key, same in rows),
                ("total", "", "", "", *_totals(self.records)),
            ],
            "<<><>>>",
        )
        return "\n".join([*lines[:-1], lines[1], lines[-1]])

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled: the collectives in them are dispatched when they run."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # An operation on a tensor subclass may communicate. NotImplemented hands it to the subclass with this mode on,
        # but passes over modes further out: for DTensor, as torch's CommDebugMode does, or if there are none but these.
        types = tuple(t for t in types if t is not Tensor)  # as `view(dtype)` names it
        dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())  # there is none if nobody has one
        if any(issubclass(t, dtensor) for t in types):
            return NotImplemented
        if types and all(isinstance(mode, Traffic) for mode in _get_current_dispatch_mode_stack()):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.OpOverload) and func.namespace in _NAMESPACES:
            record = _record(func, args, kwargs or {}, result)
            if record is not None:
                self.records.append(record)
        return result


def _record(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Collective | None:
    """What an operator of torch's sent; None if that is nothing.

    The whole tensor is the larger of what goes in and what comes out, of which some processes have only their part in
    a gather or a scatter.
    """
    operator = func._opname.strip("_")
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if operator == "allgather_coalesced":  # lists by process of lists of tensors
        given["output_lists"] = list(zip(*given["output_lists"], strict=True))
    elif operator == "alltoall":  # the pieces of one tensor
        given = {name: [value] if name.endswith("_tensors") else value for name, value in given.items()}
    if func.namespace != "c10d":  # functional; the results of others are among the arguments
        given.setdefault("out", result)

    outputs = [t for name, value in given.items() if name.startswith("out") for t in _tensors(value)]
    inputs = [t for name, value in given.items() if not name.startswith("out") for t in _tensors(value)]
    if operator in _SENDS_NOTHING or not inputs + outputs:
        return None
    kind = _KINDS.get(operator, func._opname)
    group, group_size = _group(given.get("process_group", given.get("group_name")))
    parts = max(group_size, 1)
    whole = [
        max(_size(i, parts if kind == "gather" else 1), _size(o, parts if kind == "scatter" else 1))
        for i, o in zip_longest(inputs, outputs, fillvalue=())
    ]
    times = 2 if kind == "all_reduce" else 1
    return Collective(
        kind=kind,
        group=group,
        group_size=group_size,
        dtype=next(t.dtype for piece in inputs + outputs for t in piece),
        elements=times * sum(elements for elements, _ in whole),
        bytes=times * sum(number for _, number in whole),
        largest=max(elements for elements, _ in whole),
    )


def _tensors(value: Any) -> list[list[Tensor]]:
    """The tensors of an argument, each as its pieces: Tensor is one, Tensor[] are several, Tensor[][] are in pieces."""
    if isinstance(value, Tensor):
        return [[value]]
    if not isinstance(value, list | tuple):
        return []
    found = ([t for t in tree_leaves(item) if isinstance(t, Tensor)] for item in value)
    return [pieces for pieces in found if pieces]


def _size(pieces: Sequence[Tensor], times: int) -> tuple[int, int]:
    """Elements and bytes."""
    elements = times * sum(t.numel() for t in pieces)
    return elements, times * sum(t.numel() * t.element_size() for t in pieces)


def _group(value: Any) -> tuple[str, int]:
    """Name and size of a process group, which operators take boxed, by its name or as it is."""
    try:
        if isinstance(value, str):
            value = torch._C._distributed_c10d._resolve_process_group(cast(Any, value))
        elif not isinstance(value, dist.ProcessGroup):
            value = dist.ProcessGroup.unbox(value)
    except (AttributeError, RuntimeError, TypeError):  # a torch without `unbox`; a group of a traced program
        return value if isinstance(value, str) else "unknown", 0
    described = value.group_desc not in ("", "undefined")
    return value.group_desc if described else value.group_name, value.size()


def _totals(records: Sequence[Collective]) -> tuple[str, str, str]:
    number = sum(c.bytes for c in records)
    return f"{len(records):,}", f"{sum(c.elements for c in records):,}", format_bytes(number)
