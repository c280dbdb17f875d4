"""A step is all or nothing: wherever it is interrupted, the next one is right or refused."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from test_load_checks import build, everything
from torch import nn

import ldadam_dist
from ldadam_dist import LDAdamW

PACKAGE = str(Path(ldadam_dist.__file__).parent)
RAISED = (KeyboardInterrupt, torch.OutOfMemoryError)


def backward(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        (param * torch.randn(param.shape, generator=generator)).sum().backward()


def advance(params: list[nn.Parameter], optimizer: LDAdamW, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(params, step)
        optimizer.step()


def interrupted(optimizer: LDAdamW, line: int) -> int:
    """Take a step, which raises at that line of those that it runs in the package; returns how many it ran."""
    ran = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal ran
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            ran += 1
            if ran == line:
                raise RAISED[line % 2]("interrupted")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        optimizer.step()
    except RAISED:
        pass
    finally:
        sys.settrace(before)
    return ran


def whole(params: list[nn.Parameter], optimizer: LDAdamW) -> Any:
    return everything([[param.detach(), optimizer.state[param]] for param in params])


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"error_dtype": "int8"},
        {"state_dtype": "bfloat16", "stochastic_rounding": True, "communication": "gather"},
        {"error_in_grad": True},
        {"capturable": True},
    ],
    ids=str,
)
def test_a_step_that_is_interrupted_anywhere(options: dict[str, Any], taken: int) -> None:
    options = {"window_elements": 1, **options}
    reference, stepped = build(**options)
    advance(reference, stepped, range(taken + 1))
    expected = whole(reference, stepped)

    def at_the_step() -> tuple[list[nn.Parameter], LDAdamW, Any]:
        params, optimizer = build(**options)
        advance(params, optimizer, range(taken))
        saved = copy.deepcopy((optimizer.state_dict(), [param.detach() for param in params]))
        optimizer.zero_grad()
        backward(params, taken)
        return params, optimizer, saved

    lines = interrupted(at_the_step()[1], 0)
    found = []
    for line in range(1, lines, max(1, lines // 9)):
        params, optimizer, (state, weights) = at_the_step()
        interrupted(optimizer, line)
        found.append(optimizer._torn)
        if optimizer._goes_on():
            assert RAISED[line % 2] is torch.OutOfMemoryError
            with pytest.raises(RuntimeError, match="after a step that was interrupted"):
                optimizer.state_dict()
            with pytest.raises(RuntimeError, match="after a step that was interrupted"):
                optimizer.step(lambda: None)  # a closure would make other gradients
            if len(found) % 2:
                params[0].grad.mul_(1)  # written into since
                with pytest.raises(RuntimeError, match="after a step that was interrupted"):
                    optimizer.step()
            else:
                optimizer.step()
                assert whole(params, optimizer) == expected
                continue
        if not optimizer._torn:
            if whole(params, optimizer) != expected:  # else it was interrupted after all was done
                optimizer.step()
            assert whole(params, optimizer) == expected
            continue
        for refused in (optimizer.step, optimizer.state_dict, lambda o=optimizer: copy.deepcopy(o)):
            with pytest.raises(RuntimeError, match=r"after a step that was interrupted.* Resume from a checkpoint"):
                refused()
        with pytest.raises(RuntimeError, match="interrupted"):
            pickle.dumps(optimizer)
        with pytest.raises(ValueError, match="expected 'state'"):
            optimizer.load_state_dict({})
        assert optimizer._torn  # a checkpoint that does not load mends nothing
        for param, weight in zip(params, weights, strict=True):
            param.data.copy_(weight)
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
        backward(params, taken)
        optimizer.step()
        assert whole(params, optimizer) == expected
    assert not found[0]
    assert any(found)


def test_what_fails_before_anything_has_changed_may_be_repeated() -> None:
    params, optimizer = build()
    other, uninterrupted = build()
    advance(params, optimizer, range(2))
    advance(other, uninterrupted, range(3))

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(broken)
    params[0].grad = torch.zeros_like(params[0]).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    params[0].grad = torch.full_like(params[0], torch.nan)
    with pytest.raises(UserWarning, match="skipped this step"):  # warnings are errors here
        optimizer.step()
    advance(params, optimizer, range(2, 3))
    assert all(torch.equal(p, q) for p, q in zip(params, other, strict=True))
    assert optimizer.state_dict()["state"].keys() == {0, 1, 2}
