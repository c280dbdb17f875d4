"""The documentation: programs run as they stand, the site builds without a warning, quoted messages are the code's."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import snippets
import torch
from snippets import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from ldadam_dist import LDAdamW, build_param_groups

DOCS = ROOT / "docs"
PROGRAMS = snippets.programs(DOCS / "quickstart.md")
RUNS = [(name, command) for name, program in PROGRAMS.items() if name for command in program.commands]
NEEDS = {
    "trainer.py": ["ldadam_dist.integrations.transformers"],
    "accelerated.py": ["accelerate", "deepspeed"],
    "zero_json.py": ["deepspeed"],
    "zero_code.py": ["deepspeed"],
    "lit.py": ["lightning"],
}
PLAIN = set(
    """
    AMD APOLLO CHANGELOG CONTRIBUTING CPU CSV CUDA DATA DCP DDP EPYC FSDP FSDP1 FSDP2 GPU HOST1 HSDP JSON JSONL LAPACK
    MASTER_ADDR MASTER_PORT MODEL NCCL NVIDIA SIGHUP SIGINT SIGTERM SIGUSR1 SLURM SVD TCP TORCH_INDEX_URL TSV YAML
    """.split()
)
"""Words in capitals that are names, and so no placeholders."""
TELLS = {
    "--multi_gpu": "MULTI_CPU, 2 processes",
    "--use_fsdp": "FSDP, 2 processes",
    "--use_deepspeed": "DEEPSPEED, 2",
    "2 trainer.py": "2 processes",
}
"""Parts of commands, and what a program prints that has taken them."""


def run_program(name: str, command: str, folder: Path) -> str:
    for module in NEEDS.get(name, []):
        pytest.importorskip(module)
    prelude = snippets.ACCELERATE_ON_CPUS if command.startswith("accelerate") else ""
    (folder / name).write_text(prelude + PROGRAMS[name].code)
    return snippets.run(command, folder)


def test_the_program_for_one_device_runs(tmp_path: Path) -> None:
    printed = run_program("one_device.py", "python one_device.py", tmp_path)
    assert "q_proj" in printed
    assert "step 4: loss" in printed
    assert (tmp_path / "checkpoint.pt").exists()


SLOW_RUNS = [(name, command) for name, command in RUNS if name != "one_device.py"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "command"), SLOW_RUNS, ids=[command for _, command in SLOW_RUNS])
def test_programs_run_as_the_page_says(name: str, command: str, tmp_path: Path) -> None:
    printed = run_program(name, command, tmp_path)
    for part, told in TELLS.items():
        assert part not in command or told in printed


def test_every_program_has_a_command() -> None:
    assert len(PROGRAMS) > 8
    assert [name for name, program in PROGRAMS.items() if not program.commands] == []
    for name, program in PROGRAMS.items():
        compile(program.code, name, "exec")


@pytest.mark.parametrize("command", PROGRAMS[""].commands)
def test_commands_of_the_launcher_have_options_that_it_takes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("launch.config")
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    config.parse_config(words[words.index("launch/pretrain.py") + 1 :])


@functools.cache
def site(folder: Path) -> Path:
    """The built site; warnings, such as of a link that leads nowhere, fail the build, unless --quiet hides them."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the documentation's tools are not installed: pip install -e '.[docs]'")
    return site(tmp_path_factory.getbasetemp() / "site")


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(built: Path) -> None:
    pages = {path.relative_to(built).as_posix(): path.read_text() for path in built.rglob("*.html")}
    assert {f"{page.stem}.html" for page in DOCS.glob("*.md")} <= set(pages)
    loads = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=\"?(?:https?:)?//[^\s\">]+")
    found = {name: loads.findall(html) for name, html in pages.items()}
    assert {name: urls for name, urls in found.items() if urls} == {}
    assert (built / "search" / "search_index.json").exists()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_anchors_in_pages_outside_docs_exist(name: str, built: Path) -> None:
    for path, anchor in re.findall(r"\]\(docs/([\w-]+)\.md#([^)]+)\)", (ROOT / name).read_text()):
        assert f'id="{anchor}"' in (built / f"{path}.html").read_text(), f"{name} links to docs/{path}.md#{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    _, _, nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")
    listed = re.findall(r"([\w-]+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted([*(page.name for page in DOCS.glob("*.md")), "contributing.md", "changelog.md"])


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), ROOT / "README.md"], ids=lambda page: page.stem)
def test_nothing_is_left_to_be_filled_in(page: Path) -> None:
    """Placeholders are words in capitals, outside of code."""
    text = re.sub(r"```.*?^```|`[^`]*`|^    .*?$|\]\([^)]*\)", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    words = set(re.findall(r"\b[A-Z][A-Z_]{2,}\d*\b", text)) - PLAIN
    assert words == set(), f"{page.name}: placeholders? If they are names, put them into PLAIN"
    assert not re.search(r"\b(TODO|FIXME|TBD|XXX)\b|\?\?\?|lorem ipsum", page.read_text(), re.IGNORECASE)


def test_links_to_other_sites_are_addresses() -> None:
    for page in [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for url in re.findall(r"\]\((\w+:[^)]*)\)", page.read_text()):
            assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]{2,}(/[\w./#%~-]*)?", url), f"{page.name}: {url}"


MIGRATIONS = re.findall(
    r"^## From (.*?)\n+```diff\n(.*?)^```$", (DOCS / "migration.md").read_text(), re.MULTILINE | re.DOTALL
)


@pytest.mark.parametrize("diff", [diff for _, diff in MIGRATIONS], ids=[name for name, _ in MIGRATIONS])
def test_what_a_migration_adds_runs(diff: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(ROOT / "configs" / "models" / "llama_60m.json"))
    names: dict[str, Any] = {"model": model, "torch": torch}
    compile("\n".join(line[1:] for line in diff.splitlines() if line[:1] != "+"), "before", "exec")
    exec("\n".join(line[1:] for line in diff.splitlines() if line[:1] != "-"), names)
    assert isinstance(names["optimizer"], LDAdamW)
    assert {group["enable_lowrank"] for group in names["optimizer"].param_groups} == {True, False}


def test_the_migrations_are_all_there() -> None:
    assert [name for name, _ in MIGRATIONS] == ["AdamW", "GaLore", "APOLLO", "8-bit Adam", "Muon"]


def test_states_of_adamw_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    groups = build_param_groups(model, rank=4, named=False)
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in groups])
    model(torch.ones(2, 16)).sum().backward()
    adamw.step()
    with pytest.raises(ValueError, match="This state belongs to another model"):
        LDAdamW(groups).load_state_dict(adamw.state_dict())


def messages() -> list[str]:
    """Headings of docs/troubleshooting.md in which code quotes a message."""
    page = DOCS / "troubleshooting.md"
    return re.findall(r"^### `(.*)`$", page.read_text(), re.MULTILINE)


@functools.cache
def texts_of_the_code() -> str:
    """Sources with the strings of neighbouring lines joined, as the messages are that they make."""
    folders = [ROOT / "ldadam_dist", ROOT / "launch", ROOT / ".ci"]
    files = sorted(p for f in folders for p in f.rglob("*") if p.suffix in (".py", ".sh", "") and p.is_file())
    joined = re.sub(r"[\"']\s*\n\s*f?[\"']", "", "\n".join(path.read_text() for path in files))
    return joined.replace("{{", "{").replace("}}", "}")


def test_the_messages_are_many() -> None:
    assert len(messages()) > 20


@pytest.mark.parametrize("message", messages())
def test_a_quoted_message_is_in_the_code(message: str) -> None:
    """'...' in it stands for what the code fills in; each part between is there, in one message."""
    pattern = ".{0,200}?".join(map(re.escape, message.split("...")))
    assert re.search(pattern, texts_of_the_code()), f"no message {message!r} in ldadam_dist/ or launch/"
