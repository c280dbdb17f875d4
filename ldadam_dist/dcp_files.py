"""Folders of torch.distributed.checkpoint (DCP), read in one process and without running what they say.

torch reads the `.metadata` of such a folder with pickle, and what is no tensor by `torch.load(weights_only=False)`.
Both run any code that the folder holds. Here they make only what a checkpoint of numbers and names is made of.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from ldadam_dist.zero_files import expect_inside

State = dict[str, Tensor]


class DcpFolder:
    """A DCP checkpoint {"model": ..., "optimizer": ...}.

    Attributes:
        groups: the optimizer's groups with the names of their parameters.

    Raises:
        ValueError: it is none, or not of LDAdamW, or holds what is not read from a file.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(folder)
        try:
            self._metadata = self._reader.read_metadata()
            paths = list((self._metadata.planner_data or {}).values())
            found = sorted({".".join(map(str, path[:2])) if path[0] == "optimizer" else str(path[0]) for path in paths})
        except Exception as error:  # whatever the unpickler meets
            raise ValueError(f"{folder}/.metadata cannot be read: {error}") from error
        if not {"model", "optimizer.state", "optimizer.param_groups"} <= set(found):
            raise ValueError(
                f'{folder} has {", ".join(found[:5])}: expected {{"model": ..., "optimizer": ...}} as get_state_dict '
                f"returns them without flatten_optimizer_state_dict."
            )
        self.groups: list[dict[str, Any]] = self._read("optimizer.param_groups")["optimizer"]["param_groups"]
        if not all("proj_type" in group for group in self.groups):
            raise ValueError(f"{folder} has the optimizer groups of another optimizer than LDAdamW.")

    def _read(self, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with one_cause(f"{self._reader.path} cannot be read"):
            _load_state_dict(found, self._reader, no_dist=True, planner=_Planner(keys={prefix}))
        return found

    def names(self) -> list[str]:
        """Names of all weights and buffers."""
        return [path[1] for path in (self._metadata.planner_data or {}).values() if path[0] == "model"]

    def weights(self, name: str) -> Tensor:
        """A parameter or a buffer."""
        key = f"model.{name}"
        if not isinstance(self._metadata.state_dict_metadata.get(key), TensorStorageMetadata):
            raise ValueError(f"the checkpoint's model has no tensor {name}, which its optimizer trains.")
        tensor: Tensor = self._read(key)["model"][name]
        return tensor

    def state(self, name: str) -> State:
        """The states of a parameter; empty if there are none."""
        state: State = self._read(f"optimizer.state.{name}").get("optimizer", {}).get("state", {}).get(name, {})
        return state


@contextlib.contextmanager
def one_cause(what: str) -> Iterator[None]:
    """Raise ValueError with the cause of what DCP raises, which tells of all ranks with their tracebacks."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"{what}: {type(cause).__name__}: {cause}") from error


class _Reader(FileSystemReader):
    """Reads its metadata once, and nothing but files of its folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._known is None:
            with (Path(self.path) / ".metadata").open("rb") as file:
                self._known = _read_metadata(file)
            self._known.storage_meta = StorageMeta(load_id=self.load_id)
        return self._known


class _Planner(_EmptyStateDictLoadPlanner):
    """What is no tensor holds numbers, text and containers."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        strange = torch.serialization.get_unsafe_globals_in_checkpoint(value)
        if strange:
            raise ValueError(
                f"{read_item.dest_index.fqn} holds objects of {', '.join(sorted(strange))}: expected numbers, text, "
                f"tensors and containers of them, as others may run code while they are read. If you trust the "
                f"checkpoint, name them to torch.serialization.add_safe_globals and convert it from Python."
            )
        value.seek(0)
        found = torch.load(value, map_location="cpu", weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)


def _read_metadata(file: IO[bytes]) -> Metadata:
    """The metadata of a DCP checkpoint.

    Raises:
        ValueError: it is something else, or has places outside of the folder.
        pickle.UnpicklingError: it names what no such metadata has.
    """
    found = _Unpickler(file).load()
    if not isinstance(found, Metadata) or not isinstance(found.planner_data, dict | None):
        raise ValueError(f"it holds a {type(found).__name__}: expected the Metadata that torch's own planner saves")
    for place in (found.storage_data or {}).values():
        expect_inside(place.relative_path, "a file of the checkpoint")
    return found


def _layout(name: str) -> torch.layout:
    """`torch.strided` for "torch.strided"; it stands for torch's own function, which takes names of anything."""
    layout = getattr(torch, name.removeprefix("torch."))
    if not isinstance(layout, torch.layout):
        raise pickle.UnpicklingError(f"{name} is no torch.layout")
    return layout


def _member(of: Any, name: str) -> Any:
    """A member of the only enum in metadata; it stands for `getattr`, by which some versions of Python save these."""
    if of is not kinds._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"getattr of {of}")
    return kinds._MEM_FORMAT_ENCODING[name]


_PATHS = {
    (module, f"{kind}{system}Path"): PureWindowsPath if system == "Windows" else PurePosixPath
    for module in ("pathlib", "pathlib._local")
    for kind in ("", "Pure")
    for system in ("Posix", "Windows")
}

_KINDS = {
    ("torch.distributed.checkpoint.metadata", name): getattr(kinds, name)
    for name in (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    )
}

_KNOWN: dict[tuple[str, str], Any] = {
    **_PATHS,
    **_KINDS,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("builtins", "getattr"): _member,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Unpickler(pickle.Unpickler):
    """Makes what torch 2.7 and later save as metadata; any other name is an error, and nothing of it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which metadata of torch.distributed.checkpoint has not, and which may run "
            f"code. Load the checkpoint with the program that saved it, if you trust it"
        )
