"""docker/: what can be checked without an engine, and the image itself where buildah and debootstrap are (slow)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import docker_image
import pytest
import yaml
from packaging.requirements import Requirement

from launch.config import parse_config

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
COMPOSE = [DOCKER / "compose.yaml", DOCKER / "compose.gpu.yaml"]


def entry_point(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(DOCKER / "entrypoint.sh"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def services(path: Path, **values: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = yaml.safe_load(docker_image.interpolate(path.read_text(), values))["services"]
    return found


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: make install-dev")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_is_copied_is_there_and_reaches_the_builder() -> None:
    _comment, first, *lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert first == "*"  # all stays out, .git, .venv and runs too, but for what is named
    allowed = [line[1:] for line in lines if line.startswith("!")]
    assert not {".git", ".venv", "runs"} & {name.split("/")[0] for name in allowed}
    copied = re.findall(r"^COPY (.+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert copied
    for line in copied:
        for source in shlex.split(line)[:-1]:
            assert (ROOT / source).exists(), source
            assert any(source == name or source.startswith(f"{name}/") for name in allowed), source


def test_what_is_installed_is_pinned_and_declared() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extras,) = (line.partition("EXTRAS=")[2].split(",") for line in lines if line.startswith("ARG EXTRAS="))
    for requirement in ("torch", *(one for extra in extras for one in declared[extra])):
        assert Requirement(requirement).name in pinned
    (constraints,) = (line for line in lines if line.startswith("ARG PIP_CONSTRAINT="))
    assert constraints.count("=/opt/ldadam_dist/constraints.txt") == 2  # what builds packages is pinned too
    (base,) = (line.partition("BASE_IMAGE=")[2] for line in lines if line.startswith("ARG BASE_IMAGE="))
    for node in services(COMPOSE[0]).values():
        assert node["build"]["args"]["BASE_IMAGE"] == base  # type: ignore[index]


def test_nothing_but_the_training_runs_on_its_gpus() -> None:
    assert re.findall(r"^HEALTHCHECK (.+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE) == ["NONE"]


def test_nccl_finds_the_drivers_of_infiniband() -> None:
    assert {"libibverbs1", "ibverbs-providers"} <= set(re.findall(r"[\w.-]+", (DOCKER / "Dockerfile").read_text()))


def test_commands_of_the_docs_reap_processes_and_have_the_limits() -> None:
    text = (ROOT / "docs" / "docker.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    (docker run .+)$", text, re.MULTILINE)
    assert len(commands) == 2
    wanted = ["--init", "--shm-size 8g", "--ulimit memlock=-1", "--ulimit stack=67108864", "--stop-timeout 120"]
    for command in commands:
        assert [option for option in wanted if option not in command] == []
    for node in services(COMPOSE[0]).values():
        assert node["init"] is True
        assert node["ulimits"] == {"memlock": -1, "stack": 67108864}


def test_the_words_of_the_entry_point_are_scripts_of_launch() -> None:
    scripts = docker_image.launch_scripts()
    assert list(scripts) == ["pretrain", "finetune"]
    usage = entry_point("--help").stdout
    for word, script in scripts.items():
        assert f"{word} ...   {script} ..." in usage
        assert entry_point(word, "--help").stdout.startswith(f"usage: {script} ")


@pytest.mark.parametrize("arguments", [[], ["--steps", "3"]], ids=str)
def test_the_entry_point_wants_a_word(arguments: list[str]) -> None:
    done = entry_point(*arguments)
    assert done.returncode == 2
    assert "expected pretrain, finetune or a command" in done.stderr


def test_the_entry_point_passes_arguments_and_exit_codes_on() -> None:
    done = entry_point("pretrain", "--dry-run", "--lr", "1e-3", "--output_dir", "a b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(f"{ROOT}/launch/pretrain.py --lr 1e-3 --output_dir a\\ b")
    assert entry_point("bash", "-c", "exit 7").returncode == 7
    assert entry_point("pretrain", "--no-such-option=1", "--dry-run").stdout.endswith("--no-such-option=1\n")


def test_two_nodes_are_told_the_same_and_meet_at_the_first() -> None:
    nodes = services(COMPOSE[0], ARGS="--steps 300")
    assert list(nodes) == ["node0", "node1"]
    assert nodes["node0"] | {"hostname": ""} == nodes["node1"] | {"hostname": ""}
    for name, node in nodes.items():
        assert node["hostname"] == name
    command = str(nodes["node0"]["command"])
    assert "--rdzv-endpoint node0:29500" in command
    assert command.endswith("--steps 300")
    here = command.replace("pretrain ", "pretrain --dry-run ", 1).replace("node0:", "127.0.0.1:")
    done = entry_point(*shlex.split(here))
    assert done.returncode == 0, done.stderr
    launcher, _, training = done.stdout.splitlines()[-1].partition("launch/pretrain.py ")
    assert "--nnodes=2" in launcher
    assert parse_config(shlex.split(training)).run.steps == 300


def test_each_node_has_a_gpu_of_its_own() -> None:
    devices = [
        node["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]  # type: ignore[index]
        for node in services(COMPOSE[1]).values()
    ]
    assert devices == [["0"], ["1"]]
    asked = [[node["environment"]["LDADAM_CPU"] for node in services(path).values()] for path in COMPOSE]  # type: ignore[index]
    assert asked == [["1", "1"], ["0", "0"]]
    assert services(COMPOSE[1]).keys() == services(COMPOSE[0]).keys()


def test_arguments_of_the_dockerfile_are_those_of_compose() -> None:
    declared = set(re.findall(r"^ARG (\w+)", (DOCKER / "Dockerfile").read_text(), re.MULTILINE))
    for node in services(COMPOSE[0]).values():
        assert set(node["build"]["args"]) <= declared  # type: ignore[index]


def test_compose_takes_the_files() -> None:
    """By Docker's own parser, where it is installed."""
    plugin = shutil.which("docker")
    if not plugin or subprocess.run([plugin, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    files = [word for path in COMPOSE for word in ("--file", str(path))]
    done = subprocess.run([plugin, "compose", *files, "config", "--quiet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.exhaustive
def test_the_image_is_built_and_trains() -> None:
    script = Path(docker_image.__file__)
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == docker_image.SKIPPED:
        pytest.skip(done.stdout.strip().splitlines()[-1].partition("skipped: ")[2])
    assert done.returncode == 0, done.stdout + done.stderr
