"""The package as it is distributed: what is in the wheel, what it says of itself, and what importing it imports."""

from __future__ import annotations

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest
import torch

import ldadam_dist

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ldadam_dist"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@dataclass(frozen=True)
class Built:
    """What `python -m build` made."""

    wheel: Path
    sdist: Path

    @property
    def files(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def read(self, ending: str) -> str:
        """The one file of the wheel whose name ends so."""
        (name,) = (name for name in self.files if name.endswith(ending))
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.read(name).decode()

    @property
    def metadata(self) -> Message:
        return email.message_from_string(self.read(".dist-info/METADATA"))


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that does not see this checkout; what it printed."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "PIP_REQUIRE_VIRTUALENV"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def clean_copy(target: Path) -> Path:
    """The sources without what earlier builds and runs have left among them, which setuptools would pack."""
    left = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("ldadam_dist", "tests", "launch"):
        shutil.copytree(ROOT / folder, target / folder, ignore=left)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, target)
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, and the wheel that is built from it alone."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("packaging")
    source = clean_copy(folder / "source")
    # Without isolation setuptools is the one here: nothing is fetched.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of a new environment: the wheel is installed there, torch and the rest are those of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, built.wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file stands behind the environment's own, and .pth files there (editable installs) are not read.
    (site / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).resolve().parents[1]}\n")
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_has_all_modules_and_nothing_else(built: Built) -> None:
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    packed = {name for name in built.files if ".dist-info/" not in name}
    assert packed == modules | {"ldadam_dist/py.typed"}
    assert built.read("licenses/LICENSE") == (ROOT / "LICENSE").read_text()


@pytest.mark.slow
def test_the_sdist_has_what_a_build_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "ldadam_dist/py.typed", "ldadam_dist/_version.py"} <= names
    assert not any(name.startswith("launch") for name in names)


@pytest.mark.slow
def test_metadata(built: Built) -> None:
    metadata = built.metadata
    assert metadata["Name"] == "ldadam-dist"
    assert metadata["Version"] == ldadam_dist.__version__
    assert metadata["Requires-Python"] == f">={PYTHONS[0]}"
    assert metadata["License-Expression"] == "Apache-2.0"
    classifiers = metadata.get_all("Classifier") or []
    assert set(PYTHONS) == {c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)}
    assert "Typing :: Typed" in classifiers
    required = [requirement for requirement in metadata.get_all("Requires-Dist") or [] if "extra ==" not in requirement]
    assert required == ["torch>=2.7"]
    assert "ldadam-dist = ldadam_dist.cli:main" in built.read(".dist-info/entry_points.txt")


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib.metadata, importlib.resources, torch, ldadam_dist
assert importlib.resources.files(ldadam_dist).joinpath("py.typed").is_file()
weight = torch.nn.Parameter(torch.ones(8, 12))
optimizer = ldadam_dist.LDAdamW([weight], rank=2)
weight.square().sum().backward()
optimizer.step()
assert weight.square().sum() < 8 * 12
print(ldadam_dist.__file__, ldadam_dist.__version__, importlib.metadata.version("ldadam-dist"))
"""
    file, version, declared = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed.parent)
    assert version == declared == ldadam_dist.__version__


@pytest.mark.slow
def test_the_console_script_tells_the_version(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    assert run(installed / "ldadam-dist", "--version", cwd=tmp_path) == f"ldadam-dist {ldadam_dist.__version__}\n"


def test_the_version_is_written_once() -> None:
    spec = importlib.util.find_spec("ldadam_dist._version")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    assert f'__version__ = "{ldadam_dist.__version__}"' in source
    assert "import" not in re.sub('"""(.*?)"""', "", source, flags=re.DOTALL)  # setuptools reads it without torch
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "ldadam_dist._version.__version__" }' in pyproject
    assert f'"{ldadam_dist.__version__}"' not in pyproject


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Beyond `import torch`: its own modules, and Python's. DTensor would bring 500, sympy's among them."""
    code = "import sys, torch; before = set(sys.modules); import ldadam_dist; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {name for name in done.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {name for name in found if not name.startswith("ldadam_dist")} == set()


def test_a_step_on_one_device_needs_no_dtensor() -> None:
    code = """
import sys, torch, ldadam_dist
before = set(sys.modules)
weight = torch.nn.Parameter(torch.ones(8, 12))
optimizer = ldadam_dist.LDAdamW([weight], rank=2)
made = set(sys.modules)
weight.square().sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
print(*sorted(name for name in set(sys.modules) - made if name.startswith("ldadam_dist.adapters.dtensor")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
