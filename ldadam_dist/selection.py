"""Which parameters of a model are projected, and at which rank: the model's structure and the user's patterns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ldadam_dist.identity import ParamInfo, inspect_model
from ldadam_dist.rules import DEFAULT_RANK, is_low_rank, matrices_of

Patterns = str | Iterable[str] | None

PROJECTED_KINDS = frozenset({"linear", "experts"})
"""Kinds of parameters that are projected unasked; see `ParamInfo.kind`."""


@dataclass(frozen=True)
class Decision:
    """What one parameter gets.

    rank: the rank that its matrices are, or would be, projected to.
    named_rank: whether that rank comes from rank_pattern.
    low_rank: LDAdamW; otherwise AdamW, or nothing when it is frozen.
    why: why not LDAdamW; empty if low_rank.
    """

    info: ParamInfo
    rank: int
    named_rank: bool
    low_rank: bool
    why: str

    @property
    def frozen(self) -> bool:
        return not self.info.param.requires_grad

    @property
    def flatten(self) -> bool:
        """Whether its group must ask for flattening."""
        return self.low_rank and self.info.flatten


@dataclass(frozen=True)
class _Pattern:
    """A name, a part of one (unless `whole`), or a regular expression for a whole one."""

    text: str
    whole: bool
    regex: re.Pattern[str] | None

    def matches(self, info: ParamInfo) -> bool:
        return self.names(info) or any(
            (not self.whole and self.text in name) or (self.regex is not None and self.regex.fullmatch(name))
            for name in info.names
        )

    def names(self, info: ParamInfo) -> bool:
        return self.text in info.exact_names


def decide(
    model: nn.Module,
    *,
    rank: int | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    rank_pattern: Mapping[str, int] | None = None,
    convolutions: bool = False,
) -> list[Decision]:
    """One decision for each parameter of the model, frozen ones included; see `build_param_groups` for the arguments.

    `include` narrows the automatic choice to what it matches. A pattern that is itself the name of a parameter or its
    module, in full or its last part ('lm_head'), also overrules the automatic choice by kind.
    """
    rank = DEFAULT_RANK if rank is None else rank
    check_rank(rank, "rank")
    for text, value in (rank_pattern or {}).items():
        check_rank(value, f"rank_pattern[{text!r}]")
    infos = inspect_model(model)
    all_linear = include is None or _is_all_linear(include)
    includes = [] if all_linear else _compile(include, "include")
    excludes = _compile(exclude, "exclude")
    ranks = _compile(list(rank_pattern or ()), "rank_pattern")
    kinds = PROJECTED_KINDS | {"convolution"} if convolutions else PROJECTED_KINDS

    decisions = []
    for info in infos:
        rank_match = next((p for p in ranks if p.matches(info)), None)
        r = rank_pattern[rank_match.text] if rank_pattern and rank_match else rank
        named = any(p.names(info) for p in includes)
        included = all_linear or any(p.matches(info) for p in includes)
        excluded = next((p for p in excludes if p.matches(info)), None)
        matrix = _matrix(info)
        why = ""
        if not info.param.requires_grad:
            why = "frozen"
        elif matrix is None or not info.plain or not (info.kind in kinds or named):
            why = info.kind
        elif excluded:
            why = f"excluded by {excluded.text!r}"
        elif not included:
            why = "not in include"
        elif not is_low_rank(info.shape, r, flatten=info.flatten):
            if includes or rank_match:
                _raise_rank_too_large(info, matrix, r, "rank_pattern" if rank_match else "include")
            why = f"rank {r} ≥ {min(matrix)}"
        decisions.append(Decision(info, r, named_rank=rank_match is not None, low_rank=not why, why=why))

    for pattern in (*includes, *excludes, *ranks):
        argument = "include" if pattern in includes else "exclude" if pattern in excludes else "rank_pattern"
        _check_used(pattern, argument, decisions)
    return decisions


def check_rank(value: object, argument: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{argument}={value!r} is no rank: expected an integer of at least 1. To give a matrix to AdamW, name it "
            "in exclude."
        )


def nothing_projected(decisions: list[Decision]) -> ValueError:
    """The error for a model of which no parameter would be projected."""
    trainable = [d for d in decisions if not d.frozen]
    if not trainable:
        return ValueError("the model has no trainable parameter: found requires_grad=False on all of them.")
    matrices = [(matrix, d) for d in trainable if (matrix := _matrix(d.info))]
    if not matrices:
        return ValueError(
            f"none of the model's {len(trainable)} trainable parameters is a matrix: LDAdamW has nothing to project. "
            "Use torch.optim.AdamW."
        )
    candidates = [(matrix, d) for matrix, d in matrices if d.info.kind in PROJECTED_KINDS] or matrices
    _, largest = max(candidates, key=lambda candidate: sorted(candidate[0]))
    return ValueError(
        f"nothing of the model would be projected at rank={largest.rank}: its largest matrix is "
        f"{largest.info.name!r} of shape {largest.info.shape}, which gets AdamW "
        f"({largest.why}). Lower rank, name matrices in include, ask for convolutions with convolutions=True, or use "
        "torch.optim.AdamW."
    )


def _matrix(info: ParamInfo) -> tuple[int, int] | None:
    """(rows, columns) of each of the matrices that the parameter is made of."""
    matrices = matrices_of(info.shape, info.flatten)
    return None if matrices is None else matrices[1:]


def _is_all_linear(patterns: Patterns) -> bool:
    if patterns is None:
        return False
    texts = [patterns] if isinstance(patterns, str) else list(patterns)
    return [str(text).replace("_", "-") for text in texts] == ["all-linear"]


def _compile(patterns: Patterns, argument: str) -> list[_Pattern]:
    if patterns is None:
        return []
    whole = isinstance(patterns, str)
    texts = [patterns] if isinstance(patterns, str) else list(patterns)
    compiled = []
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{argument} holds {text!r}: expected names, parts of names or regular expressions.")
        try:
            regex = re.compile(text)
        except re.error as error:
            if whole:
                raise ValueError(
                    f"{argument}={text!r} is no regular expression ({error}). Give parts of names as a list: "
                    f"{argument}=[...]."
                ) from None
            regex = None
        compiled.append(_Pattern(text, whole, regex))
    return compiled


def _check_used(pattern: _Pattern, argument: str, decisions: list[Decision]) -> None:
    """An error for a pattern that matches no parameter, or, unless it excludes, none that is projected."""
    matched = [d for d in decisions if pattern.matches(d.info)]
    if not matched:
        hint = ""
        if pattern.whole and any(pattern.text in name for d in decisions for name in d.info.names):
            hint = f" A single string is a regular expression for the whole name; write {argument}=[{pattern.text!r}]."
        raise ValueError(
            f"{argument} pattern {pattern.text!r} matches no parameter and no module. "
            f"Near names: {', '.join(_near_names(pattern.text, decisions))}.{hint}"
        )
    if argument != "exclude" and not any(d.low_rank for d in matched):
        found = ", ".join(f"{d.info.name!r} ({d.why})" for d in matched[:3]) + (", ..." if len(matched) > 3 else "")
        raise ValueError(
            f"{argument} pattern {pattern.text!r} matches nothing that is projected, only {found}. Drop it; a "
            "trainable matrix is projected if include gives its full name."
        )


def _near_names(text: str, decisions: list[Decision]) -> list[str]:
    """A few names that the pattern may have meant, most similar first."""
    names = [name for d in decisions for name in sorted(d.info.names)]
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    whole = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".0", name) for name in names)
    candidates = list(whole if "." in text else parts) or names
    near = difflib.get_close_matches(text, candidates, n=5, cutoff=0.5) or candidates[:5]
    return [repr(name) for name in near]


def _raise_rank_too_large(info: ParamInfo, matrix: tuple[int, int], rank: int, argument: str) -> None:
    raise ValueError(
        f"rank={rank} does not fit parameter {info.name!r} of shape {info.shape}, which {argument} asks to project: a "
        f"projection of {matrix[0]} × {matrix[1]} keeps fewer than {min(matrix)} directions. Lower rank (for this "
        "parameter alone with rank_pattern), or name it in exclude to give it AdamW."
    )
