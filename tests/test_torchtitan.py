"""torchtitan's Trainer with LDAdamW: the weights of a loop of one's own, and resumption by its checkpoints.

torchtitan's requirements do not fit those of the other tests: `make test-torchtitan` runs these, elsewhere they skip.
"""

from __future__ import annotations

import copy
import inspect
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import Tensor, nn

from ldadam_dist import LDAdamW, build_param_groups

pytest.importorskip("torchtitan", reason="torchtitan is not installed here: `make test-torchtitan`")
pytest.importorskip("triton", reason="torchtitan's models import triton, which is not installed: pip install triton")

Weights = dict[str, Tensor]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    # name: (ranks that share the data, what torchtitan's parallelism section says)
    "fsdp": (2, {"spmd_backend": "partial_dtensor"}),
    "fsdp, full_dtensor": (2, {"spmd_backend": "full_dtensor"}),
    "fsdp, spmd_types": (2, {"spmd_backend": "spmd_types"}),
    "hsdp": (2, {"spmd_backend": "partial_dtensor", "data_parallel_replicate_degree": 2}),
    "tp": (1, {"spmd_backend": "partial_dtensor", "tensor_parallel_degree": 2}),
    "pp": (
        1,
        {
            "spmd_backend": "partial_dtensor",
            "pipeline_parallel_degree": 2,
            "pipeline_parallel_microbatch_size": 4,
            "pipeline_parallel_schedule": "1F1B",
        },
    ),
}
WANTS_NEWER_TORCH = {"fsdp, spmd_types", "pp"}
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w3")
NEWER_TORCH = hasattr(dist, "set_timeout")  # one of the functions that torchtitan 0.3 expects


def trained(folder: str, layout: str, resume: bool) -> tuple[Weights, Weights, dict[int, dict[str, float]]]:
    """Weights before and after a run, or after the rest of it from its checkpoint; and what was logged."""
    import titan_runs as titan

    sharing, parallelism = LAYOUTS[layout]
    config = titan.config_of(folder, sharing, parallelism)
    if resume:
        config.checkpoint.load_step, config.checkpoint.load_only = titan.SAVE_EVERY, True
    trainer = titan.built(config)
    before = titan.whole_weights(trainer.model_parts)
    trainer.train()
    assert trainer.step == titan.STEPS
    return before, titan.whole_weights(trainer.model_parts), trainer.metrics_processor.logger.logged


def plain(before: Weights) -> tuple[Weights, dict[int, dict[str, float]]]:
    """Weights, and metrics by step, of a loop in one process with neither torchtitan's Trainer nor its container."""
    import titan_runs as titan

    model = titan.small_llama().model.build()
    model.init_weights(buffer_device=None)
    model.load_state_dict(before, strict=False)
    settings = dict(titan.SETTINGS)
    weight_decay, lr, lr_other = settings["weight_decay"], settings["lr"], settings["lr_other"]
    groups = build_param_groups(model, rank=settings["rank"], lr=lr, lr_other=lr_other, weight_decay=weight_decay)
    optimizer = LDAdamW(groups, eps=settings["eps"], metrics_every=1)
    decay = titan.STEPS - titan.WARMUP
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / titan.WARMUP, 1 - (done + 1 - titan.WARMUP - 1) / decay, 1.0)
    )
    metrics = {}
    for step in range(titan.STEPS):
        tokens = titan.sentences(step)
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1  # clipping matters
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        metrics[step + 1] = optimizer.metrics().total
    return titan.whole_weights([model]), metrics


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_metrics_are_those_of_a_plain_loop_and_resuming_is_exact(layout: str, tmp_path: Path) -> None:
    if layout in WANTS_NEWER_TORCH and not NEWER_TORCH:
        pytest.skip(f"torchtitan's {layout} wants a newer torch than {torch.__version__}: 2.15 has what it calls")
    through = run_ranks(2, trained, str(tmp_path), layout, False)
    resumed = run_ranks(2, trained, str(tmp_path), layout, True)
    before: Weights = {name: weight for rank in through for name, weight in rank[0].items()}
    ((expected, metrics),) = run_ranks(1, plain, before)
    compared = set()
    for (_, after, logged), (_, after_resuming, logged_anew) in zip(through, resumed, strict=True):
        assert sorted(logged_anew) == sorted(logged)[3:]  # after the checkpoint
        for name, weight in after.items():
            assert not torch.equal(weight, before[name]), name
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
            assert torch.equal(weight, after_resuming[name]), name
        compared |= set(after)
        if layout == "pp":  # each process tells of its own stage
            assert all(values["ldadamw/skipped_steps"] == 0 for values in logged.values())
            continue
        for name in metrics[1].keys() - {"wire_bytes", "orthogonality"}:
            found = {step: values[f"ldadamw/{name}"] for step, values in logged.items()}
            assert found == pytest.approx({step: total[name] for step, total in metrics.items()}, rel=1e-3), name
    assert compared == set(expected)


def new_model() -> Any:
    import titan_runs as titan

    torch.manual_seed(0)
    model = titan.small_llama().model.build()
    model.init_weights(buffer_device=None)
    return model


def test_what_is_projected() -> None:
    import titan_runs as titan

    container = titan.LDAdamWContainer.Config(rank=16, exclude=["wo"], rank_pattern={"w2": 8}).build(
        model_parts=[new_model()]
    )
    (optimizer,) = container
    found = {group["rank"]: set(group["param_names"]) for group in optimizer.param_groups if group["enable_lowrank"]}
    layers = [f"layers.{number}." for number in range(2)]
    assert found == {
        16: {f"{layer}{name}.weight" for layer in layers for name in ("attention.qkv_linear.wqkv", *FEED_FORWARD)},
        8: {f"{layer}feed_forward.w2.weight" for layer in layers},
    }


def test_the_configuration_has_the_settings_and_defaults_of_the_package() -> None:
    import titan_runs as titan

    own = {f.name for f in fields(titan.LDAdamWContainer.Config)} - {
        f.name for f in fields(titan.OptimizersContainer.Config)
    }
    known = inspect.signature(LDAdamW).parameters | dict(inspect.signature(build_param_groups).parameters)
    not_settings = {"params", "unknown", "model", "named"}
    refused = {
        "error_in_grad",
        "capturable",
        "process_group",
        "gradient_sync",
        "replicate_mesh",
        "check_replicas_every",
    }
    assert own == known.keys() - not_settings - refused
    config = titan.LDAdamWContainer.Config()
    defaults = {name: parameter.default for name, parameter in inspect.signature(LDAdamW).parameters.items()}
    differ = {name for name in own & defaults.keys() if getattr(config, name) != defaults[name]}
    assert differ == {"rank"}  # 16 is for small models


def test_the_recipe_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import titan_runs as titan
    from torchtitan.config import ConfigManager

    page = (Path(__file__).resolve().parent.parent / "docs/torchtitan.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"-m torchtitan\.train (.*?)\n\n", page, re.DOTALL)
    (tmp_path / "ldadamw_runs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config = ConfigManager().parse_args(shlex.split(command.replace("\\\n", " ")))
    assert isinstance(config.optimizer, titan.LDAdamWContainer.Config)
    assert (config.optimizer.rank, config.optimizer.exclude) == (64, ["wo", "lm_head"])
    assert config.optimizer.lr == 2e-3
    assert config.checkpoint.enable
    assert isinstance(config.metrics, titan.LDAdamWMetrics.Config)
    assert len(config.optimizer.build(model_parts=[new_model()])) == 1
    assert ConfigManager().parse_args(["--module", "ldadamw_runs", "--config", "eight_billion"]).optimizer.rank == 512


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"implementation": "foreach"}, "implementation='foreach' is for torchtitan's own optimizers"),
        ({"implementation": "fused_opt_states_bf16"}, "leave it out, and give state_dtype='bfloat16'"),
        ({"optimizer_factory_kwargs_by_name": {"AdamW": {}}}, r"optimizer_factory_kwargs_by_name is for \['AdamW'\]"),
        ({"rank": 256}, "nothing of the model would be projected at rank=256"),
        ({"error_dtype": "int3"}, "error_dtype"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    import titan_runs as titan

    with pytest.raises(ValueError, match=message):
        titan.LDAdamWContainer.Config(**settings).build(model_parts=[new_model()])


def test_groups_of_torchtitans_own_are_refused() -> None:
    import titan_runs as titan
    from torchtitan.components.optimizer import ParamGroupConfig

    groups = [ParamGroupConfig(pattern=".*norm.*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3})]
    with pytest.raises(ValueError, match=r"param_groups has the patterns \['\.\*norm\.\*'\]"):
        titan.LDAdamWContainer.Config(param_groups=groups).build(model_parts=[new_model()])


def test_metrics_of_another_optimizer_are_refused() -> None:
    import titan_runs as titan

    metrics: Any = object.__new__(titan.LDAdamWMetrics)
    metrics.optimizers = [torch.optim.AdamW([nn.Parameter(torch.ones(4))])]
    with pytest.raises(ValueError, match="LDAdamWMetrics has nothing to log of AdamW: expected LDAdamW"):
        metrics.log(1, 0.0, 0.0, 0.0)


def test_states_in_fewer_bits_are_saved_flat_and_loaded() -> None:
    """As torchtitan's checkpointer does it: by the name of each parameter, from a state dict of the loading side."""
    import titan_runs as titan

    config = titan.LDAdamWContainer.Config(rank=8, lr=1e-2, error_dtype="int4", state_dtype="bfloat16")
    steps = []
    model = new_model()
    container = config.build(model_parts=[model])
    tokens = titan.sentences(0)
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(container.state_dict())
            weights = copy.deepcopy(model.state_dict())
        model(tokens[:, :-1]).square().mean().backward()
        container.step()
        container.zero_grad()
        steps.append(titan.whole_weights([model]))
    assert "state.layers.0.feed_forward.w1.weight.error" in saved
    assert "param_groups.norm.weight.lr" in saved

    other = new_model()
    other.load_state_dict(weights)
    container = config.build(model_parts=[other])
    container.load_state_dict(saved)
    for step in (2, 3):
        other(tokens[:, :-1]).square().mean().backward()
        container.step()
        container.zero_grad()
        for name, weight in titan.whole_weights([other]).items():
            assert torch.equal(weight, steps[step][name]), name


def test_parts_of_a_pipeline_have_an_optimizer_each_and_one_flat_state_dict() -> None:
    import titan_runs as titan

    first, second = new_model(), new_model()
    del first.layers["1"], second.layers["0"]
    for name in ("norm", "lm_head"):
        delattr(first, name)
    del second.tok_embeddings
    container = titan.LDAdamWContainer.Config(rank=8).build(model_parts=[first, second])
    assert len(container) == 2
    names = {
        key.removeprefix("state.").rpartition(".")[0] for key in container.state_dict() if key.startswith("state.")
    }
    assert names == {name for name, _ in new_model().named_parameters()}
    container.load_state_dict(container.state_dict())
