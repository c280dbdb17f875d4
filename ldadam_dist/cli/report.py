"""What `ldadam-dist plan` prints: text, or JSON of the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ldadam_dist.cli.estimate import Memory, Run, Settings, wire_bytes
from ldadam_dist.param_groups import describe
from ldadam_dist.placement import Placement
from ldadam_dist.plan import WINDOW_ELEMENTS
from ldadam_dist.rules import dtype_name
from ldadam_dist.tables import format_bytes, table

NOT_COUNTED = (
    "Not counted: activations, layers that are gathered for the computation, buffers of collectives, and the step's "
    "own window (LDAdamW's window_elements)."
)

_ADAMW = "AdamW: two moments in the dtype of the {master}weights."
_EIGHT_BIT = (
    "8-bit Adam: two moments of one byte with a float32 scale per 256 elements; float32 for embeddings, and for "
    "tensors of less than 4096 elements."
)
_MUON = (
    "Muon: one momentum in the dtype of the {master}weights for matrices; AdamW for embeddings, head, norms, biases."
)
_ZERO = (
    "Master weights and partitions are DeepSpeed's; its copy of a group's gradients in float32 at the step is not in."
)


@dataclass(frozen=True)
class Plan:
    """All that is found.

    Attributes:
        run, settings: of what.
        memory: by optimizer, of the fullest rank; LDAdamW first.
        placed: what LDAdamW tells of each parameter on its fullest rank, and that rank.
        described: the table of `describe`.
        limit, largest_rank: bytes of a GPU and the largest rank that fits; None if nobody asks.
    """

    run: Run
    settings: Settings
    memory: Mapping[str, Memory]
    placed: Placement
    fullest: int
    described: str
    limit: int | None = None
    largest_rank: int | None = None

    @classmethod
    def of(cls, run: Run, settings: Settings, limit: int | None) -> Plan:
        """Find everything out, within `planning`.

        Raises:
            ValueError: settings that LDAdamW refuses.
        """
        own, placed, fullest = run.ldadamw(settings)
        memory = {"LDAdamW": own, **run.others()}
        stored: dict[str, Any] = {
            key: settings.options.get(key) for key in ("error_feedback", "error_dtype", "state_dtype")
        }
        described = describe(run.model, rank=settings.rank, **settings.groups, **stored)
        largest = None if limit is None else run.largest_rank(settings, limit)
        return cls(run, settings, memory, placed, fullest, described, limit, largest)

    def as_dict(self) -> dict[str, Any]:
        """As plain data; bytes everywhere."""
        run = self.run
        found = {
            "model": {
                "class": run.name,
                "elements": run.elements,
                "frozen_elements": run.frozen,
                "dtype": dtype_name(run.dtype),
                "grad_dtype": dtype_name(run.grad_dtype),
            },
            "layout": {**asdict(run.layout), "ranks": run.layout.ranks},
            "settings": {"rank": self.settings.rank, **self.settings.groups, **self.settings.options},
            "fullest_rank": self.fullest,
            "memory": {name: memory.as_dict() for name, memory in self.memory.items()},
            "wire": {"optimizer": wire_bytes(self.placed), "engine": run.engine_bytes()},
            "parameters": [asdict(row) for row in self.placed],
        }
        if self.limit is not None:
            found["gpu"] = {
                "bytes": self.limit,
                "fits": {name: memory.total <= self.limit for name, memory in self.memory.items()},
                "largest_rank": self.largest_rank,
            }
        return found

    def __str__(self) -> str:
        run, own = self.run, self.memory["LDAdamW"]
        frozen = f" and {run.frozen:,} frozen" if run.frozen else ""
        lines = [
            f"{run.name}, {run.elements:,} parameters{frozen}, {dtype_name(run.dtype)} weights, "
            f"{dtype_name(run.grad_dtype)} gradients",
            f"{run.layout}; LDAdamW of rank {self.settings.rank}{self._said()}",
            "",
            f"memory per rank, of the fullest (rank {self.fullest} with LDAdamW)" if run.layout.ranks > 1 else "memory",
            "",
            *self._memory_table(),
            "",
            f"LDAdamW takes {_times(own.states + own.error, self.memory['AdamW'].states)} of AdamW's states, and "
            f"{_times(own.total, self.memory['AdamW'].total)} of the total.",
        ]
        master = "float32 master " if run.layout.zero else ""
        lines += [text.format(master=master) for text in (_ADAMW, _EIGHT_BIT, _MUON)]
        lines += [_ZERO] if run.layout.zero else []
        lines += [NOT_COUNTED, ""]
        if run.layout.ranks > 1:
            lines += [
                f"on the wire, per rank and step: {format_bytes(wire_bytes(self.placed))} by the optimizer, "
                f"{format_bytes(run.engine_bytes())} by the engine for gradients and weights",
                "",
            ]
        if self.limit is not None:
            lines += [*self._fits(self.limit), ""]
        return "\n".join([*lines, "whole model, over all ranks", "", self.described])

    def _said(self) -> str:
        """Options that are not as usual."""
        said = {**self.settings.groups, **self.settings.options}
        usual = {
            "error_feedback": True,
            "proj_type": "std",
            "communication": "auto",
            "window_elements": WINDOW_ELEMENTS,
        }
        return "".join(f", {key}={value}" for key, value in said.items() if value and value != usual.get(key)) + (
            "" if said.get("error_feedback", True) else ", error_feedback=False"
        )

    def _memory_table(self) -> list[str]:
        masters, error = bool(self.run.layout.zero), any(memory.error for memory in self.memory.values())
        names = ["weights", *(["masters"] if masters else []), "gradients", "states", *(["error"] if error else [])]
        cells = [("optimizer", *names, "total")]
        for name, memory in self.memory.items():
            values = memory.as_dict()
            cells.append((name, *(format_bytes(values[key]) if values[key] else "-" for key in (*names, "total"))))
        return table(cells, "<" + ">" * (len(names) + 1))

    def _fits(self, limit: int) -> list[str]:
        fitting = [name for name, memory in self.memory.items() if memory.total <= limit]
        lines = [f"in {format_bytes(limit)}, activations aside: {', '.join(fitting) or 'none of these'} would fit"]
        if self.largest_rank:
            return [*lines, f"largest rank of LDAdamW that fits: {self.largest_rank}"]
        return [*lines, "LDAdamW does not fit at any rank: take more ranks, another sharding or a narrower error"]


def _times(part: int, whole: int) -> str:
    return f"{part / whole:.2f}" if whole else "none"
