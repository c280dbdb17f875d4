"""A step is all or nothing: one that was interrupted is repeated from where it stopped, or refused from then on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef


@dataclass
class Progress:
    """How far a step has come, for one that goes on after an error, such as out of memory.

    Attributes:
        done: the matrices that have been stepped, or rest.
        formed: those whose error has the gradient in it already.
        changing: those of which something else changes just now, so that they cannot be stepped again.
        closed: whether more than matrices may have changed.
    """

    done: set[Hashable] = field(default_factory=set)
    formed: set[Hashable] = field(default_factory=set)
    changing: set[Hashable] = field(default_factory=set)
    closed: bool = False


class Whole(Optimizer):
    """An optimizer that knows whether a step of it was interrupted.

    Attributes:
        _torn: set before a step changes the first of weights, states and gradients, cleared after it has changed the
            last. So it costs nothing, and whatever is raised in between leaves it set.
    """

    _torn = False
    _progress: Progress | None = None
    _stepped_with: list[Any] | None = None

    def _begin(self, repeatable: bool) -> Progress:
        """Before a step changes anything. Returns how far it has come: an interrupted one goes on.

        Args:
            repeatable: whether it may be repeated, as no other process takes part.
        """
        going_on = self._progress if self._torn else None
        self._torn, self._progress = True, going_on or Progress(closed=not repeatable)
        return self._progress

    def _end(self) -> None:
        """After a step has changed everything."""
        self._torn, self._progress, self._stepped_with = False, None, None

    def _interrupted(self, _: Any, error: BaseException | None, __: Any) -> None:
        """On the way out of a step, note what it can be repeated with if it was interrupted.

        Not after Ctrl-C, as threads may still be at work.
        """
        progress = self._progress
        if progress is None or progress.closed or progress.changing or not isinstance(error, Exception):
            self._progress = None
        else:
            self._stepped_with = self._steps_with()

    def _steps_with(self) -> list[Any]:
        """What decides on a step: the gradients as they are, and the settings."""
        found: list[Any] = []
        for group in self.param_groups:
            found += [{key: value for key, value in group.items() if key != "params"}]
            for param in group["params"]:
                grad = param.grad
                found.append((id(param), None if grad is None else (TensorWeakRef(grad), grad._version)))
        return found

    def _goes_on(self) -> bool:
        """Whether an interrupted step can be repeated: from where it stopped, with the same gradients and settings."""
        if self._progress is None or self._stepped_with is None:
            return False
        now = self._steps_with()
        return len(now) == len(self._stepped_with) and all(map(_same, self._stepped_with, now))

    def _refuse_torn(self, what: str) -> None:
        """Raise RuntimeError if a step was interrupted.

        Args:
            what: cannot be done then.
        """
        if self._torn:
            raise RuntimeError(
                f"{what} after a step that was interrupted: an exception, such as Ctrl-C or out of memory, has left "
                f"some weights and states stepped and others not, or gradients in errors. Resume from a checkpoint: "
                f"load weights and load_state_dict() from the last one, or build model and optimizer anew and do so."
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(one[key] is other[key] or one[key] == other[key] for key in one)
    (param, before), (same_param, now) = one, other
    if before is None or now is None:
        return param == same_param and before is now
    grad = before[0]()
    return param == same_param and grad is not None and grad is now[0]() and before[1] == now[1]
