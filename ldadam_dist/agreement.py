"""What ranks compare before a step: parameters and settings, what gradients are like, and the replicas of both."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from ldadam_dist.consistency import Agreement, check_ranks_agree
from ldadam_dist.entries import Entry
from ldadam_dist.gradients import inspect_gradients
from ldadam_dist.replicas import check_equal
from ldadam_dist.separate import is_fake


class Agreements:
    """What the ranks have agreed on in earlier steps."""

    def __init__(self) -> None:
        self._agreed: dict[Hashable, Agreement] = {}
        self._compared: set[int] = set()

    def inspect(
        self, entries: Sequence[Entry], part: Hashable, settings: Mapping[str, Any], due: bool, read: bool
    ) -> bool:
        """Compare what must be the same on all ranks, find the gradients and set their statuses; collective.

        Replicas are compared at the first step of a parameter, and when it is `due`; not where gradients are not read.

        Args:
            entries: all trainable parameters that are stepped together.
            part: which, of those that an engine steps one after the other.
            settings: those that all parameters have in common.
            due: whether to compare replicas again.
            read: whether to read the gradients.
        Returns:
            whether any rank has an unusable gradient.
        Raises:
            RuntimeError: something differs; on all ranks that share it, and nothing has changed.
        """
        before = self._agreed.get(part)
        agreement = Agreement(entries, settings, before)
        fake = any(is_fake(entry.adapter.local(entry.param)) for entry in entries)
        if before is None and not fake:
            check_ranks_agree(entries, settings)
        unusable = inspect_gradients(entries, agreement, read)
        self._agreed[part] = agreement
        if read and not unusable and not fake:
            check_equal([e for e in entries if due or id(e.param) not in self._compared])
            self._compared.update(id(entry.param) for entry in entries)
        return unusable
