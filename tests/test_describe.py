"""describe and the rules behind it: the table's lines, its bytes, and which side is projected."""

import re

import pytest
import torch
from architectures import llama
from torch import nn

from ldadam_dist import LDAdamW, build_param_groups, describe
from ldadam_dist.rules import is_low_rank, oriented_shape, projected_side

RANK = 4


@pytest.mark.parametrize(
    ("dtype", "options", "state"),
    [
        # 48 × 32, so std projects 32 columns: projector 32·4 + moments 2·4·48 = 512 elements; error 48·32 = 1536
        (torch.float32, {}, 512 * 4 + 1536 * 4),
        (torch.float64, {}, 512 * 8 + 1536 * 8),
        (torch.bfloat16, {}, 512 * 4 + 1536 * 2),
        (torch.float16, {}, 512 * 4 + 1536 * 4),
        (torch.float32, {"error_dtype": "bfloat16"}, 512 * 4 + 1536 * 2),
        (torch.float32, {"error_feedback": False}, 512 * 4),
        (torch.float32, {"error_feedback": False, "proj_type": "left"}, (48 * 4 + 2 * 4 * 32) * 4),
    ],
)
def test_bytes_of_state(dtype, options, state):
    model = nn.Linear(32, 48, bias=False, dtype=dtype)
    adamw = 2 * 48 * 32 * dtype.itemsize
    kib, percent = f"{state / 1024:.1f} KiB", f"{100 * state / adamw:.1f} %"
    for target in (model, build_param_groups(model, rank=RANK)):
        table = describe(target, **options, **({"rank": RANK} if target is model else {}))
        line = next(line for line in table.splitlines() if line.startswith("weight"))
        assert line.split() == [
            *("weight", "48", "×", "32", "LDAdamW"),
            "rows" if options.get("proj_type") == "left" else "columns",
            *(str(RANK), *kib.split(), *percent.split()),
        ]


def test_alike_layers_share_a_line():
    model = llama()
    table = describe(model, rank=RANK)
    assert "model.layers.*.mlp.up_proj.weight × 2" in table
    assert "layers.0" not in table
    assert len(describe(model, rank=RANK, verbose=True).splitlines()) == len(list(model.parameters())) + 6
    assert re.search(r"^total +21 parameters, 21,664 elements", table, re.MULTILINE)


def test_groups_and_optimizers_are_described_with_their_own_settings():
    model = llama()
    optimizer = LDAdamW(build_param_groups(model, rank=RANK), lr=1e-3, proj_type="right", error_feedback=False)
    table = describe(optimizer)
    assert "columns" in table
    assert "rows" not in table
    assert table == describe(build_param_groups(model, rank=RANK), proj_type="right", error_feedback=False)
    assert describe(torch.optim.AdamW(model.parameters())).count("LDAdamW") == 1  # only in the totals, as 0
    with pytest.raises(TypeError, match="rank: only a model takes these"):
        describe(optimizer, rank=8)
    with pytest.raises(TypeError, match="expected a model, an optimizer or a list of group dicts"):
        describe(model.parameters())
    with pytest.raises(ValueError, match="nothing to describe"):
        describe(nn.Identity())


# Rules


@pytest.mark.parametrize(
    ("shape", "proj_type", "side"),
    [
        ((4, 8), "std", "left"),
        ((8, 4), "std", "right"),
        ((4, 4), "std", "left"),
        ((4, 8), "reverse_std", "right"),
        ((8, 4), "reverse_std", "left"),
        ((4, 4), "reverse_std", "left"),
        ((4, 8), "right", "right"),
        ((8, 4), "left", "left"),
    ],
)
def test_projected_side(shape, proj_type, side):
    assert projected_side(shape, proj_type) == side
    assert oriented_shape(shape, proj_type) == (shape if side == "left" else shape[::-1])


def test_rules_refuse_and_decline():
    with pytest.raises(ValueError, match="proj_type='up' is unknown"):
        projected_side((2, 3), "up")
    with pytest.raises(ValueError, match=r"only a matrix .* found shape \(2, 3, 4\)"):
        projected_side((2, 3, 4), "std")
    assert is_low_rank((5, 9), 4)
    assert not is_low_rank((4, 9), 4)
    assert not is_low_rank((5, 9), 4, enable_lowrank=False)
    assert is_low_rank((2, 5, 9), 4)
    assert not is_low_rank((9, 9, 4), 4)
    assert is_low_rank((9, 9, 4), 4, flatten=True)
    assert not is_low_rank((5, 9, 9, 9), 4)
    assert is_low_rank((5, 1, 3, 3), 4, flatten=True)
