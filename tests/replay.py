"""What a CUDA graph does, on a CPU: the operators of a step are recorded, and run again on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "item")
"""Operators whose result the host sees, for which a graph cannot wait."""


class Recording(TorchDispatchMode):
    """Records operators; numbers in their arguments stay as they were, as in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in READS, f"the host reads the result of {func}"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, [t for t in tree_leaves(result) if isinstance(t, Tensor)]))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run them again; each result goes where it was then."""
        for func, args, kwargs, results in self.calls:
            if func.is_view:
                continue
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for old, new in zip(results, again, strict=True):
                if old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def on_device_only(monkeypatch: Any) -> None:
    """Let steps on a CPU do what those on a GPU do."""
    from ldadam_dist import algebra

    monkeypatch.setattr("ldadam_dist.lowrank.CACHED_ELEMENTS", 2**40)
    monkeypatch.setattr("ldadam_dist.step.orthonormalize", algebra.cholesky_basis)


def clones(tensors: Any) -> Any:
    """Copies of all tensors in a structure."""
    return tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, tensors)
