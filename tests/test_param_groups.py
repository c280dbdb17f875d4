"""build_param_groups: what is projected, why the rest is not, and every refused input."""

import re

import pytest
import torch
from architectures import Custom, LoraLinear, bert, gpt2, llama
from torch import nn

from ldadam_dist import LDAdamW, build_param_groups, describe

RANK = 4


def projected(groups):
    return {name for group in groups if group["enable_lowrank"] for name, _ in group["params"]}


def others(groups):
    return {name for group in groups if not group["enable_lowrank"] for name, _ in group["params"]}


def linears(model, *without):
    """Names of the weights of all linear layers but those whose name holds one of `without`."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in without)
    }


def rule_of(model, name, **options):
    """The table's rule for one parameter."""
    line = next(line for line in describe(model, verbose=True, **options).splitlines() if line.startswith(name + " "))
    return re.search(r"LDAdamW|AdamW: .*?(?=  )", line).group()


# What is projected


def test_llama_projects_everything_but_embedding_and_head():
    model = llama()
    groups = build_param_groups(model, rank=RANK)
    assert projected(groups) == linears(model, "lm_head")
    assert others(groups) == {name for name, _ in model.named_parameters()} - projected(groups)
    assert rule_of(model, "lm_head.weight", rank=RANK) == "AdamW: head"
    assert rule_of(model, "model.norm.weight", rank=RANK) == "AdamW: norm"


def test_tied_head_is_an_embedding_and_appears_once():
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    groups = build_param_groups(model, rank=RANK)
    params = [param for group in groups for _, param in group["params"]]
    assert len(params) == len({id(param) for param in params}) == len(list(model.parameters()))
    assert "model.embed_tokens.weight" in others(groups)
    assert rule_of(model, "model.embed_tokens.weight", rank=RANK) == "AdamW: embedding, tied"


def test_a_weight_tied_the_other_way_round_is_an_embedding_too():
    model = nn.ModuleDict({"up": nn.Linear(16, 32), "mid": nn.Linear(32, 32), "table": nn.Embedding(32, 16)})
    model["table"].weight = model["up"].weight  # the linear layer comes first
    assert projected(build_param_groups(model, rank=RANK)) == {"mid.weight"}


def test_gpt2_conv1d_is_a_linear_layer():
    groups = build_param_groups(gpt2(), rank=RANK)
    layers = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert projected(groups) == {f"transformer.h.{i}.{layer}" for i in range(2) for layer in layers}
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= others(groups)


def test_bert_classifier_is_the_head_but_layers_named_output_are_not():
    model = bert()
    groups = build_param_groups(model, rank=RANK)
    assert projected(groups) == linears(model, "classifier")
    assert "bert.encoder.layer.0.output.dense.weight" in projected(groups)


@pytest.mark.parametrize("name", ["lm_head", "head", "classifier", "score", "embed_out"])
def test_head_by_name_where_the_model_cannot_say(name):
    model = nn.ModuleDict({"body": nn.Linear(16, 16), name: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 10))})
    assert projected(build_param_groups(model, rank=RANK)) == {"body.weight", f"{name}.0.weight"}
    assert rule_of(model, f"{name}.1.weight", rank=RANK) == "AdamW: head"


def test_lora_factors_get_adamw():
    model = nn.ModuleDict({"q_proj": LoraLinear(32), "out": nn.Linear(32, 32)})
    groups = build_param_groups(model, rank=RANK)
    assert projected(groups) == {"out.weight"}
    assert not any("base_layer" in name for name in others(groups))
    assert rule_of(model, "q_proj.lora_A.default.weight", rank=RANK) == "AdamW: adapter"


def test_peft_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["up_proj", "lm_head"], use_dora=True)
    model = peft.get_peft_model(llama(), config)
    groups = build_param_groups(model, rank=RANK)
    prefix = "base_model.model.model.layers"
    assert projected(groups) == {f"{prefix}.{i}.mlp.up_proj.modules_to_save.default.weight" for i in range(2)}
    factors = {name for name, param in model.named_parameters() if "lora_" in name and param.requires_grad}
    assert factors
    assert factors <= others(groups)
    assert "base_model.model.lm_head.modules_to_save.default.weight" in others(groups)


def test_matrices_of_unknown_modules_and_other_tensors_get_adamw():
    model = Custom()
    groups = build_param_groups(model, rank=RANK)
    assert projected(groups) == {"attention.in_proj_weight", "attention.out_proj.weight", "proj.weight"}
    for name, why in {
        "mixing": "in Custom",
        "experts": "3-D",
        "temperature": "vector",
        "conv.weight": "convolution",
        "recurrent.weight_ih_l0": "in LSTM",
        "proj.bias": "bias",
    }.items():
        assert rule_of(model, name, rank=RANK) == f"AdamW: {why}"


def test_frozen_parameters_are_left_out():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    groups = build_param_groups(model, rank=RANK)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == projected(groups) | others(groups)
    assert re.search(r"^frozen +9 parameters, 8,768 elements", describe(model, rank=RANK), re.MULTILINE)


def test_matrix_not_larger_than_rank_gets_adamw_and_the_table_says_so():
    model = llama(num_key_value_heads=1)  # k_proj and v_proj have 8 rows
    assert projected(build_param_groups(model, rank=8)) == linears(model, "lm_head", "k_proj", "v_proj")
    assert rule_of(model, "model.layers.0.self_attn.k_proj.weight", rank=8) == "AdamW: rank 8 ≥ 8"


# Patterns


@pytest.mark.parametrize(
    "include",
    [
        ["attn", "mlp"],
        ["self_attn.q_proj", "k_proj", "v_proj", "o_proj", "mlp"],
        [r"model\.layers\..*"],
        r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj",
        "all-linear",
        "all_linear",
        None,
    ],
)
def test_forms_of_optim_target_modules(include):
    model = llama()
    assert projected(build_param_groups(model, rank=RANK, include=include)) == linears(model, "lm_head")


def test_include_narrows_and_exclude_wins():
    model = llama()
    groups = build_param_groups(model, rank=RANK, include=["mlp"], exclude=[r"model\.layers\.1\..*"])
    assert projected(groups) == {f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert rule_of(model, "model.layers.0.self_attn.q_proj.weight", rank=RANK, include=["mlp"]) == (
        "AdamW: not in include"
    )
    assert rule_of(model, "model.layers.0.mlp.up_proj.weight", rank=RANK, exclude=["up"]) == "AdamW: excluded by 'up'"


@pytest.mark.parametrize("name", ["lm_head", "lm_head.weight", "model.embed_tokens"])
def test_a_name_in_include_overrules_the_kind(name):
    (found,) = projected(build_param_groups(llama(), rank=RANK, include=[name]))
    assert found.startswith(name)
    assert projected(build_param_groups(Custom(), rank=RANK, include=["mixing"])) == {"mixing"}


def test_rank_pattern_makes_a_group_for_each_rank():
    model = llama()
    groups = build_param_groups(model, rank=RANK, rank_pattern={"layers.0.mlp.down_proj": 6, "down_proj": 8})
    ranks = {name: group["rank"] for group in groups if group["enable_lowrank"] for name, _ in group["params"]}
    assert ranks.pop("model.layers.0.mlp.down_proj.weight") == 6
    assert ranks.pop("model.layers.1.mlp.down_proj.weight") == 8
    assert set(ranks.values()) == {RANK}


# Groups


def test_group_settings():
    model = gpt2()
    groups = build_param_groups(model, rank=RANK, lr=1e-3, lr_other=1e-2, weight_decay=0.1, proj_type="left")
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    assert settings == [
        {"rank": RANK, "enable_lowrank": True, "weight_decay": 0.1, "lr": 1e-3, "proj_type": "left"},
        {"rank": RANK, "enable_lowrank": False, "weight_decay": 0.1, "lr": 1e-2},
        {"rank": RANK, "enable_lowrank": False, "weight_decay": 0.0, "lr": 1e-2},
    ]
    assert [name for name, _ in groups[1]["params"]] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all(param.ndim == 1 for _, param in groups[2]["params"])
    assert not any({"lr", "proj_type"} & set(group) for group in build_param_groups(model, rank=RANK))


def test_torch_optimizers_accept_the_groups():
    model = llama()
    optimizer = torch.optim.AdamW(build_param_groups(model, rank=RANK), lr=1e-3)
    assert set(optimizer.param_groups[0]["param_names"]) == linears(model, "lm_head")
    bare = build_param_groups(model, rank=RANK, named=False)
    assert all(isinstance(param, nn.Parameter) for group in bare for param in group["params"])


# Models as they are trained


def test_meta_device():
    with torch.device("meta"):
        model = llama()
    assert projected(build_param_groups(model, rank=RANK)) == linears(model, "lm_head")


def test_wrappers_leave_no_trace_in_names(one_rank):
    model = llama()
    expected = projected(build_param_groups(model, rank=RANK))
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert projected(build_param_groups(wrapped, rank=RANK)) == expected
    assert projected(build_param_groups(torch.compile(model), rank=RANK)) == expected
    assert projected(build_param_groups(nn.DataParallel(model), rank=RANK)) == expected


def test_fully_shard_uses_global_shapes(eight_fake_ranks):
    from torch.distributed.fsdp import fully_shard

    model = llama()
    plain = describe(model, rank=8)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    # A local shard of q_proj has 4 of 32 rows: by its local shape it would not be projected.
    groups = build_param_groups(model, rank=8)
    assert projected(groups) == linears(model, "lm_head")
    assert describe(model, rank=8) == plain
    assert "32 × 32" in describe(groups)


def test_fsdp1_is_refused(eight_fake_ranks):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
        build_param_groups(FullyShardedDataParallel(llama(), device_id=torch.device("cpu")), rank=RANK)


@pytest.fixture
def one_rank(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def eight_fake_ranks():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=1, world_size=8, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


# Refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 is no rank: expected an integer"),
        ({"rank": 4.0}, "rank=4.0 is no rank"),
        ({"rank": True}, "rank=True is no rank"),
        ({"rank_pattern": {"up_proj": None}}, r"rank_pattern\['up_proj'\]=None is no rank"),
        ({"proj_type": "top"}, "proj_type='top' is unknown. Choose one of 'std'"),
        ({"rank": 32}, r"nothing .* rank=32: its largest matrix is '.*gate_proj.weight' of shape \(48, 32\)"),
        ({"exclude": ["proj"]}, r"nothing .* gets AdamW \(excluded by 'proj'\)"),
        ({"rank": 32, "include": ["mlp"]}, r"rank=32 does not fit parameter '.*gate_proj.weight' of shape \(48, 32\)"),
        ({"rank_pattern": {"up_proj": 99}}, "rank=99 does not fit parameter .* rank_pattern asks"),
        ({"include": ["up_prjo"]}, "include pattern 'up_prjo' matches no parameter.*Near names: 'up_proj'"),
        ({"exclude": ["lm_haed"]}, "exclude pattern 'lm_haed' matches no parameter.*Near names: 'lm_head'"),
        ({"rank_pattern": {"qproj": 2}}, "rank_pattern pattern 'qproj' matches no parameter.*'q_proj'"),
        ({"include": "mlp"}, r"matches no parameter.* single string .* write include=\['mlp'\]"),
        ({"include": "*.mlp"}, r"include='\*\.mlp' is no regular expression"),
        ({"include": ["norm"]}, r"matches nothing that is projected, only '.*' \(norm\)"),
        ({"include": ["head"]}, r"only 'lm_head.weight' \(head\).*full name"),
        ({"include": [""]}, "include holds ''"),
        ({"include": [3]}, "include holds 3"),
        ({"rank_pattern": {"norm": 2}}, "rank_pattern pattern 'norm' matches nothing that is projected"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        build_param_groups(llama(), **{"rank": RANK, **options})


def test_refused_models():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_param_groups(llama().requires_grad_(False), rank=RANK)
    with pytest.raises(ValueError, match="none of the model's 2 trainable parameters is a matrix"):
        build_param_groups(nn.LayerNorm(8), rank=RANK)
    with pytest.raises(ValueError, match="'weight' has no shape yet"):
        build_param_groups(nn.LazyLinear(8), rank=RANK)


def test_what_is_not_said_is_left_to_the_optimizer():
    model = nn.Sequential(nn.Linear(40, 50), nn.LayerNorm(50))
    optimizer = LDAdamW(build_param_groups(model), rank=20, weight_decay=0.1)
    found = {g["params"][0].ndim: (g["rank"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found[2] == (20, 0.1)
    assert found[1] == (20, 0.0)
    said = LDAdamW(build_param_groups(model, rank=30, weight_decay=0.2), rank=20, weight_decay=0.1)
    assert [(g["rank"], g["weight_decay"]) for g in said.param_groups] == [(30, 0.2), (30, 0.0)]
    with pytest.raises(ValueError, match=r"rank=40 does not fit parameter 0\.weight of shape \(50, 40\)"):
        LDAdamW(build_param_groups(model), rank=40)


def test_a_rank_that_a_pattern_names_is_kept_even_if_it_is_the_default():
    model = nn.Sequential(nn.Linear(80, 90), nn.Linear(90, 80))
    optimizer = LDAdamW(build_param_groups(model, rank_pattern={"1.weight": 16}), rank=64)
    assert {g["param_names"][0]: g["rank"] for g in optimizer.param_groups if g["enable_lowrank"]} == {
        "0.weight": 64,
        "1.weight": 16,
    }
