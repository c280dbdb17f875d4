"""The distributions: what is in them, that they work without the repository, and that importing them is cheap."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import metadata
from pathlib import Path

import pytest

import ldadam_dist

ROOT = Path(__file__).parent.parent

HEAVY = ("numpy.random", "transformers", "deepspeed", "accelerate", "lightning", "typer", "matplotlib", "datasets")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with wheel and sdist; of a copy, as setuptools writes beside its sources."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def modules() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "ldadam_dist").rglob("*.py")}


def test_the_version_comes_from_one_place() -> None:
    assert metadata("ldadam-dist")["Version"] == ldadam_dist.__version__
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text
    assert not re.search(r'^version = "', text, re.MULTILINE)


def test_what_is_declared() -> None:
    declared = metadata("ldadam-dist")
    assert declared["Requires-Python"] == ">=3.10"
    pythons = [
        c for c in declared.get_all("Classifier") if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", c)
    ]
    assert [c.rpartition(" ")[2] for c in pythons] == ["3.10", "3.11", "3.12", "3.13"]
    required = [r for r in declared.get_all("Requires-Dist") if "extra ==" not in r]
    assert required == ["torch>=2.7"]  # and nothing else, without an upper bound
    assert not [r for r in declared.get_all("Requires-Dist") if "<" in r or "@" in r]


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == modules() | {"ldadam_dist/py.typed"}
    assert any(name.endswith("/LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
    assert "ldadam-dist = ldadam_dist.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


@pytest.mark.slow
def test_the_sdist_can_be_built_from(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert modules() | {"pyproject.toml", "LICENSE", "README.md", "ldadam_dist/py.typed"} <= names


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_is(distributions: Path, tmp_path: Path) -> None:
    """In an environment of its own, which shares torch alone."""
    (wheel,) = distributions.glob("*.whl")
    target = tmp_path / "site"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import torch, ldadam_dist\n"
        f"assert ldadam_dist.__file__.startswith({str(target)!r}), ldadam_dist.__file__\n"
        "param = torch.nn.Parameter(torch.randn(8, 9)); param.grad = torch.randn(8, 9)\n"
        "ldadam_dist.LDAdamW([param], rank=2).step()\n"
        "print(ldadam_dist.__version__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ldadam_dist.__version__


def test_importing_imports_little_beyond_torch() -> None:
    """benchmarks/import_time.py has the time."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import ldadam_dist\n"
        "new = {name for name in set(sys.modules) - before if not name.startswith('ldadam_dist')}\n"
        "print(*sorted(new))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    new = done.stdout.split()
    assert not [name for name in new if name.partition(".")[0] in HEAVY], new
    slow = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy")
    assert not [name for name in new if name.startswith(slow)], new
