"""Options: what is accepted, what is refused, and that every shipped configuration is valid."""

from pathlib import Path

import pytest
import torch
import yaml

from launch.compare import main as compare
from launch.config import MODELS, ConfigError, parse_config
from launch.distributed import World
from launch.model import llama_config
from launch.optim import build_optimizer, build_scheduler, lr_factor
from launch.pretrain import main as pretrain
from launch.tokenizer import TextEncoder, train_bpe
from launch.trainer import micro_batch_size

CONFIGS = MODELS.parent / "pretrain"
CPU = torch.device("cpu")


def test_how_states_are_stored_reaches_the_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--error_dtype", "int4", "--state_dtype", "bfloat16", "--stochastic_rounding", "true", "--rank", "4"]
    optimizer = build_optimizer(torch.nn.Sequential(torch.nn.Linear(8, 8)), parse_config(options).optimizer)
    for group in optimizer.param_groups:
        assert (group["error_dtype"], group["state_dtype"], group["stochastic_rounding"]) == ("int4", "bfloat16", True)
    assert "error_dtype" in refused(capsys, "--error_dtype", "int2")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        parse_config(arguments)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = parse_config(["--config", str(path)])
    given = yaml.safe_load(path.read_text())
    assert {key: config.flat()[key] for key in given} == given


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_models_are_valid(path: Path) -> None:
    config = parse_config(["--model", path.stem])
    encoder = TextEncoder(*_tiny_tokenizer())
    llama = llama_config(config.model, encoder, config.data.seq_len)
    assert llama.vocab_size == encoder.vocab_size
    assert llama.hidden_size % llama.num_attention_heads == 0


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 0.5\nsteps: 100\nbetas: [0.8, 0.9]\n")
    config = parse_config(["--config", str(tmp_path / "a.yaml"), "--lr", "0.25"])
    assert (config.optimizer.lr, config.run.steps, config.optimizer.resolved_betas) == (0.25, 100, (0.8, 0.9))


def test_saved_configuration_is_read_back(tmp_path: Path) -> None:
    config = parse_config(["--optimizer", "adamw", "--betas", "[0.8, 0.9]"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_betas_follow_the_optimizer() -> None:
    assert parse_config(["--optimizer", "ldadamw"]).optimizer.resolved_betas == (0.908, 0.99)
    assert parse_config(["--optimizer", "adamw"]).optimizer.resolved_betas == (0.9, 0.95)


def test_unknown_keys_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("learning_rate: 0.1\n")
    assert "learning_rate" in refused(capsys, "--config", str(tmp_path / "a.yaml"))
    assert "learning_rate" in refused(capsys, "--learning_rate", "0.1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--lr 0", "lr=0.0"),
        ("--lr_other .nan", "lr_other=nan"),
        ("--optimizer galore", "galore"),
        ("--betas [0.9,1.0]", "betas"),
        ("--rho 1", "rho=1.0"),
        ("--rank 0", "rank=0"),
        ("--error_in_grad true --optimizer adamw", "error_in_grad=True with optimizer=adamw"),
        ("--gradient_sync lowrank --parallel ddp --optimizer adamw", "gradient_sync=lowrank with optimizer=adamw"),
        ("--gradient_sync lowrank", "where nothing is replicated"),
        ("--gradient_sync lowrank --parallel fsdp", "or FSDP2 with replicas"),
        ("--gradient_sync some --parallel ddp", "gradient_sync"),
        ("--replicas 0", "replicas=0: expected at least 1"),
        ("--replicas 2 --parallel ddp", "replicas=2 is for FSDP2"),
        ("--error_in_grad true --deepspeed configs/deepspeed/zero2.json", "error_in_grad=True with deepspeed"),
        ("--clip -1", "clip=-1.0"),
        ("--steps 0", "steps=0"),
        ("--stepz 10", "did you mean --steps"),
        ("--error_dtype fp8", "error_dtype=fp8: expected one of 'float64', 'float32', 'bfloat16', 'int8', 'int4'"),
        ("--min_lr_ratio 2", "min_lr_ratio=2"),
        ("--model llama_8m", "llama_8m"),
        ("--vocab_size 256", "vocab_size=256"),
        ("--vocab_size 1000 --tokenizer t5-base", "vocab_size=1000"),
        ("--validation_fraction 0", "validation_split"),
        ("--validation_tokens 100", "validation_tokens=100"),
        ("--resume latest", "output_dir"),
        ("--batch_size many", "many"),
    ],
)
def test_bad_values_are_refused(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refused(capsys, *arguments.split())


def test_batches_that_cannot_be_split_are_refused() -> None:
    world = World(dp_rank=0, size=2, local_rank=0, device=CPU)
    assert micro_batch_size(parse_config(["--batch_size", "6"]), world) == 3
    with pytest.raises(ConfigError, match=r"batch_size=5 .* choose 4 or 6, or start 1 rank"):
        micro_batch_size(parse_config(["--batch_size", "5"]), world)
    assert micro_batch_size(parse_config(["--batch_size", "12", "--micro_batch_size", "4"]), world) == 3


@pytest.mark.parametrize("ranks", [1, 16, 32, 64, 512])
def test_shipped_configurations_fit_many_ranks(ranks: int) -> None:
    world = World(dp_rank=0, size=ranks, local_rank=0, device=CPU)
    for path in CONFIGS.glob("llama_*.yaml"):
        config = parse_config(["--config", str(path)])
        size = micro_batch_size(config, world)
        assert size <= (config.run.micro_batch_size or 512)
        assert config.run.batch_size % (ranks * size) == 0


def test_a_warm_up_is_no_longer_than_the_run() -> None:
    parameter = torch.nn.Parameter(torch.ones(()))
    scheduler = build_scheduler(torch.optim.SGD([parameter], lr=1.0), parse_config(["--steps", "4"]).optimizer, 4)
    assert [scheduler.lr_lambdas[0](step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_unknown_model_keys_and_long_sequences_are_refused(tmp_path: Path) -> None:
    encoder = TextEncoder(*_tiny_tokenizer())
    (tmp_path / "a.json").write_text('{"hidden_size": 32, "max_sequence_length": 64}')
    with pytest.raises(ConfigError, match="max_sequence_length"):
        llama_config(parse_config(["--model", str(tmp_path / "a.json")]).model, encoder, 32)
    (tmp_path / "b.json").write_text('{"hidden_size": 32, "max_position_embeddings": 64}')
    with pytest.raises(ConfigError, match="seq_len=128"):
        llama_config(parse_config(["--model", str(tmp_path / "b.json")]).model, encoder, 128)


def test_schedule_warms_up_and_ends_at_the_floor() -> None:
    factors = [lr_factor(step, steps=100, warmup_steps=10, min_lr_ratio=0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.1)


def test_compare_refuses_what_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare([str(tmp_path)])
    assert "no log of a run" in capsys.readouterr().err


def _tiny_tokenizer() -> tuple:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(train_bpe(["a few words"], 260)), 0


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As `make pretrain`, which starts two, on a machine with one GPU; described only, as there may be none here."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pretrain([]) == 2
    assert "2 processes on this host have 1 CUDA device(s)" in capsys.readouterr().err
