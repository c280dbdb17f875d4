"""capturable: steps of which the host sees nothing, so that a CUDA graph can hold them.

The host decides what must be known when a graph is captured: which parameters have a gradient, and that all of these
have been stepped before, so that every matrix has its projector. What differs from replay to replay stays on the
device: the number of the step, and whether the gradients are usable. A step that is skipped is computed all the same,
with zeros in the place of the gradients, and leaves what was there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.adamw import step_vectors
from ldadam_dist.entries import NONZERO, Entry
from ldadam_dist.gradients import largest_gradient
from ldadam_dist.in_grad import ErrorInGrad
from ldadam_dist.lowrank import OnDevice, step_matrices
from ldadam_dist.separate import is_fake


class Capturable(ErrorInGrad):
    """What `LDAdamW` does with capturable=True; without it nothing but an optimizer.

    Args:
        params, error_in_grad: as `ErrorInGrad`.
        defaults: with "capturable".
    """

    _step: Callable[[list[Entry]], None]

    def __init__(self, params: Any, defaults: dict[str, Any], error_in_grad: bool) -> None:
        if defaults["capturable"] and error_in_grad:
            raise ValueError(
                "capturable=True with error_in_grad=True: what is written into gradients is watched by the host, which "
                "sees nothing of a graph's replays. Leave one of the two out."
            )
        self._skipped = 0
        self._skipped_unseen: Tensor | None = None
        self._started: dict[int, Tensor] = {}
        super().__init__(params, defaults, error_in_grad)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds."""
        return {**super().__getstate__(), "_skipped": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer; `load_state_dict` ends here too."""
        super().__setstate__(state)
        for name, start in (("_skipped", 0), ("_skipped_unseen", None), ("_started", {})):
            self.__dict__.setdefault(name, start)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far because of a gradient. With capturable=True, to read it is to wait for the device."""
        return self._skipped + (0 if self._skipped_unseen is None else int(self._skipped_unseen))

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._skipped = count
        if self._skipped_unseen is not None:
            self._skipped_unseen.zero_()

    def _check_fits(self, entry: Entry) -> None:
        """Raise ValueError if steps of a parameter cannot be captured, or its error cannot be its gradient."""
        super()._check_fits(entry)
        if entry.group["capturable"] != self.defaults["capturable"]:
            raise ValueError(
                f"capturable={entry.group['capturable']!r} in the group of parameter {entry.name}: a step is captured "
                f"as a whole. Set it for the optimizer, LDAdamW(..., capturable=True)."
            )
        if not self.defaults["capturable"] or not entry.param.requires_grad:
            return
        found = None
        device = self.param_groups[0]["params"][0].device
        if entry.adapter.sharded or entry.adapter.groups:
            found = f"lies on {entry.adapter.describe()}: expected no other process to ask"
        elif entry.param.device != device:
            found = f"is on {entry.param.device} and others are on {device}: expected one device"
        elif isinstance(entry.group["lr"], Tensor) and entry.group["lr"].device != device:
            found = f"has lr on {entry.group['lr'].device}, where a graph does not read it: expected it on {device}"
        elif entry.group["metrics_every"]:
            found = f"has metrics_every={entry.group['metrics_every']}: expected 0, as the host decides what to measure"
        elif entry.matrices is None and not entry.param.is_contiguous():
            found = "is not contiguous: expected what torch's fused AdamW steps"
        elif entry.matrices is not None and entry.group["proj_method"] != "power_iteration":
            found = f"has proj_method={entry.group['proj_method']!r}: expected 'power_iteration', which needs no host"
        elif entry.matrices is not None and entry.param.dtype == torch.float64 and device.type == "cuda":
            found = "has dtype torch.float64, in which the host looks at projectors: expected float32 or bfloat16"
        if found:
            raise ValueError(f"parameter {entry.name} with capturable=True {found}. Build LDAdamW without capturable.")

    def _take_step(self, entries: list[Entry]) -> None:
        """Step as the host sees it, or as it does not."""
        if not self.defaults["capturable"] or any(is_fake(entry.param) for entry in entries):
            self._step(entries)
        elif self._unseen(entries):
            self._step_unseen(entries)
        else:
            self._step(entries)
            self._look_for_started(entries)

    def _unseen(self, entries: Sequence[Entry]) -> bool:
        """Whether all that have a gradient have been stepped before, so that the host need not see this step.

        Raises:
            RuntimeError: they have not, and the step is being captured.
        """
        new = [entry for entry in entries if entry.param.grad is not None and not self._has_started(entry)]
        if new and _capturing():
            raise RuntimeError(
                f"parameter {new[0].name} is first stepped while a CUDA graph is captured: expected a step before, "
                f"in which the host sees where it starts. Take a step with gradients that are not zero, then capture."
            )
        self._look_for_started(new)
        return all(map(self._has_started, new))

    def _look_for_started(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            step = self.state.get(entry.param, {}).get("step")
            if step is not None and bool((step > 0).all()):
                self._started[id(entry.param)] = step
                if self._skipped_unseen is None:  # here, as no graph is captured now: it would make it anew each time
                    self._skipped_unseen = torch.zeros((), dtype=torch.int64, device=step.device)

    def _has_started(self, entry: Entry) -> bool:
        step = self._started.get(id(entry.param))
        return step is not None and step is self.state.get(entry.param, {}).get("step")

    def _step_unseen(self, entries: Sequence[Entry]) -> None:
        """Step what has a gradient; nothing is read from the device."""
        moving = [entry for entry in entries if entry.param.grad is not None]
        if not moving:
            return
        for entry in moving:
            entry.state, entry.local_grad = self.state[entry.param], entry.adapter.grad(entry.param)
            if entry.matrices is None:
                entry.local_grad = entry.grad.contiguous()
            entry.statuses = [NONZERO] * entry.number
        matrices = [entry for entry in moving if entry.matrices is not None]
        windows = self._windows(matrices)
        usable, nonzero = _usable(moving)
        self._torn = not _capturing()  # what is captured has not run yet
        step_vectors((entry for entry in moving if entry.matrices is None), usable)
        step_matrices(matrices, windows, OnDevice(usable, [usable & nonzero[id(e)] for e in matrices]))
        assert self._skipped_unseen is not None
        self._skipped_unseen += usable.logical_not()
        self._torn = False


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _usable(entries: Sequence[Entry]) -> tuple[Tensor, dict[int, Tensor]]:
    """What `gradients.inspect_gradients` would find, on the device: whether all gradients are usable, bool (); and for
    each entry's id, whether the gradient of each of its matrices is anything but zero, bool (number,)."""
    grads: dict[tuple[torch.dtype, float], list[tuple[Entry, Tensor]]] = {}
    for entry in entries:
        limit = largest_gradient(entry.param.dtype) if entry.matrices else math.inf
        if entry.grad.numel():
            some = grads.setdefault((entry.grad.dtype, limit), [])
            some += [(entry, grad) for grad in (entry.grad if entry.stacked else [entry.grad])]
    device = entries[0].param.device
    usable = torch.ones((), dtype=torch.bool, device=device)
    nonzero: dict[int, list[Tensor]] = {id(entry): [] for entry in entries}
    for (_, limit), some in grads.items():
        norms = torch.stack(torch._foreach_norm([grad for _, grad in some], math.inf))
        usable = usable & (norms < limit).all()
        for (entry, _), moved in zip(some, (norms > 0).unbind(), strict=True):
            nonzero[id(entry)].append(moved)
    return usable, {of: torch.stack(each) for of, each in nonzero.items() if each}
