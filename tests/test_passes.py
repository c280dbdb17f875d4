"""How often a step goes over the elements of a matrix, and what it makes of that size: counted by operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldadam_dist import LDAdamW

M, N, RANK = 96, 160, 4
"""So thin a projection that nothing of rank size has as many elements as the matrix."""


class Passes(TorchDispatchMode):
    """Counts passes over tensors of at least M · N elements.

    Attributes:
        passes: one for each such tensor that an operator reads, and one for each that it writes.
        made: operators that made such a tensor, other than as a view.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in given}
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        writes_in_place = func._schema.is_mutable
        computes = writes_in_place or any(t.untyped_storage().data_ptr() not in storages for t in outputs)
        if computes:  # else a view
            read = {id(t): t for t in given}.values()  # once, also by a product with itself
            self.passes += sum(t.numel() >= M * N for t in read) + sum(t.numel() >= M * N for t in outputs)
            if not writes_in_place:
                self.made += [str(func) for t in outputs if t.numel() >= M * N]
        return result


def passes(steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> Passes:
    """Of the last step."""
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(M, N, generator=generator).to(dtype))
    optimizer = LDAdamW([param], rank=RANK, **options)
    for _ in range(steps):
        param.grad = torch.randn(M, N, generator=generator).to(dtype)
        with Passes() as counted:
            optimizer.step()
    return counted


@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_a_step_goes_over_the_matrix_twelve_times_and_makes_none(proj_type: str) -> None:
    """1 the check of the gradient; 3 A = E + G; 1 the size of A, which tells directions from rounding; 3 the products
    with A; 2 the error's update; 2 the weight's."""
    counted = passes(proj_type=proj_type)
    assert (counted.passes, counted.made) == (12, [])


def test_without_error_feedback_the_gradient_is_only_read() -> None:
    """1 the check; 1 the size; 3 the products; 2 the weight's update."""
    counted = passes(error_feedback=False)
    assert (counted.passes, counted.made) == (7, [])


def test_the_first_step_makes_none_either() -> None:
    """The randomised subspace iteration reads A twice an iteration, and once before."""
    counted = passes(steps=1, projector_init="randomized")
    assert [name for name in counted.made if "zeros" not in name] == []  # but for the error itself


@pytest.mark.parametrize("proj_type", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": True}, {"error_dtype": "int4"}], ids=str)
def test_of_what_is_stored_narrower_only_a_is_made(
    proj_type: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are changed by parts, and errors encoded so; the parts are made smaller here, as the matrix is small."""
    monkeypatch.setattr("ldadam_dist.rounding.CHUNK", M * N // 8)
    counted = passes(dtype=torch.bfloat16, proj_type=proj_type, **options)
    assert len(counted.made) == 1, counted.made
