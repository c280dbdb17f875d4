"""Stacked experts, convolutions and other parameters of more than two dimensions: selection, table and checks."""

import copy

import pytest
import torch
from architectures import ConvNet, Custom, GroupedExperts, gpt_oss, mixtral, qwen3_moe
from test_param_groups import linears, others, projected, rule_of
from torch import nn

from ldadam_dist import LDAdamW, arguments, build_param_groups, describe
from ldadam_dist.rules import state_shapes

RANK = 4
STACKS = {f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")}
MATRIX = {"step": (), "projector": (12, 4), "exp_avg": (4, 20), "exp_avg_sq": (4, 20)}
CONVOLUTIONS = {"stem.weight", "sequence.weight", "up.weight"}


def flattened(groups):
    return {name for group in groups if group.get("flatten") for name, _ in group["params"]}


def cells(table, name):
    """Side, rank and state of one parameter's line."""
    line = next(line for line in table.splitlines() if line.startswith(name + " "))
    return line.partition("LDAdamW")[2].split()[:4]


def kib(state_bytes):
    return f"{state_bytes / 1024:.1f}", "KiB"


# Experts


@pytest.mark.parametrize("model", [mixtral, qwen3_moe, gpt_oss])
def test_experts_of_transformers_are_projected_and_their_routers_and_biases_not(model):
    model = model()
    groups = build_param_groups(model, rank=RANK)
    assert projected(groups) == linears(model, "lm_head") | STACKS
    assert not flattened(groups)
    routers = {name for name, _ in model.named_parameters() if "gate.weight" in name or "router.weight" in name}
    assert len(routers) == 2
    assert routers <= others(groups)


def test_biases_of_experts_have_no_decay_and_are_not_meant_by_the_name_of_the_experts():
    model = gpt_oss()
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    groups = build_param_groups(model, rank=RANK, include=["experts"])
    assert projected(groups) == STACKS
    assert name in {name for name, _ in groups[-1]["params"]}
    assert groups[-1]["weight_decay"] == 0.0
    assert rule_of(model, name, rank=RANK) == "AdamW: bias"
    assert projected(build_param_groups(model, rank=RANK, include=[name])) == {name}


class MoEViT(nn.Module):
    """Positions of a model whose name says that it has experts."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 16, 16))


class Qwen3MoeTable(nn.Module):
    """A class of a family of mixtures, which is none itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 16))


class OwnExperts(GroupedExperts):
    pass


Derived = type("Feedforward", (OwnExperts,), {})
GroupedMLP = type("GroupedMLP", (Qwen3MoeTable,), {})


@pytest.mark.parametrize(
    ("name", "module", "weights"),
    [
        ("ffn", GroupedExperts(), {"ffn.w1", "ffn.w2"}),
        ("ffn", Derived(), {"ffn.w1", "ffn.w2"}),  # a base class says it
        ("experts", GroupedMLP(), {"experts.weight"}),  # the module's name says it
        ("block_sparse_moe", GroupedMLP(), {"block_sparse_moe.weight"}),
        ("ffn", GroupedExperts(number=1), set()),
        ("ffn", MoEViT(), set()),
        ("ffn", Qwen3MoeTable(), set()),
        ("ffn", nn.Bilinear(16, 16, 16), set()),
    ],
)
def test_what_makes_a_stack_of_experts(name, module, weights):
    model = nn.ModuleDict({name: module, "proj": nn.Linear(16, 16)})
    assert projected(build_param_groups(model, rank=RANK)) == weights | {"proj.weight"}


def test_matrices_of_a_stack_must_be_larger_than_the_rank_not_their_number():
    model = nn.ModuleDict({"experts": GroupedExperts(number=3, dim=8, hidden=24), "proj": nn.Linear(16, 16)})
    assert projected(build_param_groups(model, rank=8)) == {"proj.weight"}
    assert rule_of(model, "experts.w1", rank=8) == "AdamW: rank 8 ≥ 8"
    assert "experts.w1" in projected(build_param_groups(model, rank=7))
    message = r"rank=8 does not fit parameter 'experts.w1' of shape \(3, 24, 8\).* of 24 × 8 keeps fewer than 8"
    with pytest.raises(ValueError, match=message):
        build_param_groups(model, rank=8, include=["experts"])
    with pytest.raises(ValueError, match=r"nothing .* largest matrix is 'proj.weight' of shape \(16, 16\)"):
        build_param_groups(model, rank=16)


def test_other_parameters_of_three_dimensions_are_stacks_by_name_only():
    assert rule_of(Custom(), "experts", rank=RANK) == "AdamW: 3-D"
    assert projected(build_param_groups(Custom(), rank=RANK, include=["experts"])) == {"experts"}
    groups = build_param_groups(ConvNet(), rank=RANK, include=[".*", "bilinear"])
    assert projected(groups) == {"proj.weight", "bilinear.weight"}
    assert not flattened(groups)


# Convolutions


def test_convolutions_are_projected_when_asked_for():
    model = ConvNet()
    assert projected(build_param_groups(model, rank=RANK)) == {"proj.weight"}
    groups = build_param_groups(model, rank=RANK, convolutions=True, weight_decay=0.1)
    assert projected(groups) == {"proj.weight"} | CONVOLUTIONS
    assert flattened(groups) == CONVOLUTIONS
    assert [(g["enable_lowrank"], g.get("flatten")) for g in groups] == [
        (True, None),
        (True, True),
        (False, None),
        (False, None),
    ]
    assert rule_of(model, "depthwise.weight", rank=RANK, convolutions=True) == "AdamW: rank 4 ≥ 3"


@pytest.mark.parametrize("name", ["stem", "stem.weight"])
def test_one_convolution_is_projected_by_name(name):
    groups = build_param_groups(ConvNet(), rank=RANK, include=[name])
    assert projected(groups) == flattened(groups) == {"stem.weight"}
    with pytest.raises(ValueError, match=r"'depthwise.weight' of shape \(8, 1, 3\).* of 8 × 3 keeps fewer than 3"):
        build_param_groups(ConvNet(), rank=RANK, include=["depthwise"])


def test_a_model_of_convolutions_alone_is_told_how_to_project_them():
    with pytest.raises(ValueError, match=r"'weight' of shape \(8, 9, 3, 3\).*\(convolution\).*convolutions=True"):
        build_param_groups(nn.Conv2d(9, 8, 3), rank=RANK)


# Table


def test_bytes_of_stacks_and_convolutions():
    model = nn.ModuleDict({"experts": GroupedExperts(3, 16, 24), "net": ConvNet()})
    groups = build_param_groups(model, rank=RANK, convolutions=True)
    expected = {
        # 3 × (24, 16): the columns are projected; an error of the parameter's size besides
        "experts.w1": ("columns", "4", *kib(4 * 3 * (16 * 4 + 2 * 4 * 24 + 24 * 16))),
        "experts.w2": ("rows", "4", *kib(4 * 3 * (16 * 4 + 2 * 4 * 24 + 24 * 16))),
        "net.stem.weight": ("rows", "4", *kib(4 * (8 * 4 + 2 * 4 * 75 + 8 * 75))),  # 3 · 5 · 5 columns
        "net.sequence.weight": ("rows", "4", *kib(4 * (16 * 4 + 2 * 4 * 24 + 16 * 24))),  # 8 · 3
        "net.up.weight": ("rows", "4", *kib(4 * (8 * 4 + 2 * 4 * 54 + 8 * 54))),  # 8 input channels, 6 · 3 · 3
    }
    for table in (
        describe(model, rank=RANK, convolutions=True),
        describe(groups),
        describe(LDAdamW(copy.deepcopy(groups))),
    ):
        assert {name: tuple(cells(table, name)) for name in expected} == expected
        assert " 3 × 24 × 16 " in table
        assert " 8 × 3 × 5 × 5 " in table


def test_groups_without_flatten_tell_why():
    stack, kernel = nn.Parameter(torch.randn(3, 4, 9)), nn.Parameter(torch.randn(8, 8, 3, 3))
    table = describe([{"params": [("stack", stack), ("kernel", kernel)], "rank": 4}])
    assert "AdamW: rank 4 ≥ 4" in table
    assert "AdamW: 4-D" in table
    assert "LDAdamW  0 parameters" in table


# Checks of the optimizer's arguments


def group(**changes):
    settings = LDAdamW([nn.Parameter(torch.randn(8, 8))], rank=RANK).param_groups[0]
    return {**settings, "params": [], **changes}


def states(shape, **changes):
    """Shapes of the state that LDAdamW keeps of a stack (3, 12, 20), as tensors."""
    shapes = {"step": (3,), "projector": (3, 12, 4), "exp_avg": (3, 4, 20), "exp_avg_sq": (3, 4, 20), "error": shape}
    return {key: torch.zeros(size) for key, size in {**shapes, **changes}.items() if size is not None}


def check_state(name, shape, now, saved_group, saved):
    arguments.check_state(name, now, saved_group, saved, state_shapes(shape, now), sharded=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flatten": 1}, "flatten=1: expected True or False"),
        ({"communication": "low_rank"}, r"communication='low_rank': expected one of .*Did you mean 'lowrank'\?"),
    ],
)
def test_group_settings_are_checked(options, message):
    arguments.check_group(group())
    with pytest.raises(ValueError, match=message):
        arguments.check_group(group(**options))


def test_a_rank_must_fit_the_matrices():
    stack, kernel = nn.Parameter(torch.randn(9, 9, 4)), nn.Parameter(torch.randn(9, 4, 3, 3))
    with pytest.raises(ValueError, match=r"rank=4 .* \(9, 9, 4\): a projection of 9 × 4 keeps fewer than 4"):
        arguments.check_params([("stack", stack)], group(), low_rank_required=True)
    arguments.check_params([("kernel", kernel)], group(rank=9), low_rank_required=True)
    with pytest.raises(ValueError, match=r"rank=9 .* \(9, 4, 3, 3\): a projection of 9 × 36 keeps fewer than 9"):
        arguments.check_params([("kernel", kernel)], group(rank=9, flatten=True), low_rank_required=True)


def test_something_must_be_projected():
    stack, kernel = nn.Parameter(torch.randn(9, 9, 4)), nn.Parameter(torch.randn(9, 4, 3, 3))
    arguments.check_projects([("kernel", kernel, group(flatten=True))])
    with pytest.raises(ValueError, match=r"largest matrix is stack of shape \(9, 9, 4\)"):
        arguments.check_projects([("kernel", kernel, group()), ("stack", stack, group())])
    with pytest.raises(ValueError, match="none of its 1 parameters is a matrix"):
        arguments.check_projects([("kernel", kernel, group())])


def test_the_rank_of_a_stack_is_fixed():
    arguments.check_unchanged("stack", True, group(), {"projector": torch.zeros(3, 12, 4)})
    with pytest.raises(ValueError, match="has a projector of rank 4, its group now asks for 5"):
        arguments.check_unchanged("stack", True, group(rank=5), {"projector": torch.zeros(3, 12, 4)})


@pytest.mark.parametrize(
    ("shape", "settings", "state"),
    [
        ((3, 12, 20), {}, {}),
        ((3, 12, 20), {}, {"error": None}),
        ((3, 20, 12), {}, {}),
        ((12, 20), {}, MATRIX),
        ((12, 4, 5), {"flatten": True}, MATRIX | {"error": (12, 20)}),
        ((12, 2, 2, 5), {"flatten": True}, MATRIX | {"error": (12, 20)}),
        ((3, 12, 4), {}, {"step": (), "projector": None, "exp_avg": (3, 12, 4), "exp_avg_sq": (3, 12, 4)}),
    ],
)
def test_states_that_fit(shape, settings, state):
    saved = states(shape, **state)
    check_state("param", shape, group(**settings), group(**settings), saved)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"step": ()}, r"saved 'step' of parameter experts is \(\): expected \(3,\)"),
        ({"step": None}, r"saved 'step' .* is nothing: expected \(3,\)"),
        ({"projector": (12, 4)}, r"'projector' .* is \(12, 4\): expected \(3, 12, 4\)"),
        ({"exp_avg": (3, 4, 12)}, r"'exp_avg' .* expected \(3, 4, 20\)"),
        ({"error": (12, 20)}, r"'error' .* expected \(3, 12, 20\)"),
    ],
)
def test_states_that_do_not_fit(state, message):
    saved = states((3, 12, 20), **state)
    with pytest.raises(ValueError, match=message):
        check_state("experts", (3, 12, 20), group(), group(), saved)


def test_a_state_that_was_flattened_otherwise_is_refused():
    shape, now, saved_group = (12, 12, 20), group(), group(flatten=True)
    with pytest.raises(ValueError, match="was saved with flatten=True, this optimizer has flatten=False"):
        check_state("conv", shape, now, saved_group, {})
    del saved_group["flatten"]  # as before there was such a setting
    check_state("conv", shape, now, saved_group, {})
