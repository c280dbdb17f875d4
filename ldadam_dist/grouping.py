"""Parameter groups beside others: at construction, added to an optimizer, and in a checkpoint that has others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ldadam_dist.entries import names_of
from ldadam_dist.load_checks import names_of_more
from ldadam_dist.rules import unprojected

_OWN = frozenset({"params", "param_names", "lr", "lr_scale", "initial_lr", "weight_decay", "enable_lowrank", "flatten"})
"""Keys that a group does not take over from others."""


def as_given(params: Any) -> Any:
    """What the optimizer is given; groups that have no projection because others alone ask for one say so."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        return params  # torch says what is wrong
    items = list(params.items() if isinstance(params, Mapping) else params)
    if not items or not all(isinstance(item, Mapping) for item in items):
        return items
    left = unprojected(items)
    return [{**item, "enable_lowrank": False} if no else item for item, no in zip(items, left, strict=True)]


def inherited(groups: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> dict[str, Any]:
    """Settings that a group takes over: those on which all projected groups, or else all, agree."""
    found: dict[str, Any] = {}
    like = [group for group in groups if group["enable_lowrank"]] or groups
    for key in set(keys) - _OWN:
        if like and all(key in group and group[key] == like[0][key] for group in like):
            found[key] = like[0][key]
    return found


def name_alike(added: dict[str, Any], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make up names where the added group has none and others have, or the other way round; torch wants all or none.

    Returns:
        the groups before that were given names.
    """
    params = added["params"]
    if isinstance(params, set):
        return []  # torch refuses it
    listed = added["params"] = [params] if isinstance(params, Tensor) else list(params)
    named, others = any(isinstance(item, tuple) for item in listed), [g for g in groups if "param_names" not in g]
    if listed and not named and groups and not others:
        taken = {name for group in groups for name in group["param_names"]}
        made = names_of({"params": listed}, len(groups))
        added["params"] = [
            (name if name not in taken else f"{name} (added)", p) for name, p in zip(made, listed, strict=True)
        ]
    if not named:
        return []
    for number, group in enumerate(groups):
        if "param_names" not in group:
            group["param_names"] = names_of(group, number)
    return others


def forget_names(groups: Sequence[dict[str, Any]]) -> None:
    """Take back what `name_alike` has made up."""
    for group in groups:
        group.pop("param_names", None)


def merged(groups: list[dict[str, Any]], saved: int | None) -> list[dict[str, Any]]:
    """The groups of `build_param_groups` as earlier versions made them: one of all with the same settings.

    Engines, schedulers and torch.distributed.checkpoint load nothing into more groups than were saved.

    Args:
        groups: from `build_param_groups`.
        saved: how many groups a checkpoint has, if there is one; groups that are no more stay as they are.
    """
    if saved is None or len(groups) <= saved:
        return groups
    found: list[dict[str, Any]] = []
    for group in groups:
        alike = (other for other in found if {**other, "params": None} == {**group, "params": None})
        first = next(alike, None)
        if first is None:
            found.append({**group, "params": list(group["params"])})
        else:
            first["params"] += group["params"]
    return found


def regrouped(state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A saved state dict in the groups of now, where it has the same names in others; else as it is.

    Earlier versions put matrices, embeddings and vectors of one weight decay into one group.

    Raises:
        ValueError: groups are fewer or more, and a group of now has parameters of several saved ones.
    """
    saved = state_dict["param_groups"]
    if [len(group["params"]) for group in saved] == [len(group["params"]) for group in groups]:
        both = list(zip(saved, groups, strict=True))
        if not any(names_of_more(*pair) for pair in both):
            return state_dict
        own = [{**s, "param_names": list(g["param_names"])} if names_of_more(s, g) else s for s, g in both]
        return {**state_dict, "param_groups": own}
    if not all(
        "param_names" in group and len(group["param_names"]) == len(group["params"]) for group in (*saved, *groups)
    ):
        return state_dict  # torch says what differs
    place = {name: (group, n) for group in saved for name, n in zip(group["param_names"], group["params"], strict=True)}
    if place.keys() != {name for group in groups for name in group["param_names"]}:
        return state_dict
    made = []
    for number, group in enumerate(groups):
        names = group["param_names"]
        sources = list({id(place[name][0]): place[name][0] for name in names}.values())
        if len(sources) > 1:
            raise ValueError(
                f"group {number} of this optimizer has parameters of {len(sources)} groups of the saved state, such as "
                f"{names[0]} and {next(n for n in names if place[n][0] is not sources[0])}: expected one. Build the "
                f"optimizer with the groups that the state was saved with."
            )
        numbers = [place[name][1] for name in names]
        made.append({**(sources[0] if sources else group), "params": numbers, "param_names": list(names)})
    return {**state_dict, "param_groups": made}
