"""The errors that lie in `param.grad` (error_in_grad), and what is written into them.

Anything but backward that writes into such a buffer changes the error, so every buffer is watched. Hooks count what
backward accumulates, and when a backward ends the tensor's version must have grown by just that. But clipping DTensors
and `GradScaler.unscale_` leave versions as they are (seen with torch 2.13 on CPU): so some elements of each buffer are
remembered when a backward ends, and must be the same at the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from ldadam_dist.entries import Entry
from ldadam_dist.separate import is_fake

SAMPLES = 128
"""Elements of each buffer that are remembered, about."""


class Buffer:
    """The error of one parameter in the place of its gradient, and what has been written into it.

    Args:
        entry: the parameter, with its error in its state.
        buffers: all of them.
    """

    def __init__(self, entry: Entry, buffers: Buffers) -> None:
        self.name, self.error = entry.name, entry.state["error"]
        self.grad = entry.adapter.as_grad(self.error, entry.param)
        self.local = entry.adapter.local(self.error)
        self._sharded, self._averaged = entry.adapter.sharded, entry.adapter.averaged_in_backward
        self._param, self._buffers = weakref.ref(entry.param), buffers  # hooks that hold their parameter never die
        self._hooks = (
            entry.param.register_hook(self._before),
            entry.param.register_post_accumulate_grad_hook(self._after),
        )
        self.put()
        self.renew()

    @property
    def param(self) -> Tensor | None:
        """The parameter, if there still is one."""
        return self._param()

    @property
    def in_place(self) -> bool:
        """Whether it is the parameter's gradient just now."""
        param = self._param()
        return param is not None and param.grad is self.grad

    @property
    def version(self) -> int:
        """Grows with every write; backward writes into a DTensor or, under FSDP2, into the tensor in it."""
        return self.local._version + (self.grad._version if self._sharded else 0)

    def put(self) -> None:
        """Make it the parameter's gradient; one that lies apart is dropped."""
        param = self._param()
        if param is not None:
            param.grad = self.grad
        self.apart = False

    def withdraw(self) -> None:
        """Be the parameter's gradient no longer, if it is that."""
        param = self._param()
        if param is not None and param.grad is self.grad:
            param.grad = None

    def renew(self) -> None:
        """Start to watch: what it holds now is the error."""
        self.seen, self.counted, self.pending, self.problem = self.version, 0, 0, ""

    def release(self) -> None:
        """Stop to watch, and be the gradient no longer."""
        for hook in self._hooks:
            hook.remove()
        self.withdraw()

    def settle_backward(self) -> None:
        """Compare what was written during a backward with what backward has accumulated."""
        written, self.seen = self.version - self.seen, self.version
        if written == self.counted + 1 and self._averaged:
            self.counted += 1  # DDP's average, to which other ranks may have given where this one had no gradient
        elif written != self.counted:
            self.problem = f"was written to {written} times while {self.counted} gradients were accumulated into it"
        self.pending, self.counted = self.pending + self.counted, 0

    def _before(self, _: Tensor) -> None:
        """Autograd is about to accumulate; FSDP2, which always does so in place, does not tell."""
        param = self._param()
        if param is None or self.apart:
            return
        if param.grad is None:  # model.zero_grad(): gradients lie apart until the next step
            self.apart = True
        elif param.grad is not self.grad:
            self.problem = "was replaced by another tensor before a backward"
        elif torch.is_grad_enabled():
            self.problem = "met a backward with create_graph=True, which accumulates into a new tensor"

    def _after(self, param: Tensor) -> None:
        if param.grad is self.grad:
            self.counted += 1
            self._buffers.settle_after_backward()
        else:
            self.apart = True


class Buffers:
    """The buffers of all parameters of an optimizer."""

    def __init__(self) -> None:
        self._buffers: dict[int, Buffer] = {}
        self._backwards: set[int] = set()
        self._samples: list[tuple[list[Buffer], list[Tensor], Tensor]] = []

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self._buffers.values())

    def of(self, param: Tensor) -> Buffer | None:
        """The buffer of a parameter, if it has one."""
        buffer = self._buffers.get(id(param))
        return buffer if buffer is not None and buffer.param is param else None

    def link(self, entry: Entry) -> None:
        """Make the error of a parameter its gradient, and watch it from now on."""
        buffer = self.of(entry.param)
        if buffer is not None and buffer.error is entry.state["error"]:
            buffer.put()
            buffer.renew()
            return
        if buffer is not None:
            buffer.release()
        self._buffers[id(entry.param)] = Buffer(entry, self)
        self._samples = []

    def release(self) -> None:
        """Let errors and gradients lie apart."""
        for buffer in self:
            buffer.release()
        self._buffers.clear()
        self._samples = []

    def settle_after_backward(self) -> None:
        """Have everything settled when the backward ends that is running now."""
        backward = torch._C._current_graph_task_id()
        if backward in self._backwards:
            return
        self._backwards.add(backward)
        queue = torch.autograd.Variable._execution_engine.queue_callback

        def settle() -> None:
            self._backwards.discard(backward)
            self.settle_backward()

        queue(lambda: queue(settle))  # after the callbacks of DDP and FSDP2, which are queued by then

    def settle_backward(self) -> None:
        """Settle every buffer, and remember what is in it."""
        for buffer in self:
            buffer.settle_backward()
        self.remember()

    @torch.no_grad()
    def remember(self) -> None:
        """Remember some elements of each buffer."""
        if not self._samples:
            groups: dict[tuple[torch.device, torch.dtype], tuple[list[Buffer], list[Tensor]]] = {}
            for buffer in self:
                buffers, views = groups.setdefault((buffer.local.device, buffer.local.dtype), ([], []))
                buffers.append(buffer)
                views.append(buffer.local.view(-1)[:: max(1, buffer.local.numel() // SAMPLES)])
            self._samples = [(buffers, views, torch.empty(0)) for buffers, views in groups.values()]
        self._samples = [(buffers, views, torch.cat(views)) for buffers, views, _ in self._samples]

    def check(self) -> None:
        """Find out what has been written since the last backward."""
        if any(buffer.counted for buffer in self):  # a backward that raised did not come to its end
            self.settle_backward()
        for buffer in self:
            if buffer.version != buffer.seen:
                buffer.problem = buffer.problem or "was written to after backward"
        for buffers, views, before in self._samples:
            if is_fake(before):
                continue
            after = torch.cat(views)
            if torch.equal(after.view(torch.uint8), before.view(torch.uint8)):  # a NaN equals itself
                continue
            lengths = [len(view) for view in views]
            for buffer, *both in zip(buffers, after.split(lengths), before.split(lengths), strict=True):
                if not torch.equal(*(part.view(torch.uint8) for part in both)):
                    buffer.problem = buffer.problem or "has other values than after backward"
