"""What state dicts hold of the states: errors as floating numbers, whatever they are stored in, and what is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ldadam_dist import arguments
from ldadam_dist.entries import Entry
from ldadam_dist.load_checks import check_form, check_values, checked_group, with_step
from ldadam_dist.partitions import Partitions
from ldadam_dist.state import SCALE, check_places, decoded, step_device, stored, stored_shapes

Entries = Iterable[tuple[Tensor, list[Entry]]]
"""Each parameter, or flat tensor, with what is stepped of it, in the order of the groups."""


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


def _is_decoded(state: Any) -> bool:
    if not isinstance(state, Mapping):  # a key that is no parameter may have anything
        return False
    return SCALE in state or any(isinstance(part, Mapping) and SCALE in part for part in state.values())


class Loading:
    """One call of `load_state_dict`: what is checked before anything changes, and what torch would do otherwise.

    Saved groups are checked as groups are, and keys that they do not have get the optimizer's defaults.

    Args:
        entries: gives all parameters.
        flat: flat tensors, the state of which has one dict for each name.
        state_of: gives where the state of a parameter is kept.
        check_settings: raises ValueError if a parameter cannot be stepped with the settings of its group.
    """

    def __init__(
        self,
        entries: Callable[[], Entries],
        flat: Partitions,
        state_of: Callable[[Entry], dict[str, Any]],
        check_settings: Callable[[Entry], None],
    ) -> None:
        self._entries, self._flat, self._state_of, self._check_settings = entries, flat, state_of, check_settings
        self._found: list[tuple[Entry, dict[str, Any]]] = []

    def check(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """Before torch loads. Returns what it loads, with complete groups.

        Raises:
            ValueError: a state or a group that does not fit.
        """
        check_form(saved, optimizer.param_groups)
        here, groups = optimizer.param_groups, saved["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in here]:
            return saved  # torch says what differs
        both = enumerate(zip(groups, here, strict=True))
        groups = [checked_group(number, group, mine, optimizer.defaults) for number, (group, mine) in both]
        saved = {**saved, "param_groups": groups}
        for param, entries, group, number in _numbered(self._entries(), saved):
            states = saved["state"].get(number, {})
            flat = param in self._flat
            if flat and not isinstance(states, Mapping):
                with_step(entries[0].name, states)
            for entry in entries:
                name, sharded = f"{entry.name} of shape {entry.shape}", entry.adapter.sharded
                state, shapes = with_step(name, states.get(entry.name, {}) if flat else states), stored_shapes(entry)
                arguments.check_state(name, entry.group, group, state, shapes, sharded)
                check_values(name, entry, state, list(shapes))
                check_places(entry, state)
                self._check_settings(replace(entry, group=dict(group)))
                self._found.append((entry, state))
            if flat:
                arguments.check_partition(states, [entry.name for entry in entries if entry.present])
        return saved

    def restore(self, optimizer: Optimizer) -> None:
        """After torch has loaded, which casts every state to its parameter's dtype: store them from the saved ones."""
        for entry, saved in self._found:
            if saved:
                state = self._state_of(entry)
                state.update(stored(entry, saved))
                state["step"] = saved["step"].to(step_device(entry))


def _numbered(
    entries: Entries, state_dict: Mapping[str, Any]
) -> Iterator[tuple[Tensor, list[Entry], Mapping[str, Any], int]]:
    """Each parameter with its group and its number in a state dict."""
    numbers = [(group, number) for group in state_dict["param_groups"] for number in group["params"]]
    for (param, of_param), (group, number) in zip(entries, numbers, strict=True):
        yield param, of_param, group, number
