"""What README shows works as it stands."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ldadam_dist import LDAdamW

ROOT = Path(__file__).resolve().parent.parent


def test_switching_a_script_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    section = (ROOT / "README.md").read_text().split("## In your own script")[1].split("\n## ")[0]
    code = "\n".join(line.strip() for line in section.splitlines() if line.startswith("    "))
    config = LlamaConfig.from_pretrained(ROOT / "configs" / "models" / "llama_60m.json")
    with torch.device("meta"):
        names = {"model": LlamaForCausalLM(config)}
    exec(code, names)
    assert isinstance(names["optimizer"], LDAdamW)
    groups = names["optimizer"].param_groups
    assert {(group["enable_lowrank"], group["lr"]) for group in groups} == {(True, 2.5e-3), (False, 1e-2)}
    assert "q_proj" in capsys.readouterr().out


def test_files_that_are_named_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
        for path in re.findall(r"(?<![\w/])(?:configs|launch|benchmarks|ldadam_dist)/[\w./]+\.(?:py|yaml|json)", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"
