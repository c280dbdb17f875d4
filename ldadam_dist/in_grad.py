"""error_in_grad: the error of a matrix lies in `param.grad`, so that backward itself forms A = G + E.

After a step the error is `state["error"]` and, with the same storage, `param.grad`. Backward accumulates the gradient
into it, which saves the gradient's own memory and an addition. `error_buffers` sees to it that nothing else does.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldadam_dist.entries import UNUSABLE, Entry
from ldadam_dist.error_buffers import Buffer, Buffers
from ldadam_dist.located import Located
from ldadam_dist.replicas import Replicas
from ldadam_dist.rules import QUANTIZED, global_shape, low_rank_matrices, stored_error_dtype
from ldadam_dist.separate import is_fake

_WHAT_TO_DO = (
    "With error_in_grad=True nothing but backward may write into a gradient: clip with ldadam_dist.clip_grad_norm_, "
    "reset with optimizer.zero_grad(), divide the loss instead of gradients, scale no loss, and give DDP "
    "gradient_as_bucket_view=False; or build LDAdamW without error_in_grad. Nothing was stepped, but errors may be "
    "spoilt: go on from a checkpoint."
)

_WITHOUT = "Build LDAdamW without error_in_grad, or set enable_lowrank=False for its group."


class ErrorInGrad(Located):
    """What `LDAdamW` does with error_in_grad=True; without it nothing but an optimizer.

    Args:
        params, defaults: as `torch.optim.Optimizer`.
        error_in_grad: whether errors lie in the gradients.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], error_in_grad: bool) -> None:
        self.error_in_grad, self._apart = error_in_grad, False
        super().__init__(params, defaults)
        self._start()

    def _start(self) -> None:
        self._buffers = Buffers()
        if self.error_in_grad:
            self.register_load_state_dict_pre_hook(_check_saved)
            self.register_load_state_dict_post_hook(_take_loaded)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: the errors, and no gradients."""
        return {**super().__getstate__(), "error_in_grad": self.error_in_grad, "_apart": self._apart}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer; `load_state_dict` ends here too."""
        super().__setstate__(state)
        self.__dict__.setdefault("error_in_grad", False)
        self.__dict__.setdefault("_apart", False)
        if "_buffers" not in self.__dict__:
            self._start()
            for param, kept in self.state.items():
                if self.error_in_grad and isinstance(param, Tensor) and "error" in kept:
                    param.grad = None  # a copied tensor, unlike a copied nn.Parameter, has a copy of the error there

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by `torch.amp.GradScaler` before it divides gradients or skips a step."""
        if self.error_in_grad:
            raise RuntimeError(
                "GradScaler found LDAdamW with error_in_grad=True: expected no scaled loss, as gradients are "
                "accumulated into errors that are not scaled. Train in bfloat16 or float32, which need no scaling, or "
                "build LDAdamW without error_in_grad."
            )
        if not self.replicas.averaged:
            raise RuntimeError(
                "GradScaler found LDAdamW with gradient_sync='lowrank': expected no scaled loss, as each replica would "
                "decide by its own gradients whether to skip the step. Train in bfloat16 or float32, or with "
                "gradient_sync='full'."
            )
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients as `torch.optim.Optimizer.zero_grad`; with error_in_grad errors stay in `param.grad`.

        A gradient that has been accumulated into an error and was not stepped stays in it, with a warning: it cannot be
        taken out, and error feedback applies it later.
        """
        stay = [buffer.name for buffer in self._buffers if buffer.pending or buffer.counted]
        for buffer in self._buffers:
            buffer.withdraw()
        super().zero_grad(set_to_none)
        for buffer in self._buffers:
            buffer.put()
            buffer.pending = 0
        if stay:
            _warn_dropped(stay)

    def keep_gradients_apart(self) -> None:
        """From now on gradients are not accumulated into the errors, but added at the step: `clip_grad_norm_` calls it.

        Raises:
            RuntimeError: gradients have been accumulated into errors; nothing has changed then.
        """
        if not self.error_in_grad or self._apart:
            return
        self._buffers.check()
        for buffer in self._buffers:
            if buffer.problem:
                raise RuntimeError(_refusal(buffer))
            if buffer.pending:
                raise RuntimeError(
                    f"the gradient of {buffer.name} has already been accumulated into its error, and cannot be clipped "
                    f"by itself: expected clip_grad_norm_ before the first step too. Where clipping begins later, call "
                    f"optimizer.keep_gradients_apart() before the backward."
                )
        self._buffers.release()
        self._apart = True

    def _check_fits(self, entry: Entry) -> None:
        """Raise ValueError if the error of a parameter cannot be its gradient."""
        if not self.error_in_grad or entry.matrices is None or not entry.param.requires_grad:
            return
        _check_settings(entry.name, entry.param.dtype, entry.group)
        grad_dtype = getattr(entry.param, "grad_dtype", None)  # torch 2.10 and later
        if grad_dtype not in (None, entry.param.dtype):
            raise ValueError(
                f"parameter {entry.name} of {entry.param.dtype} has grad_dtype={grad_dtype}: with error_in_grad=True "
                f"expected one dtype, as the error is the gradient. {_WITHOUT}"
            )
        if entry.adapter.copies > 1:
            raise ValueError(
                f"parameter {entry.name} lies on {entry.adapter.describe()}: with error_in_grad=True expected no "
                f"replicas, each of which has a slice of the error and all of the gradient. {_WITHOUT}"
            )
        if entry.param.device.type not in (entry.adapter.device.type, "meta"):
            raise ValueError(
                f"parameter {entry.name} is offloaded to {entry.param.device.type}: with error_in_grad=True expected "
                f"it on {entry.adapter.device.type}, where it is stepped. {_WITHOUT}"
            )

    @contextlib.contextmanager
    def _errors_taken(self, entries: Sequence[Entry]) -> Iterator[None]:
        """Around a step: tells entries whether A is in their error already, and makes the errors gradients again."""
        if not self.error_in_grad:
            yield
            return
        matrices = [(entry, self._buffers.of(entry.param)) for entry in entries if entry.matrices is not None]
        for entry, buffer in matrices:
            if buffer is None:
                self._check_fits(entry)  # it may have been swapped since construction
        self._buffers.check()
        stay, empty = [], []
        for entry, buffer in matrices:
            if buffer is None:
                continue
            if buffer.in_place and not buffer.pending:  # there is no gradient
                buffer.withdraw()
                empty.append(buffer)
            if buffer.pending and not buffer.in_place:
                stay.append(buffer.name)
                if not buffer.apart and entry.param.grad is not None:
                    buffer.problem = buffer.problem or "was replaced by another tensor after a backward"
            entry.accumulated = buffer.in_place or entry.param.grad is None
            if buffer.problem:
                entry.refusal = RuntimeError(_refusal(buffer))
        try:
            yield
        except BaseException:
            for buffer in empty:
                buffer.put()
            raise
        self._torn = True  # until all gradients that were stepped are dropped
        for entry, buffer in matrices:
            if self._apart:
                entry.param.grad = None
            elif buffer is not None or is_fake(entry.state["step"]) or bool(entry.state["step"].any()):
                self._buffers.link(entry)
        self._buffers.remember()
        self._torn = False
        if stay:
            _warn_dropped(stay)

    def _forget_unusable(self, entries: Sequence[Entry]) -> str:
        """Errors with an unusable gradient in them start again from zero. Returns what has changed, in words."""
        lost, mixed = [], [entry for entry in entries if entry.accumulated]
        for entry in mixed:
            if UNUSABLE not in entry.statuses:
                continue
            lost.append(entry.name)
            error, (start, stop) = entry.adapter.local(entry.state["error"]), entry.held
            for matrix, status in zip(error if entry.stacked else [error], entry.statuses[start:stop], strict=True):
                if status == UNUSABLE:
                    matrix.zero_()
        if not any(entry.local_grad is not None for entry in mixed):
            return "No weight or state has changed."
        return (
            f"No weight has changed. Errors that start again from zero: {', '.join(lost) or 'none here'}; the other "
            f"gradients stay in their errors, and are applied later."
        )


def refuse_replicas(error_in_grad: object, replicas: Replicas) -> None:
    """Raise ValueError for error_in_grad with replicas, or if it is neither True nor False."""
    if not isinstance(error_in_grad, bool):
        raise ValueError(f"error_in_grad={error_in_grad!r}: expected True or False.")
    if error_in_grad and replicas.group is not None:
        raise ValueError(
            "error_in_grad=True with process_group= or replicate_mesh=: gradients of replicas do not lie where their "
            "errors do, or may be averaged with them. Leave one of the two out."
        )


def _check_settings(name: str, dtype: torch.dtype, group: Mapping[str, Any]) -> None:
    found = None
    if not group.get("error_feedback", True):
        found = "error_feedback=False, and so no error to keep in its gradient"
    elif dtype == torch.float16:
        found = "dtype torch.float16, which an accumulated error may overflow; use bfloat16"
    elif group.get("error_dtype") in QUANTIZED or stored_error_dtype(dtype, group.get("error_dtype")) != dtype:
        found = f"dtype {dtype} and error_dtype={group['error_dtype']!r}, where one tensor has one dtype"
    if found:
        raise ValueError(f"parameter {name} with error_in_grad=True has {found}. {_WITHOUT}")


def _check_saved(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Before a state is loaded, which brings its settings along, but for how errors are stored."""
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for param in group["params"]:
            if low_rank_matrices(global_shape(param), group):
                _check_settings("of the saved state", param.dtype, {**saved, "error_dtype": group["error_dtype"]})


def _take_loaded(optimizer: Optimizer) -> None:
    """After a state was loaded: no gradient is an error of before, and errors are fit to be gradients."""
    assert isinstance(optimizer, ErrorInGrad)
    optimizer._buffers.release()
    for param, kept in optimizer.state.items():
        if isinstance(param, Tensor) and "error" in kept:
            kept["error"] = kept["error"].to(param.dtype).contiguous()


def _refusal(buffer: Buffer) -> str:
    return f"the buffer of error and gradient of {buffer.name} {buffer.problem}. {_WHAT_TO_DO}"


def _warn_dropped(names: Sequence[str]) -> None:
    warnings.warn(
        f"gradients that were not stepped stay in the errors of {', '.join(names[:4])}"
        f"{' and others' if len(names) > 4 else ''}: with error_in_grad=True they cannot be taken out, and error "
        f"feedback applies them later.",
        stacklevel=3,
    )
