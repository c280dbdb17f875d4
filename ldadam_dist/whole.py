"""A step is all or nothing: an optimizer whose step was interrupted says so, and goes on from a checkpoint only."""

from __future__ import annotations

from torch.optim import Optimizer


class Whole(Optimizer):
    """An optimizer that knows whether a step of it was interrupted.

    Attributes:
        _torn: set before a step changes the first of weights, states and gradients, cleared after it has changed the
            last. So it costs nothing, and whatever is raised in between leaves it set.
    """

    _torn = False

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
