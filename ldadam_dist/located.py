"""What an optimizer knows of its parameters: how they are stored, what an engine put in their place, who steps what."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ldadam_dist import arguments
from ldadam_dist.adapters import Adapter, adapter_for
from ldadam_dist.agreement import Agreements
from ldadam_dist.consistency import KEPT
from ldadam_dist.entries import Entry, names_of
from ldadam_dist.lowrank import plan_windows
from ldadam_dist.partitions import FlatPartition, Partitions
from ldadam_dist.plan import Unit
from ldadam_dist.replicas import Replicas
from ldadam_dist.rules import global_shape, low_rank_matrices
from ldadam_dist.whole import Whole


class Located(Whole):
    """The parameters of `LDAdamW` and where they are.

    Attributes:
        replicas: the processes that hold the same plain parameters, or the same shards.
        _window: elements of matrices in flight together.
        _check_every: after how many steps to compare replicas.
        _steps: taken by this optimizer.
    """

    error_in_grad: bool
    replicas: Replicas
    _window: int
    _check_every: int
    _steps: int

    def _forget(self) -> None:
        """Start without what is found out about the parameters as they are stepped."""
        self._adapters: dict[Any, Adapter] = {}
        self._plans: dict[tuple[int, ...], tuple[Any, list[list[list[Unit]]]]] = {}
        self._agreements, self._loaded = Agreements(), 0
        self._given: set[int] = set()
        self._shapes: dict[int, list[tuple[int, ...]]] = {}
        self._partitions = Partitions()
        self._find_partitions: Callable[[], Any] | None = None

    def _note(self, group: dict[str, Any]) -> None:
        """Remember what a group holds, to know later whether an engine has put a flat tensor there."""
        self._given.update(map(id, group["params"]))
        self._shapes[id(group)] = [global_shape(param) for param in group["params"]]

    def attach_partitions(
        self, partitions: Sequence[FlatPartition], overflowed: Callable[[], bool] = lambda: False
    ) -> Partitions:
        """Say what is in the flat tensors that an engine has put in the place of the parameters.

        `ldadam_dist.integrations.deepspeed` does so for DeepSpeed; collective over their process groups.

        Args:
            partitions: in the order in which the engine steps them, the same on all processes.
            overflowed: see `Partitions`.
        Returns:
            what was made of them.
        Raises:
            ValueError: parameters that do not fit into their flat tensors; replicas or error_in_grad.
        """
        if self.replicas.group is not None or self.error_in_grad or self.defaults["capturable"]:
            raise ValueError(
                "an engine cuts states: build LDAdamW without process_group=, replicate_mesh= and error_in_grad, not "
                "capturable."
            )
        found = Partitions(partitions, self.param_groups, overflowed)
        self._forget()
        self._partitions = found
        return found

    def attach_when_needed(self, attach: Callable[[], Any]) -> None:
        """Have `attach`, which calls `attach_partitions`, called as soon as the parameters must be known."""
        self._find_partitions = attach

    def attach_found(self) -> None:
        """Call what `attach_when_needed` was given, if that has not happened yet."""
        if self._find_partitions is not None:
            self._find_partitions()
            self._find_partitions = None

    def matrices(self) -> set[int]:
        """ids of the parameters that are projected."""
        return {id(entry.param) for entry in self._entries() if entry.matrices is not None}

    def _entries(self, whole_engine: bool = False) -> Iterator[Entry]:
        """Trainable parameters; `whole_engine`: also those whose flat tensors an engine is not stepping just now."""
        if whole_engine and self._partitions:
            for param, group in self._partitions.with_groups(self.param_groups):
                yield from self._partitions.entries(param, group, self.state.get(param, {}))
            return
        for param, entries in self._entries_by_param():
            if param.requires_grad:
                yield from entries

    def _entries_by_param(self) -> Iterator[tuple[Tensor, list[Entry]]]:
        seen: set[str] = set()
        for i, group in enumerate(self.param_groups):
            for j, (name, param) in enumerate(zip(names_of(group, i), group["params"], strict=True)):
                if name in seen:  # as of the named_parameters() of two modules; metrics and errors go by names
                    name = f"{name} (#{j} of group {i})"
                seen.add(name)
                state = self.state.get(param, {})
                if param in self._partitions:
                    yield param, list(self._partitions.entries(param, group, state))
                    continue
                if id(param) not in self._given:  # accelerate puts others of these shapes there, an engine a flat one
                    same_shapes = self._shapes.get(id(group)) == [global_shape(p) for p in group["params"]]
                    arguments.check_not_flattened(param, same_shapes)
                    self._note(group)
                yield param, [self._entry(name, param, group, state)]

    def _entry(self, name: str, param: Tensor, group: dict[str, Any], state: dict[str, Any] | None = None) -> Entry:
        shape, adapter = global_shape(param), self._adapter(param, name, group["flatten"])
        return Entry(name, param, group, adapter, low_rank_matrices(shape, group), shape, state or {})

    def _state_of(self, entry: Entry) -> dict[str, Any]:
        """Where the state of a parameter is kept; that of a flat tensor has one dict for each name."""
        if not entry.present:
            return {}
        state: dict[str, Any] = self.state[entry.param]
        flat = entry.param in self._partitions
        return state.setdefault(entry.name, {}) if flat else state

    def _inspect(self, entries: list[Entry], read: bool = True) -> bool:
        """Compare parameters, settings and replicas with other ranks, and find the gradients; see `Agreements`."""
        part = tuple(dict.fromkeys(id(entry.param) for entry in entries)) if self._partitions else None
        settings = {"loads": self._loaded, "check_replicas_every": self._check_every, "window_elements": self._window}
        due = self._check_every > 0 and (self._steps + 1) % self._check_every == 0
        return self._agreements.inspect(entries, part, self.replicas.settings | settings, due, read)

    def _stepped_together(self, entries: list[Entry]) -> list[list[Entry]]:
        """The parameters in the parts that are planned by themselves: an engine steps flat tensors one by one."""
        if not self._partitions:
            return [entries]
        return [list(part) for _, part in itertools.groupby(entries, key=lambda entry: id(entry.param))]

    def _adapter(self, param: Tensor, name: str, flatten: bool) -> Adapter:
        where = (getattr(param, "device_mesh", None), getattr(param, "placements", None), param.device)
        key = (*where, param.ndim, flatten)
        if key not in self._adapters:
            self._adapters[key] = adapter_for(param, self.replicas.group, self.replicas.averaged, name, flatten)
        return self._adapters[key]

    def _windows(self, entries: list[Entry]) -> list[list[list[Unit]]]:
        """The plan of the matrices; made anew when they or their settings change."""
        keys = ("rank", "proj_type", "proj_method", "error_feedback", "communication")
        made_of = tuple((e.adapter, e.matrices, *(e.group[key] for key in keys)) for e in entries)
        tensors = tuple(dict.fromkeys(id(entry.param) for entry in entries))
        if tensors not in self._plans or self._plans[tensors][0] != made_of:
            # Parts that are planned by themselves begin with another owner each, or the first would have most matrices.
            turn = self._partitions.number(entries[0].param) if entries else 0
            while len(self._plans) >= KEPT:  # parameters that are frozen and thawed at random make a new set each time
                del self._plans[next(iter(self._plans))]
            self._plans[tensors] = made_of, plan_windows(entries, self._window, turn)
        return self._plans[tensors][1]
