"""Folders of DeepSpeed's checkpoints, read without DeepSpeed: those of ZeRO, and universal ones."""

from __future__ import annotations

import functools
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldadam_dist.universal import KEY

FP32, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
"""What a trained parameter has: its weights, and two tensors of its states."""

MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""The model's file in ZeRO-1 and 2, and the first of ZeRO-3."""

_RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


class _Shell:
    """Stands for an object of a class that is not loaded: it holds nothing, and runs nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Shell:
        return super().__new__(cls)


def read(path: Path) -> Any:
    """A file of torch.save, its tensors mapped into memory; of other objects only their attributes.

    Raises:
        ValueError: it is none.
    """
    try:
        strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # A class of its own for each name: torch keeps them by class.
        shells: list[Any] = [(type("_Shell", (_Shell,), {}), name) for name in strange]
        with torch.serialization.safe_globals(shells):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever the unpickler meets
        raise ValueError(f"{path} cannot be read: expected a file of torch.save ({error}).") from error


def expect_inside(name: Any, what: str) -> str:
    """The name of a file or folder, if it stays inside of the folder to which it is added on every system.

    Raises:
        ValueError: it leads out of there, or no system takes it.
    """
    parts = name.split("/") if isinstance(name, str) and not re.search(r"[\\\x00-\x1f]|^[A-Za-z]:", name) else [""]
    for part in parts:
        if part in ("", ".", "..") or len(os.fsencode(part)) > 255:
            raise ValueError(
                f"{what} is called {name!r}: expected a name that is a path inside of the checkpoint's folder, without "
                f"a leading slash, parts that are empty, '.', '..' or longer than 255 bytes, backslashes, drives and "
                f"control characters."
            )
    return str(name)


def expect_folder_names(names: Collection[Any]) -> None:
    """Can each parameter have the folder zero/NAME of a universal checkpoint?

    Raises:
        ValueError: a name leads elsewhere, or to where another one has, or the checkpoint itself, has a file.
    """
    files = {"optimizer_state.pt", *(f"{name}/{key}.pt" for name in names for key in (FP32, *MOMENTS))}
    for name in names:
        expect_inside(name, "a parameter of the checkpoint")
        parts = name.split("/")
        taken = {"/".join(parts[: i + 1]) for i in range(len(parts))} & files
        if taken:
            raise ValueError(
                f"a parameter of the checkpoint is called {name!r}: its folder would be where a universal checkpoint "
                f"has the file zero/{taken.pop()}. Rename the parameter."
            )


class ZeroFolder(ABC):
    """A checkpoint of a run with LDAdamW.

    Args:
        folder: the folder of its files.

    Attributes:
        groups: the optimizer's groups, without their parameters.
        params: what the groups say of each trained parameter; see `ldadam_dist.universal.KEY`.
        group_of: the number of its group.

    Raises:
        ValueError: the folder is not such a checkpoint, or not of LDAdamW.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        saved = self._saved_groups()
        if not any(KEY in group for group in saved):
            raise ValueError(
                f"{folder} has no states of LDAdamW that can be moved: another optimizer saved it, or a version of "
                f"ldadam_dist that kept them otherwise. Load it as it was saved, and save it again."
            )
        away = ("params", "param_names", KEY)
        self.groups = [{key: value for key, value in group.items() if key not in away} for group in saved]
        self.params = {name: about for group in saved for name, about in group[KEY].items()}
        self.group_of = {name: number for number, group in enumerate(saved) for name in group[KEY]}

    @abstractmethod
    def tensor(self, name: str, key: str) -> Tensor:
        """Weights or states of a trained parameter, 1-D.

        Raises:
            ValueError: a file is missing.
        """

    @abstractmethod
    def _saved_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups as they were saved."""

    @functools.cached_property
    def _models(self) -> list[dict[str, Any]]:
        """The model's files; in ZeRO-3 one of each rank."""
        found = sorted(self.folder.glob("*mp_rank_00_model_states.pt"), key=lambda path: (len(path.name), path.name))
        if not found:
            raise ValueError(
                f"{self.folder} has no file mp_rank_00_model_states.pt, of ZeRO-3 zero_pp_rank_0_mp_rank_..."
            )
        return [read(path) for path in found]

    @property
    def model(self) -> dict[str, Any]:
        """What the engine saved of the model and of itself, in ZeRO-3 on the first rank."""
        return self._models[0]

    def rest(self) -> dict[str, Callable[[], Tensor]]:
        """What else the model has, and what reads it: buffers, frozen parameters, and other names of parameters."""
        shared = self.model.get("shared_params") or {}
        shapes = self.model.get("frozen_param_shapes") or {}
        found: dict[str, Callable[[], Tensor]] = {}
        for name, tensor in self.model["module"].items():
            kept = shared.get(name, name)  # tied weights are kept once
            if name in self.params or not isinstance(tensor, Tensor):
                continue
            if kept in self.params:
                found[name] = functools.partial(self.weights, kept)
            elif kept in shapes and tensor.shape != shapes[kept]:
                found[name] = functools.partial(self._joined, kept, shapes[kept])
            else:
                found[name] = tensor.clone
        return found

    def weights(self, name: str) -> Tensor:
        """Weights of a trained parameter, in its shape."""
        return self.tensor(name, FP32).view(self.params[name]["shape"])

    def _joined(self, name: str, shape: Sequence[int]) -> Tensor:
        """A frozen parameter, which is partitioned in ZeRO-3 like all parameters."""
        parts = [model["frozen_param_fragments"][name].reshape(-1) for model in self._models]
        return torch.cat(parts)[: math.prod(shape)].view(list(shape))


class UniversalFolder(ZeroFolder):
    """What `ds_to_universal` writes: a folder for each parameter, zero/NAME."""

    def _saved_groups(self) -> list[dict[str, Any]]:
        path = self.folder / "zero" / "optimizer_state.pt"
        if not path.is_file():
            raise ValueError(
                f"{self.folder} is no universal checkpoint: it has no zero/optimizer_state.pt. Convert the checkpoint "
                f"with DeepSpeed's ds_to_universal."
            )
        groups: list[dict[str, Any]] = read(path)["param_groups"]
        expect_folder_names([name for group in groups for name in group.get(KEY, ())])
        return groups

    def path(self, name: str, key: str) -> Path:
        """Its file.

        Raises:
            ValueError: it is missing.
        """
        path = self.folder / "zero" / name / f"{key}.pt"
        if not path.is_file():
            raise ValueError(f"{path} is missing: the universal checkpoint is not complete.")
        return path

    def tensor(self, name: str, key: str) -> Tensor:
        return self._whole(name, key).view(-1)

    def rest(self) -> dict[str, Callable[[], Tensor]]:
        found = super().rest()
        for path in sorted((self.folder / "zero").rglob(f"{FP32}.pt")):
            name = path.parent.relative_to(self.folder / "zero").as_posix()
            if name not in self.params:
                found.setdefault(name, functools.partial(self._whole, name))
        return found

    def _whole(self, name: str, key: str = FP32) -> Tensor:
        found = read(self.path(name, key))
        tensor: Tensor = found["param"] if isinstance(found, Mapping) else found
        return tensor


class RankFolder(ZeroFolder):
    """What ZeRO saves: a file for each rank, with its partitions."""

    def _saved_groups(self) -> list[dict[str, Any]]:
        files = {match: path for path in self.folder.iterdir() if (match := _RANK_FILE.fullmatch(path.name))}
        ranks = sorted(int(match[1]) for match in files)
        if not ranks or ranks != list(range(len(ranks))) or any(int(match[2]) for match in files):
            raise ValueError(
                f"{self.folder} has files of the optimizer of the ranks {ranks}: expected all from 0 on, of a run "
                f"without tensor parallelism."
            )
        saved_by = self.model.get("dp_world_size", len(ranks))
        if len(ranks) != saved_by:
            raise ValueError(
                f"{self.folder} has files of the optimizer of {len(ranks)} ranks: expected all {saved_by}."
            )
        by_rank = sorted(files.items(), key=lambda both: int(both[0][1]))
        self._ranks: list[dict[str, Any]] = [read(path)["optimizer_state_dict"] for _, path in by_rank]
        groups: list[dict[str, Any]] = self._ranks[0][self._optimizer_key]["param_groups"]
        return groups

    @property
    def _optimizer_key(self) -> str:
        return "base_optimizer_state" if "base_optimizer_state" in self._ranks[0] else "optimizer_state_dict"

    @functools.cached_property
    def _places(self) -> list[dict[str, tuple[int, int, int]]]:
        """For each rank, of a parameter: the number of its flat tensor, where it begins there, and how long it is."""
        if "param_slice_mappings" in self._ranks[0]:
            return [
                {
                    name: (i, place.start, place.numel)
                    for i, mapping in enumerate(rank["param_slice_mappings"])
                    for name, place in mapping.items()
                }
                for rank in self._ranks
            ]
        found: list[dict[str, tuple[int, int, int]]] = [{} for _ in self._ranks]
        for i, shapes in enumerate(self.model["param_shapes"]):
            offset = 0
            for name, shape in shapes.items():
                size = math.prod(shape)
                length = -(-size // len(self._ranks))
                for p, places in enumerate(found):
                    places[name] = i, offset, min(max(size - p * length, 0), length)
                offset += length
        return found

    def tensor(self, name: str, key: str) -> Tensor:
        parts = []
        for rank, places in zip(self._ranks, self._places, strict=True):
            if name in places:
                i, start, length = places[name]
                parts.append(self._flat(rank, i, key)[start : start + length])
        return torch.cat(parts)

    def _flat(self, rank: Mapping[str, Any], i: int, key: str) -> Tensor:
        if key != FP32:
            state: Tensor = rank[self._optimizer_key]["state"][i][key]
            return state
        name = "single_partition_of_fp32_groups" if "single_partition_of_fp32_groups" in rank else "fp32_flat_groups"
        weights: Tensor = rank[name][i]
        return weights
