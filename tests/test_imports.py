"""The shape of the code base: imports point downward, back-ends stay in their modules, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ldadam_dist"
MAX_LINES = 400

# What each module may import from the package; modules of adapters/ and integrations/ are taken by their folder.
ALLOWED = {
    "_version": set(),
    "rules": set(),
    "tables": set(),
    "whole": set(),
    "network": set(),
    "parsing": set(),
    "curves": set(),
    "preflight": {"network", "parsing", "tables"},
    "separate": set(),
    "algebra": {"separate"},
    "layout": set(),
    "rounding": set(),
    "weights": {"rounding", "separate"},
    "quantized": {"rounding"},
    "arguments": {"rules"},
    "requests": {"layout"},
    "identity": {"rules"},
    "selection": {"identity", "rules"},
    "param_groups": {"selection", "quantized", "rules", "tables"},
    "traffic": {"tables"},
    "measures": {"layout", "requests", "separate"},
    "step": {"algebra", "requests", "layout", "measures", "separate", "weights"},
    "runtime": {"requests", "layout"},
    "costs": {"layout"},
    "plan": {"costs", "layout"},
    "buckets": {"algebra", "layout", "quantized", "rounding", "separate", "step", "weights"},
    "edges": {"layout", "quantized", "requests", "separate"},
    "fragments": {"buckets", "requests", "layout"},
    "adapters": {"layout"},
    "entries": {"adapters", "layout", "rules", "runtime"},
    "partitions": {"entries", "adapters", "rules", "runtime"},
    "packing": {"layout", "rules"},
    "universal": {
        *("partitions", "packing", "state", "entries", "adapters", "layout", "arguments", "rules", "runtime")
    },
    "zero_files": {"universal"},
    "dcp_files": {"zero_files"},
    "convert": {"parsing", "dcp_files", "zero_files", "universal", "packing", "rules"},
    "adamw": {"entries", "rounding", "rules", "separate"},
    "gradients": {"consistency", "entries", "runtime", "separate"},
    "agreement": {"consistency", "entries", "gradients", "replicas", "separate"},
    "clipping": {"adapters", "entries", "in_grad", "runtime"},
    "grouping": {"entries", "load_checks", "rules"},
    "error_buffers": {"entries", "separate"},
    "in_grad": {"error_buffers", "entries", "located", "replicas", "rules", "separate"},
    "consistency": {"entries", "adapters", "runtime"},
    "state": {"entries", "adapters", "buckets", "fragments", "layout", "quantized", "rules", "runtime"},
    "load_checks": {"arguments", "entries", "state"},
    "state_dicts": {"arguments", "entries", "load_checks", "partitions", "state"},
    "replicas": {"entries", "layout", "runtime"},
    "located": {
        *("arguments", "adapters", "agreement", "consistency", "entries", "lowrank", "partitions", "plan"),
        *("replicas", "rules", "whole"),
    },
    "placement": {"entries", "state", "plan", "costs", "layout", "quantized", "rules", "tables"},
    "lowrank": {
        *("entries", "state", "plan", "costs", "buckets", "fragments", "step", "requests", "runtime", "rules"),
        *("layout", "measures", "separate", "edges", "whole"),
    },
    "capture": {"adamw", "entries", "gradients", "in_grad", "lowrank", "plan", "separate"},
    "inspection": {"capture", "entries", "lowrank", "measures", "placement", "plan", "runtime"},
    "optimizer": {
        *(
            "arguments",
            "rules",
            "entries",
            "gradients",
            "grouping",
            "in_grad",
            "consistency",
            "state",
            "state_dicts",
            "load_checks",
            "inspection",
        ),
        *("adamw", "lowrank", "plan", "replicas", "runtime", "separate"),
    },
    "__init__": {"_version", "clipping", "optimizer", "param_groups", "traffic"},
    "cli": {
        *("_version", "adapters", "convert", "curves", "network", "optimizer", "param_groups", "partitions"),
        *("placement", "plan", "preflight", "quantized", "rules", "selection", "tables"),
    },
    "__main__": {"cli"},
}
COMMUNICATES = {"runtime", "adapters", "traffic", "preflight"}
OWN_WORLDS = {"cli/layouts.py", "cli/doctor.py"}  # one of a fake group, and one of two processes
READS_CHECKPOINTS = {"convert", "dcp_files"}  # with torch.distributed.checkpoint, in one process
BACKENDS = {"deepspeed", "transformers", "accelerate", "peft", "lightning", "torchtitan", "datasets"}


def module_of(path):
    """'step' for ldadam_dist/step.py, 'adapters' for ldadam_dist/adapters/dtensor.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Dotted names that a file imports, anywhere in it; relative ones made absolute."""
    package = ["ldadam_dist", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_point_downward(path):
    module = module_of(path)
    own = {name.split(".")[1] for name in imported(path) if name.startswith("ldadam_dist.")} - {module}
    if module == "integrations":  # they stand above everything
        return
    assert module in ALLOWED, f"{module} is new: say in ALLOWED what it may import"
    assert own <= ALLOWED[module], f"{module} may not import {sorted(own - ALLOWED[module])}"


def test_the_allowed_edges_have_no_cycle():
    remaining = dict(ALLOWED)
    while remaining:
        free = {module for module, below in remaining.items() if not below & remaining.keys()}
        assert free, f"a cycle among {sorted(remaining)}"
        remaining = {module: below for module, below in remaining.items() if module not in free}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_only_the_runtime_and_adapters_communicate(path):
    found = [name for name in imported(path) if name.startswith("torch.distributed")]
    if module_of(path) in READS_CHECKPOINTS:
        found = [name for name in found if not name.startswith("torch.distributed.checkpoint")]
    allowed = module_of(path) in COMMUNICATES | {"integrations"} or str(path.relative_to(PACKAGE)) in OWN_WORLDS
    assert not found or allowed


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_library_is_imported_only_by_the_module_named_after_it(path):
    for name in imported(path):
        library = name.split(".")[0]
        if library in BACKENDS:
            assert path.stem == library, f"{path.name} imports {library}"


def test_importing_the_package_imports_no_back_end():
    code = f"import sys, ldadam_dist; print(sorted({BACKENDS!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_short():
    folders = [ROOT / name for name in ("ldadam_dist", "launch", "tests", "benchmarks")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for f in folders for path in f.rglob("*.py")
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}
