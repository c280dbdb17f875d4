"""Converts checkpoints of DeepSpeed's ZeRO to those of torch.distributed.checkpoint (DCP), and back.

    python -m ldadam_dist.convert SOURCE TARGET

A ZeRO checkpoint of any stage and number of ranks, as saved or made universal by `ds_to_universal`, becomes a DCP one
{"model": ..., "optimizer": ...} as `torch.distributed.checkpoint.state_dict.get_state_dict` gives it: for FSDP2, DDP,
tensor parallelism or one device. A DCP checkpoint of that form becomes a universal one, for any stage and number of
ranks. One process does it, on the CPU and without DeepSpeed, with one parameter and its states in memory at a time;
what is read is mapped.
"""

from __future__ import annotations

import functools
import inspect
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from ldadam_dist.dcp_files import DcpFolder, State, one_cause
from ldadam_dist.packing import Packing, dtypes_of, planes_of, read_planes
from ldadam_dist.parsing import OneLineParser
from ldadam_dist.rules import low_rank_matrices, projected_side, state_shapes, stored_error_dtype, stored_state_dtype
from ldadam_dist.universal import KEY
from ldadam_dist.zero_files import (
    FP32,
    MODEL_FILES,
    MOMENTS,
    RankFolder,
    UniversalFolder,
    ZeroFolder,
    expect_folder_names,
    expect_inside,
)


def convert(source: str | Path, target: str | Path) -> str:
    """Convert a checkpoint; from ZeRO's to DCP's, or from DCP's to a universal one.

    Args:
        source: folder of a checkpoint; DeepSpeed's may also be the one that holds it with a file `latest`.
        target: folder to write, which must not exist. It appears when all is written.
    Returns:
        what was done, and how the result is loaded.
    Raises:
        ValueError: the source is no such checkpoint or not whole, has a parameter whose name is no folder inside of
            the target, or the target exists. There is no target then.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    if target.exists():
        raise ValueError(f"{target} exists: choose another folder, or remove it.")
    read = open_checkpoint(source)
    if isinstance(read, DcpFolder):
        expect_folder_names([*read.names(), *(name for group in read.groups for name in group["params"])])
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        (_to_dcp if isinstance(read, ZeroFolder) else _to_universal)(read, temporary)  # type: ignore[arg-type]
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(read, ZeroFolder):
        return f"{target}: {len(read.params)} trained parameters, for torch.distributed.checkpoint.load."
    (target.parent / "latest_universal").write_text(target.name)
    return (
        f"{target}: {sum(len(g['params']) for g in read.groups)} trained parameters, a universal checkpoint. Set "
        f'"checkpoint": {{"load_universal": true}} and call engine.load_checkpoint({str(target.parent)!r}, '
        f"tag={target.name!r}, load_lr_scheduler_states=False)."
    )


def open_checkpoint(folder: Path) -> ZeroFolder | DcpFolder:
    """What reads a checkpoint.

    Raises:
        ValueError: it is none of LDAdamW.
    """
    for _ in range(2):
        if (folder / ".metadata").is_file():
            return DcpFolder(folder)
        if (folder / "zero" / "optimizer_state.pt").is_file():
            return UniversalFolder(folder)
        if any(folder.glob("*_optim_states.pt")):
            return RankFolder(folder)
        tags = [folder / name for name in ("latest", "latest_universal") if (folder / name).is_file()]
        if not tags:
            break
        folder = folder / expect_inside(tags[0].read_text().strip(), f"the folder that {tags[0]} names")
    raise ValueError(
        f"{folder} is no checkpoint: expected a folder of torch.distributed.checkpoint (.metadata), of DeepSpeed "
        f"(*_optim_states.pt, or latest), or a universal one (zero/optimizer_state.pt)."
    )


class _LazyPlanner(DefaultSavePlanner):
    """Saves tensors that are made when it is their turn; the state dict has them on the meta device."""

    def __init__(self, make: Mapping[str, Callable[[], Tensor]]) -> None:
        super().__init__()
        self._make = make

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._make[index.fqn]() if index.fqn in self._make else super().lookup_object(index)


def _to_dcp(source: ZeroFolder, target: Path) -> None:
    model: dict[str, Tensor] = {}
    optimizer: dict[str, State] = {}
    make: dict[str, Callable[[], Tensor]] = {}

    @functools.lru_cache(maxsize=1)  # the states of one parameter are made together
    def state_of(name: str) -> State:
        about, group = source.params[name], source.groups[source.group_of[name]]
        return unpack(about["shape"], group, about["steps"], [source.tensor(name, key) for key in MOMENTS])

    for name, about in source.params.items():
        group = source.groups[source.group_of[name]]
        model[name] = torch.empty(about["shape"], device="meta")
        make[f"model.{name}"] = functools.partial(source.weights, name)
        optimizer[name] = {}
        for key, (shape, dtype) in _described(about["shape"], group).items():
            optimizer[name][key] = torch.empty(shape, dtype=dtype, device="meta")
            make[f"optimizer.state.{name}.{key}"] = functools.partial(lambda name, key: state_of(name)[key], name, key)
    for name, read in source.rest().items():
        model[name] = torch.empty_like(read(), device="meta")
        make[f"model.{name}"] = read
    groups = []
    for number, group in enumerate(source.groups):
        names = [name for name in source.params if source.group_of[name] == number]
        groups.append({**group, "params": names, "param_names": names})
    everything = {"model": model, "optimizer": {"state": optimizer, "param_groups": groups}}
    alone = {"no_dist": True} if "no_dist" in inspect.signature(save).parameters else {}
    with warnings.catch_warnings(), one_cause(f"{target} could not be written"):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(everything, checkpoint_id=target, planner=_LazyPlanner(make), **alone)


def _to_universal(source: DcpFolder, target: Path) -> None:
    trained, groups, steps = set[str](), [], 0
    for group in source.groups:
        about = {}
        for name in group["params"]:
            weights, state = source.weights(name), source.state(name)
            pair, counted = pack(name, weights.shape, group, state)
            for key, tensor in zip((FP32, *MOMENTS), (weights.float(), *pair), strict=True):
                _write(target, name, key, tensor.view(weights.shape))
            about[name] = {"shape": list(weights.shape), "steps": counted}
            steps = max(steps, *counted)
            trained.add(name)
        away = ("params", "param_names")
        groups.append({**{key: value for key, value in group.items() if key not in away}, "params": [], KEY: about})
    for name in source.names():
        if name not in trained:
            _write(target, name, FP32, source.weights(name))
    torch.save({"param_groups": groups}, target / "zero" / "optimizer_state.pt")
    known = {"module": {}, "global_steps": steps, "skipped_steps": 0, "dp_world_size": 1, "mp_world_size": 1}
    for file in MODEL_FILES:
        torch.save(known, target / file)


def _write(target: Path, name: str, key: str, tensor: Tensor) -> None:
    folder = target / "zero" / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.pt"
    if path.exists():
        raise ValueError(
            f"parameter {name} would overwrite {key}.pt of another: it is in two groups, or this file system does not "
            f"tell the two names apart, as one without upper and lower case. Convert it to another file system."
        )
    torch.save({"param": tensor.contiguous(), "cat_dim": 0}, path)


def _described(shape: Sequence[int], group: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each state of a parameter with float32 weights."""
    error = stored_error_dtype(torch.float32, group["error_dtype"])
    other = stored_state_dtype(torch.float32, group.get("state_dtype"), low_rank_matrices(shape, group) is not None)
    return {
        key: (extent, {"error": error, "step": torch.float32}.get(key, other))
        for key, extent in state_shapes(shape, group).items()
        if key != "error" or group["error_feedback"]
    }


def _packing(shape: Sequence[int], group: Mapping[str, Any]) -> tuple[int, Packing] | None:
    """How many matrices a parameter is, and how each is packed; None for AdamW."""
    matrices = low_rank_matrices(shape, group)
    if matrices is None:
        return None
    number, *extent = matrices
    return number, Packing(extent[0], extent[1], group["rank"], projected_side(extent, group["proj_type"]))


def unpack(shape: Sequence[int], group: Mapping[str, Any], steps: Sequence[int], pair: Sequence[Tensor]) -> State:
    """The states of a whole parameter.

    Args:
        shape: the parameter's.
        group: its group.
        steps: of each matrix of a stack, or one.
        pair: exp_avg and exp_avg_sq of a universal checkpoint, 1-D.
    """
    described, packed = _described(shape, group), _packing(shape, group)
    step = torch.tensor(steps, dtype=torch.float32).view(described["step"][0])
    if packed is None:
        moments = [planes_of(t, t)[0].to(described["exp_avg"][1]).reshape(list(shape)) for t in pair]
        return {"step": step, **dict(zip(MOMENTS, moments, strict=True))}
    number, packing = packed
    parts = []
    for exp_avg, exp_avg_sq in zip(*(t.view(number, -1) for t in pair), strict=True):
        vector = read_planes(planes_of(exp_avg, exp_avg_sq), packing.states_at(*packing.whole))
        parts.append(packing.split(vector, *packing.whole))
    return {"step": step} | {
        key: torch.stack([part[key] for part in parts]).view(extent).to(dtype)
        for key, (extent, dtype) in described.items()
        if key != "step"
    }


def pack(
    name: str, shape: Sequence[int], group: Mapping[str, Any], state: State
) -> tuple[tuple[Tensor, Tensor], list[int]]:
    """exp_avg and exp_avg_sq of a universal checkpoint, 1-D, and the steps.

    Args:
        name: of the parameter.
        shape: its shape.
        group: its group.
        state: its states; zeros are taken for what is missing.
    Raises:
        ValueError: a state has another shape than such a parameter's.
    """
    shapes, packed = state_shapes(shape, group), _packing(shape, group)
    for key, extent in shapes.items():
        if key in state and tuple(state[key].shape) != extent:
            raise ValueError(f"the saved {key!r} of parameter {name} is {tuple(state[key].shape)}: expected {extent}.")
    whole = {key: state[key] if key in state else torch.zeros(extent) for key, extent in shapes.items()}
    steps = [int(step) for step in whole["step"].reshape(-1).tolist()]
    if packed is None:
        moments = (whole[key].to(torch.promote_types(whole[key].dtype, torch.float32)) for key in MOMENTS)
        exp_avg, exp_avg_sq = (moment.reshape(-1) for moment in moments)
        return (exp_avg, exp_avg_sq), steps
    number, packing = packed
    dtype = torch.promote_types(whole["error"].dtype, torch.promote_types(whole["exp_avg"].dtype, torch.float32))
    pair = [torch.zeros(number, packing.plane, dtype=d) for d in dtypes_of(packing.planes, dtype)]
    for i, (exp_avg, exp_avg_sq) in enumerate(zip(*pair, strict=True)):
        matrix = {key: (whole[key][i] if len(shapes["step"]) else whole[key]) for key in shapes}
        vector = packing.join(matrix, dtype)
        for part, plane in zip(vector.split(packing.plane), planes_of(exp_avg, exp_avg_sq), strict=False):
            plane[: len(part)] = part
    return (pair[0].view(-1), pair[1].view(-1)), steps


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ldadam_dist.convert") -> int:
    """The command line; returns its exit code. `prog` is how its help calls it."""
    parser = OneLineParser(
        prog=prog,
        description="Convert a checkpoint of DeepSpeed's ZeRO to torch.distributed.checkpoint's, or one of those to a "
        "universal checkpoint of DeepSpeed. Which of both follows from SOURCE.",
        epilog=f"example: {prog} runs/zero2/checkpoints/step_000500 runs/fsdp2_start",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of a checkpoint")
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder to write, which must not exist")
    options = parser.parse_args(arguments)
    try:
        sys.stdout.write(f"{convert(options.source, options.target)}\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
