"""What state dicts hold of the states: errors as floating numbers, whatever they are stored in, and what is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ldadam_dist import arguments
from ldadam_dist.entries import Entry
from ldadam_dist.partitions import Partitions
from ldadam_dist.state import SCALE, check_places, decoded, step_device, stored, stored_shapes

Entries = Iterable[tuple[Tensor, list[Entry]]]
"""Each parameter, or flat tensor, with what is stepped of it, in the order of the groups."""

STORAGE = ("error_dtype", "state_dtype", "stochastic_rounding", "capturable", "metrics_every")
"""Settings of a group that say how its states are stored or looked at: a checkpoint has the states of any, and changes
none."""


def with_floating_errors(
    state_dict: dict[str, Any], entries: Callable[[], Entries], flat: Partitions, own_errors: bool
) -> dict[str, Any]:
    """A state dict whose errors are all floating numbers; the states themselves stay as they are.

    Args:
        state_dict: as `torch.optim.Optimizer.state_dict` makes it.
        entries: gives all parameters, which are asked for only if an error must be decoded.
        flat: flat tensors, the state of which has one dict for each name.
        own_errors: whether replicas have errors of their own, of which a state dict has the mean; then collective.
    """
    if not own_errors and not any(_is_decoded(state) for state in state_dict["state"].values()):
        return state_dict
    made = dict(state_dict["state"])
    for param, of_param, _, number in _numbered(entries(), state_dict):
        if number not in made:
            continue
        if param in flat:
            made[number] = {e.name: decoded(e, made[number][e.name]) for e in of_param if e.name in made[number]}
        else:
            made[number] = decoded(of_param[0], made[number])
    return {**state_dict, "state": made}


def _is_decoded(state: Mapping[str, Any]) -> bool:
    return SCALE in state or any(isinstance(part, Mapping) and SCALE in part for part in state.values())


class Loading:
    """One call of `load_state_dict`: what is checked before anything changes, and what torch would do otherwise.

    Args:
        entries: gives all parameters.
        flat: flat tensors, the state of which has one dict for each name.
        state_of: gives where the state of a parameter is kept.
    """

    def __init__(
        self, entries: Callable[[], Entries], flat: Partitions, state_of: Callable[[Entry], dict[str, Any]]
    ) -> None:
        self._entries, self._flat, self._state_of = entries, flat, state_of
        self._found: list[tuple[Entry, dict[str, Any]]] = []
        self._storage: list[dict[str, Any]] = []

    def check(self, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        """Before torch loads. Raises ValueError for a state that does not fit."""
        saved_groups = saved["param_groups"]
        if [len(group["params"]) for group in saved_groups] != [len(g["params"]) for g in optimizer.param_groups]:
            return  # torch says what differs
        self._storage = [{key: group[key] for key in STORAGE} for group in optimizer.param_groups]
        for param, entries, group, number in _numbered(self._entries(), saved):
            states = saved["state"].get(number, {})
            flat = param in self._flat
            for entry in entries:
                state = states.get(entry.name, {}) if flat else states
                name, sharded = f"{entry.name} of shape {entry.shape}", entry.adapter.sharded
                arguments.check_state(name, entry.group, group, state, stored_shapes(entry), sharded)
                check_places(entry, state)
                self._found.append((entry, state))
            if flat:
                arguments.check_partition(states, [entry.name for entry in entries if entry.present])

    def restore(self, optimizer: Optimizer) -> None:
        """After torch has loaded, which casts every state to its parameter's dtype: store them from the saved ones."""
        for group, kept in zip(optimizer.param_groups, self._storage, strict=True):
            group.update(kept)
        for entry, saved in self._found:
            if saved:
                state = self._state_of(entry)
                state.update(stored(entry, saved))
                state["step"] = state["step"].to(step_device(entry))


def _numbered(
    entries: Entries, state_dict: Mapping[str, Any]
) -> Iterator[tuple[Tensor, list[Entry], Mapping[str, Any], int]]:
    """Each parameter with its group and its number in a state dict."""
    numbers = [(group, number) for group in state_dict["param_groups"] for number in group["params"]]
    for (param, of_param), (group, number) in zip(entries, numbers, strict=True):
        yield param, of_param, group, number
