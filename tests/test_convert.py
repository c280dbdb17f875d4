"""The converter: runs move between ZeRO, FSDP2 and one process, and nothing is lost on the way there and back."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import once, run_ranks
from moves import UNCLIPPED, Weights, build, close, loaded_by_engine, loaded_plain, saved_by_engine, saved_plain
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from zero_runs import MODELS, Run

from ldadam_dist import LDAdamW
from ldadam_dist.convert import convert, main
from ldadam_dist.dcp_files import DcpFolder, _Reader
from ldadam_dist.zero_files import FP32, MOMENTS, UniversalFolder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process is meant

CONVOLUTIONS = {"convolutions": True}
KINDS = {
    "mixed": Run("mixed", "mixed", {"stage": 2}, UNCLIPPED, CONVOLUTIONS),
    "small error": Run("small error", "mixed", {"stage": 3}, UNCLIPPED, {**CONVOLUTIONS, "error_dtype": "bfloat16"}),
    "large rank": Run("large rank", "mixed", {"stage": 1}, UNCLIPPED, {**CONVOLUTIONS, "rank": 4}),
    "no error": Run("no error", "mixed", {"stage": 2}, UNCLIPPED, {**CONVOLUTIONS, "error_feedback": False}),
}


def trained(run: Run) -> tuple[nn.Module, Any]:
    """A model and its optimizer after two steps in this process."""
    model, optimizer = build(run, sharded=False)
    for step in range(2):
        MODELS[run.model][1](model, MODELS[run.model][2](step).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_dcp(folder: Path, model: nn.Module, optimizer: Any, **options: bool) -> None:
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    save({"model": weights, "optimizer": state}, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_changes_nothing(kind: str, tmp_path: Path) -> None:
    model, optimizer = trained(KINDS[kind])
    save_dcp(tmp_path / "dcp", model, optimizer)
    convert(tmp_path / "dcp", tmp_path / "zero/universal")
    convert(tmp_path / "zero/universal", tmp_path / "again")
    before, after = DcpFolder(tmp_path / "dcp"), DcpFolder(tmp_path / "again")
    assert sorted(before.names()) == sorted(after.names()) == sorted(model.state_dict())
    for name in before.names():
        same(before.weights(name), after.weights(name), name)
    for was, now in zip(before.groups, after.groups, strict=True):
        assert {key: now[key] for key in was} == was
        for name in was["params"]:
            expected, found = before.state(name), after.state(name)
            assert expected.keys() == found.keys()
            for key, tensor in expected.items():
                same(tensor, found[key], f"{key} of {name}")


def same(expected: Tensor, found: Tensor, name: str) -> None:
    assert expected.dtype == found.dtype, name
    assert torch.equal(expected, found), name


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Gives the error of the command line; nothing may be left in the folder."""

    def error(source: Path, target: Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([str(source), str(target)]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err

    return error


def test_what_is_no_checkpoint_is_refused(refused: Any, tmp_path: Path) -> None:
    assert "is no checkpoint" in refused(tmp_path, tmp_path / "target")
    assert "is no checkpoint" in refused(tmp_path / "missing", tmp_path / "target")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero/optimizer_state.pt").write_text("text")
    assert "cannot be read" in refused(tmp_path, tmp_path / "target")
    (tmp_path / ".metadata").write_text("text")
    assert "cannot be read" in refused(tmp_path, tmp_path / "target")
    assert "exists" in refused(tmp_path, tmp_path / "zero")


def test_what_is_not_whole_is_refused(refused: Any, tmp_path: Path) -> None:
    save_dcp(tmp_path / "dcp", *trained(KINDS["mixed"]))
    convert(tmp_path / "dcp", tmp_path / "universal")
    (tmp_path / "dcp/__0_0.distcp").unlink()
    assert "No such file" in refused(tmp_path / "dcp", tmp_path / "target")
    (tmp_path / "universal/zero/conv.weight/exp_avg_sq.pt").unlink()
    assert "conv.weight/exp_avg_sq.pt is missing" in refused(tmp_path / "universal", tmp_path / "target")
    (tmp_path / "universal/zero/conv.weight/exp_avg.pt").write_bytes(b"PK")
    assert "conv.weight/exp_avg" in refused(tmp_path / "universal", tmp_path / "target")


def test_what_is_not_of_ldadamw_is_refused(refused: Any, tmp_path: Path) -> None:
    model, optimizer = trained(KINDS["mixed"])
    save_dcp(tmp_path / "flat", model, optimizer, flatten_optimizer_state_dict=True)
    assert "without flatten_optimizer_state_dict" in refused(tmp_path / "flat", tmp_path / "target")
    plain = nn.Linear(3, 3)
    save_dcp(tmp_path / "adamw", plain, torch.optim.AdamW(plain.parameters()))
    assert "another optimizer than LDAdamW" in refused(tmp_path / "adamw", tmp_path / "target")
    (tmp_path / "universal/zero").mkdir(parents=True)
    torch.save({"param_groups": [{"lr": 0.1}]}, tmp_path / "universal/zero/optimizer_state.pt")
    assert "no states of LDAdamW" in refused(tmp_path / "universal", tmp_path / "target")


RUNS = {
    "2": Run("2", "llama", {"stage": 2}, UNCLIPPED),
    "3": Run("3", "llama", {"stage": 3, "sub_group_size": 500}, UNCLIPPED),
    "1 mixed": Run("1 mixed", "mixed", {"stage": 1, "round_robin_gradients": True}, UNCLIPPED, CONVOLUTIONS),
    "3 mixed": Run("3 mixed", "mixed", {"stage": 3}, UNCLIPPED, {**CONVOLUTIONS, "rank": 4}),
    "3 bf16": Run("3 bf16", "llama", {"stage": 3}, dtype=torch.bfloat16),
}


def save_all(root: str) -> dict[str, Weights]:
    """With ZeRO each run; with FSDP2 each model."""
    found = {f"ZeRO-{name}": saved_by_engine(run, f"{root}/ZeRO-{name}", True) for name, run in RUNS.items()}
    return found | {
        f"FSDP2-{name}": saved_plain(RUNS[name], f"{root}/FSDP2-{name}", sharded=True) for name in ("3", "1 mixed")
    }


def load_all(root: str, ranks: int) -> dict[str, Weights]:
    found = {}
    for name in ("2", "1 mixed") if ranks == 1 else ("3", "3 mixed"):
        found[f"ZeRO-{name}"] = loaded_plain(RUNS[name], f"{root}/ZeRO-{name}/dcp", sharded=ranks > 1)
    for name in ("3",) if ranks == 1 else ("1 mixed",):
        found[f"FSDP2-{name}"] = loaded_by_engine(RUNS[name], f"{root}/FSDP2-{name}-zero", "universal")
    return found


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    folder = tempfile.mkdtemp()
    yield Path(folder)
    shutil.rmtree(folder)


@once
def saved(root: Path) -> dict[str, Weights]:
    found: dict[str, Weights] = run_ranks(2, save_all, str(root))[0]
    for name in found:
        if name.startswith("ZeRO"):
            convert(root / name, root / name / "dcp")
        else:
            convert(root / name, root / f"{name}-zero/universal")
    return found


@once
def loaded(root: Path, ranks: int) -> dict[str, Weights]:
    saved(root)
    found: dict[str, Weights] = run_ranks(ranks, load_all, str(root), ranks)[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "ranks"),
    [("ZeRO-2", 1), ("ZeRO-1 mixed", 1), ("ZeRO-3", 2), ("ZeRO-3 mixed", 2), ("FSDP2-3", 1), ("FSDP2-1 mixed", 2)],
)
def test_a_run_moves(source: str, ranks: int, root: Path) -> None:
    """From ZeRO on two ranks to one process or FSDP2 on two; from FSDP2 on two to ZeRO."""
    pytest.importorskip("deepspeed")
    close(loaded(root, ranks)[source], saved(root)[source])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_converter_and_ds_to_universal_read_the_same(name: str, root: Path) -> None:
    pytest.importorskip("deepspeed")
    saved(root)
    folder = root / f"ZeRO-{name}"
    convert(folder / "dcp", folder / "back")
    expected, found = UniversalFolder(folder / "universal"), UniversalFolder(folder / "back")
    assert expected.params == found.params
    for param in expected.params:
        for key in (FP32, *MOMENTS):
            assert torch.equal(expected.tensor(param, key), found.tensor(param, key)), f"{key} of {param}"
    rest, others = expected.rest(), found.rest()
    assert rest.keys() == others.keys()
    for other, read in others.items():
        assert torch.equal(read().float(), rest[other]().float()), other


def named(folder: Path, name: str, **more: Any) -> None:
    """A checkpoint of one parameter with that name; `more` goes into its group."""
    optimizer = LDAdamW([("weight", nn.Parameter(torch.zeros(8, 12)))], rank=2)
    group = {**optimizer.state_dict()["param_groups"][0], "params": [name], "param_names": [name], **more}
    save(
        {
            "model": {name: torch.zeros(8, 12)},
            "optimizer": {"state": {name: {"step": torch.tensor(0.0)}}, "param_groups": [group]},
        },
        checkpoint_id=folder,
        no_dist=True,
    )


WRONG_NAMES = [
    "../../x",
    "/abs/x",
    "a/../../x",
    "a/./x",
    "a//x",
    "x/",
    "",
    "a\0x",
    "..\\x",
    "C:x",
    "a" * 256,
    "optimizer_state.pt",
]


def test_a_name_that_leads_out_of_the_target_is_refused(refused: Any, tmp_path: Path) -> None:
    for number, name in enumerate(WRONG_NAMES):
        named(tmp_path / f"dcp{number}", name)
        error = refused(tmp_path / f"dcp{number}", tmp_path / "deep/target")
        assert f"a parameter of the checkpoint is called {name!r}" in error
    named(tmp_path / "dcp", "a/b:c.weight")  # of a ModuleDict
    convert(tmp_path / "dcp", tmp_path / "universal")
    assert (tmp_path / "universal/zero/a/b:c.weight/fp32.pt").is_file()
    convert(tmp_path / "universal", tmp_path / "again")
    assert DcpFolder(tmp_path / "again").names() == ["a/b:c.weight"]
    path = tmp_path / "universal/zero/optimizer_state.pt"
    saved = torch.load(path)
    saved["param_groups"][0]["flat_params"] = {"../../x": saved["param_groups"][0]["flat_params"]["a/b:c.weight"]}
    torch.save(saved, path)
    assert "is called '../../x'" in refused(tmp_path / "universal", tmp_path / "target")
    (tmp_path / "latest").write_text("../elsewhere")
    assert "is called '../elsewhere'" in refused(tmp_path, tmp_path / "target")


def test_two_parameters_never_share_a_file(refused: Any, tmp_path: Path) -> None:
    named(tmp_path / "dcp", "weight", params=["weight", "weight"])
    assert "parameter weight would overwrite" in refused(tmp_path / "dcp", tmp_path / "target")


class Runs:
    """Makes a folder when it is read by pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_what_a_checkpoint_says_is_not_run(refused: Any, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "dcp/.metadata"
    named(tmp_path / "dcp", "weight")
    good = path.read_bytes()
    metadata = pickle.loads(good)
    (entry,) = (place for index, place in metadata.storage_data.items() if index.fqn == "model.weight")
    metadata.planner_data["x"] = Runs(mark)
    dotted = b"\x80\x04ctorch.distributed.checkpoint.filesystem\nos.mkdir\nX\x01\x00\x00\x00x\x85R."
    for wrong, named_in_error in (
        (pickle.dumps(Runs(mark)), "mkdir"),
        (pickle.dumps(metadata), "mkdir"),
        (dotted, "os.mkdir"),
        (b"\x80\x04cbuiltins\ngetattr\nctorch\nSize\nX\x03\x00\x00\x00mro\x86R.", "getattr"),
        (b"\x80\x04ctorch.serialization\n_get_layout\nX\x04\x00\x00\x00load\x85R.", "no torch.layout"),
        (b"\x80\x04ctorch\nload\n.", "torch.load"),
        (pickle.dumps({"a": 1}), "dict"),
    ):
        path.write_bytes(wrong)
        error = refused(tmp_path / "dcp", tmp_path / "target")
        assert ".metadata cannot be read" in error
        assert named_in_error in error
    del metadata.planner_data["x"]
    entry.relative_path = "../elsewhere.distcp"
    path.write_bytes(pickle.dumps(metadata))
    assert "'../elsewhere.distcp'" in refused(tmp_path / "dcp", tmp_path / "target")
    named(tmp_path / "objects", "weight", lr=Runs(mark))
    error = refused(tmp_path / "objects", tmp_path / "target")
    assert "holds objects of" in error
    assert "mkdir" in error


def test_metadata_of_every_kind_is_read(tmp_path: Path) -> None:
    """As torch reads it, which makes whatever is there."""
    tensors = {str(dtype): torch.zeros(2, dtype=dtype) for dtype in (torch.bool, torch.bfloat16, torch.complex64)}
    images = torch.zeros(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    everything = {"a": tensors, "b": [1, ("x", {2})], "c": images, "d": {"step": 3, "path": tmp_path}}
    save(everything, checkpoint_id=tmp_path / "dcp", no_dist=True)
    found = _Reader(tmp_path / "dcp").read_metadata()
    expected = FileSystemReader(tmp_path / "dcp").read_metadata()
    found.storage_meta = expected.storage_meta = None  # each reader's own
    assert found == expected
