"""Documents: the standard library's own sources, local files, or a data set of the Hugging Face hub.

Which documents are held out for validation is decided by a hash, of the path for the standard library and of the text
otherwise, so that it depends neither on the order of reading nor on the number of ranks.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from launch.config import ConfigError, DataOptions

Split = Literal["train", "validation"]
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # any other named file is text
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")  # what is taken from a folder
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


def digest(*parts: object) -> str:
    """A short name for what was put in; equal on every machine."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def is_held_out(key: str, fraction: float) -> bool:
    # "validation" salts the hash. Without it pydoc_data/topics.py, by far the largest file of the standard library and
    # prose rather than code, would be most of what is held out.
    return int(digest("validation", key), 16) < fraction * 2**64


class Source(Protocol):
    fingerprint: str

    def texts(self, split: Split) -> Iterator[str]:
        """Documents of a split, once, in the order they are stored."""


class StandardLibrary:
    """The *.py files of the running Python's standard library, in sorted order, one document each."""

    def __init__(self, options: DataOptions) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        installed = {"site-packages", "dist-packages", "__pycache__"}
        files = [path for path in root.rglob("*.py") if installed.isdisjoint(path.relative_to(root).parts)]
        self.files = {path.relative_to(root).as_posix(): path for path in sorted(files)}
        if not self.files:
            raise ConfigError(f"data=stdlib: no *.py files under {root}; name another folder with --data")
        self.fraction = options.validation_fraction
        sizes = [f"{name}:{path.stat().st_size}" for name, path in self.files.items()]
        self.fingerprint = digest("stdlib", sys.version, self.fraction, *sizes)

    def texts(self, split: Split) -> Iterator[str]:
        names = [name for name in self.files if is_held_out(name, self.fraction) == (split == "validation")]
        if split == "validation":
            names.sort(key=digest)  # the first tokens are of files from everywhere, not of the first letters
        for name in names:
            yield self.files[name].read_bytes().decode("utf-8", errors="replace")


class StreamedDataset:
    """Local files or a hub data set, read through ``datasets`` in streaming mode.

    ``open`` gives the data set itself: its state_dict says where reading stands, so a resumed run need not read from
    the beginning.
    """

    def __init__(self, options: DataOptions) -> None:
        self.options = options
        self.files = local_files(options.data)
        if self.files:
            self.kind = file_kind(options.data, self.files)
            unused = ["data_subset", "data_split", "validation_split"]
            unused += ["text_column"] if self.kind == "text" else ["text_unit"]
        else:
            self.kind, unused = "hub", ["text_unit"]
        for name in unused:
            if getattr(options, name) is not None:
                raise ConfigError(f"{name}={getattr(options, name)!r} has no effect on {self.kind} data: remove it")
        for path in self.files:
            refuse_unreadable(path, self.kind)
        if self.files and not any(path.stat().st_size for path in self.files):
            raise ConfigError(f"data={options.data!r} is empty: expected text")
        # A single document cannot be held out whole: its end is.
        self.holds_out_tail = self.kind == "text" and options.text_unit is None and len(self.files) == 1
        self.column = options.text_column or "text"
        sizes = [f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in self.files]
        splits = (options.data_subset, options.data_split, options.validation_split, options.validation_fraction)
        unit = "tail" if self.holds_out_tail else options.text_unit
        self.fingerprint = digest(options.data, *splits, self.column, unit, *sizes)

    def open(self, split: Split) -> Any:
        """The ``datasets.IterableDataset`` in which documents of the split are, others among them."""
        import datasets

        # It tells of a broken line what first_damage says better.
        logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)
        options = self.options
        try:
            if self.kind == "hub":
                held_apart = options.validation_split if split == "validation" else None
                name = held_apart or options.data_split or "train"
                return datasets.load_dataset(options.data, options.data_subset, split=name, streaming=True)
            extra: dict[str, Any] = {}
            if self.kind == "text":
                extra = {"sample_by": options.text_unit or "document", "encoding_errors": "replace"}
            files = [str(path) for path in self.files]
            return datasets.load_dataset(self.kind, data_files=files, split="train", streaming=True, **extra)
        except (OSError, ValueError) as error:
            raise ConfigError(f"data={options.data!r} is neither a local file nor a hub data set: {error}") from error

    def examples(self, dataset: Any) -> Iterator[dict[str, Any]]:
        """What the data set holds.

        Raises:
            ConfigError: a file is not of its kind; the message names it, and the line.
        """
        try:
            yield from dataset
        except Exception as error:
            where = first_damage(self.files, self.kind)
            if where is None:
                raise
            raise ConfigError(f"data={self.options.data!r}: {where}") from error

    def text(self, example: dict[str, Any], split: Split) -> str | None:
        """The example's text if it belongs to the split."""
        if self.column not in example:
            raise ConfigError(
                f"data={self.options.data!r} has no column {self.column!r}, only {', '.join(example)}: set text_column"
            )
        text = example[self.column]
        if not text:
            return None
        if self.holds_out_tail:
            cut = round(len(text) * (1 - self.options.validation_fraction))
            return (text[cut:] if split == "validation" else text[:cut]) or None
        if self.options.validation_split is None:
            held_out = is_held_out(text, self.options.validation_fraction)
            return text if held_out == (split == "validation") else None
        return text

    def texts(self, split: Split) -> Iterator[str]:
        for example in self.examples(self.open(split)):
            if (text := self.text(example, split)) is not None:
                yield text


def open_source(options: DataOptions) -> StandardLibrary | StreamedDataset:
    if options.data == "stdlib":
        for name in ("data_subset", "data_split", "validation_split", "text_column", "text_unit"):
            if getattr(options, name) is not None:
                raise ConfigError(f"{name}={getattr(options, name)!r} has no effect on data=stdlib: remove it")
        return StandardLibrary(options)
    return StreamedDataset(options)


def refuse_unreadable(path: Path, kind: str) -> None:
    """What its first and last bytes tell of a file before it is read."""
    if path.suffix in COMPRESSED:
        return
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            if kind == "parquet":
                file.seek(max(0, path.stat().st_size - 4))
                if head[:4] != b"PAR1" or file.read() != b"PAR1":
                    raise ConfigError(f"data: {path} is not a whole Parquet file: it was cut, or is something else")
    except OSError as error:
        raise ConfigError(f"data: {path} cannot be read: {error.strerror}") from error
    if kind != "parquet" and (b"\0" in head or head.startswith((b"PK\x03\x04", b"%PDF-"))):
        raise ConfigError(f"data: {path} is not text but binary: expected UTF-8. Convert it, or choose other files")


def first_damage(files: list[Path], kind: str) -> str | None:
    """The first file, and line, that is not of its kind; None if none is."""
    for path in files:
        if path.suffix in COMPRESSED:
            continue
        if kind == "parquet":
            import pyarrow.parquet

            try:
                for _ in pyarrow.parquet.ParquetFile(path).iter_batches():
                    pass
            except (OSError, ValueError) as error:
                return f"{path} is damaged: {error}"
        elif suffix(path) == ".jsonl":
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    try:
                        fits = not line.strip() or isinstance(json.loads(line), dict)
                    except ValueError:
                        fits = False
                    if not fits:
                        return f"{path}, line {number}: expected a JSON object, found {line[:40]!r}"
        elif kind == "json":
            try:
                json.loads(path.read_bytes())
            except ValueError as error:
                return f"{path} is not JSON: {error}"
    return None


def suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def local_files(data: str) -> list[Path]:
    """Files that ``data`` names, sorted; none when it can only be the name of a hub data set."""
    path = Path(data).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and suffix(file) in {*KINDS, *TEXT_SUFFIXES}]
        if not found:
            raise ConfigError(f"data={data!r}: no {', '.join((*KINDS, *TEXT_SUFFIXES))} file in this folder")
        return sorted(found)
    found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    looks_like_hub = data.count("/") <= 1 and not data.startswith((".", "/", "~")) and not glob.has_magic(data)
    if not found and (not looks_like_hub or suffix(path) in {*KINDS, *TEXT_SUFFIXES}):
        raise ConfigError(f"data={data!r}: no such file or folder; expected a path, a glob, a hub data set or stdlib")
    return sorted(found)


def file_kind(data: str, files: list[Path]) -> str:
    kinds = sorted({KINDS.get(suffix(file), "text") for file in files})
    if len(kinds) > 1:
        raise ConfigError(f"data={data!r} holds {' and '.join(kinds)} files: choose one kind with a glob, e.g. *.jsonl")
    return kinds[0]
