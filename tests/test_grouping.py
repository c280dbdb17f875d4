"""Groups that do not depend on values, lr_scale, and groups beside others: bare, added, of older checkpoints."""

import pytest
import torch
from architectures import llama
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from ldadam_dist import LDAdamW, build_param_groups, describe

RANK = 4


def test_groups_do_not_depend_on_values():
    model = llama()
    found = [
        [names for group in build_param_groups(model, rank=RANK, **said) for names in [[n for n, _ in group["params"]]]]
        for said in ({}, {"weight_decay": 0.0}, {"weight_decay": 0.1}, {"lr": 1e-3, "lr_other": 1e-3})
    ]
    assert all(names == found[0] for names in found)
    assert len(found[0]) == 3


def test_merged_groups_of_earlier_checkpoints_load():
    def trained(groups):
        optimizer = LDAdamW(groups, lr=1e-2)
        model.zero_grad()
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        return optimizer

    model = nn.Sequential(nn.Linear(8, 9), nn.LayerNorm(9), nn.Linear(9, 12))
    matrices, *others = build_param_groups(model, rank=RANK, weight_decay=0.0, exclude=["2.weight"])
    merged = {**others[0], "params": [pair for group in others for pair in group["params"]]}
    old = trained([matrices, merged])
    new = LDAdamW([matrices, *others], lr=5.0)
    new.load_state_dict(old.state_dict())
    assert [group["lr"] for group in new.param_groups] == [1e-2] * 3
    for param in model.parameters():
        assert torch.equal(new.state[param]["exp_avg"], old.state[param]["exp_avg"])


def test_a_merged_group_in_torchs_flattened_form_loads():
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = llama()
    matrices, *others = build_param_groups(model, rank=RANK, lr=1e-2)
    merged = {**others[0], "params": [pair for group in others for pair in group["params"]]}
    old, new = LDAdamW([matrices, merged]), LDAdamW([matrices, *others])
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    old.step()
    model.zero_grad()  # with gradients torch makes no states to load into
    saved = get_optimizer_state_dict(model, old, options=options)
    set_optimizer_state_dict(model, new, saved, options=options)
    assert [len(group["param_names"]) for group in new.param_groups] == [len(g["params"]) for g in new.param_groups]
    assert len(new.state) == len(old.state)
    for param, state in old.state.items():
        assert torch.equal(new.state[param]["exp_avg"], state["exp_avg"])


def test_lr_other_is_lr_unless_given():
    model = llama()
    assert {g["lr"] for g in build_param_groups(model, rank=RANK, lr=2e-5)} == {2e-5}
    with pytest.raises(ValueError, match=r"lr_other=1\.0 and lr_scale_other=2\.0 both say"):
        build_param_groups(model, rank=RANK, lr_other=1.0, lr_scale_other=2.0)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
def test_lr_scale_is_a_factor_of_every_step_and_survives_one_lr_for_all(lr):
    def trained(**rates):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 9), nn.LayerNorm(9), nn.Linear(9, 12))
        optimizer = LDAdamW(build_param_groups(model, rank=RANK, **rates), eps=1e-2)  # signs of zeros decide nothing
        data = torch.randn(2, 8)
        if "lr_scale_other" in rates:
            for group in optimizer.param_groups:
                group["lr"] = lr * 1  # as nanoGPT's loop does
            assert "× 4" in describe(optimizer)
            optimizer.load_state_dict(optimizer.state_dict())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            model.zero_grad()
            model(data).square().sum().backward()
            optimizer.step()
            scheduler.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(trained(lr=1.0, lr_scale_other=4.0), trained(lr=1e-2, lr_other=4e-2))


def test_checkpoints_without_lr_scale_have_one():
    optimizer = LDAdamW([{"params": [nn.Parameter(torch.ones(8, 9))], "rank": RANK, "lr_scale": 3.0}])
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["lr_scale"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0].get("lr_scale", 1.0) == 1.0


def test_bare_parameters_of_a_model_warn():
    model = llama()
    with pytest.warns(UserWarning, match="build_param_groups"):
        LDAdamW(model.parameters(), rank=RANK)
    with pytest.warns(UserWarning, match="such as table.embed.weight"):
        LDAdamW([("table.embed.weight", nn.Parameter(torch.ones(20, 12)))], rank=RANK)
    LDAdamW([{"params": list(model.parameters()), "rank": RANK}])  # said


def test_groups_in_the_style_of_galore():
    other, matrix = (nn.Parameter(torch.ones(20, 30)) for _ in range(2))
    groups = [{"params": [other]}, {"params": [matrix], "rank": 4}]
    optimizer = LDAdamW(groups)
    assert [group["enable_lowrank"] for group in optimizer.param_groups] == [False, True]
    assert describe(groups) == describe(optimizer)
    assert describe([{"params": [other]}]) == describe(LDAdamW([other]))


@pytest.mark.parametrize("named", [True, False])
def test_a_group_is_added_with_the_settings_of_the_others(named):
    first, second = nn.Linear(8, 9), nn.Linear(8, 9)
    optimizer = LDAdamW(build_param_groups(first, rank=RANK, include=["weight"], proj_type="right", named=named))
    added = list(second.named_parameters() if not named else second.parameters())
    optimizer.add_param_group({"params": added, "lr": 0.5})
    group = optimizer.param_groups[-1]
    assert (group["rank"], group["proj_type"], group["lr"]) == (RANK, "right", 0.5)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert len(set(names)) == 4
