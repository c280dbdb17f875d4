"""Packed sequences of tokens, in an order that depends on the seed alone.

Every rank forms the same global batch and keeps its own slice of it (``local_slice``), so ranks are disjoint, all get
the same number of sequences, and the batches of a run do not depend on the number of ranks.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from launch.config import ConfigError, DataOptions
from launch.distributed import World
from launch.sources import StandardLibrary, StreamedDataset, digest
from launch.tokenizer import TextEncoder

BLOCK_CHARACTERS = 4_000_000  # a stream is shuffled within blocks of about a million tokens


class Sequences(Protocol):
    """An endless supply of training sequences that can be left and taken up again."""

    def take(self, count: int) -> np.ndarray:
        """(count, seq_len), the next sequences."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class CachedSequences:
    """Sequences of a tokenised corpus on disk; each epoch has an order of its own."""

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int) -> None:
        self.rows = pack(tokens, seq_len)
        self.seed = seed
        self.position = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def take(self, count: int) -> np.ndarray:
        indices = [self._index(self.position + offset) for offset in range(count)]
        self.position += count
        return self.rows[indices]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.rows))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows)))
        return int(self._order[1][offset])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class StreamedSequences:
    """Sequences tokenised while a data set is read, shuffled within blocks.

    The state names where the current block began and how many of its sequences were given out; taking it up again
    reads that one block anew.
    """

    def __init__(self, source: StreamedDataset, encoder: TextEncoder, seq_len: int, seed: int) -> None:
        self.source, self.encoder, self.seq_len, self.seed = source, encoder, seq_len, seed
        self.epoch = self.block = 0
        self.carry = np.empty(0, encoder.dtype)  # tokens after the last whole sequence
        self.rows = np.empty((0, seq_len), encoder.dtype)
        self.given = 0
        self._open()
        self._block_start = self._here()

    def take(self, count: int) -> np.ndarray:
        taken: list[np.ndarray] = []
        while count > 0:
            if self.given == len(self.rows):
                self._read_block()
            rows = self.rows[self.given : self.given + count]
            self.given += len(rows)
            count -= len(rows)
            taken.append(rows)
        return np.concatenate(taken)

    def _open(self, state: dict[str, Any] | None = None) -> None:
        self.dataset = self.source.open("train")
        if state is not None:
            self.dataset.load_state_dict(state)
        self._examples = self.source.examples(self.dataset)
        self._found_any = state is not None

    def _here(self) -> dict[str, Any]:
        # Before the first example the data set has no position worth keeping: None opens it at its beginning.
        reading = self.dataset.state_dict() if self._found_any else None
        return {"epoch": self.epoch, "block": self.block, "carry": self.carry.tolist(), "dataset": reading}

    def _read_block(self, start: dict[str, Any] | None = None) -> None:
        self._block_start = start or self._here()
        texts: list[str] = []
        characters = 0
        while characters < BLOCK_CHARACTERS:
            text = self._next_text()
            if text is None:
                break  # a block ends with its epoch
            texts.append(text)
            characters += len(text)
        tokens = np.concatenate([self.carry, self.encoder.encode(texts)])
        whole = len(tokens) // self.seq_len * self.seq_len
        order = np.random.default_rng([self.seed, self.block]).permutation(whole // self.seq_len)
        self.rows, self.carry = tokens[:whole].reshape(-1, self.seq_len)[order], tokens[whole:]
        self.block += 1
        self.given = 0

    def _next_text(self) -> str | None:
        for example in self._examples:
            if (text := self.source.text(example, "train")) is not None:
                self._found_any = True
                return text
        if not self._found_any:
            raise ConfigError(f"data={self.source.options.data!r}: no text to train on was found in it")
        self.epoch += 1
        self._open()
        return None

    def state_dict(self) -> dict[str, Any]:
        return {**self._block_start, "given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.block = state["epoch"], state["block"]
        self.carry = np.array(state["carry"], self.encoder.dtype)
        self._open(state["dataset"])
        self._read_block(start={key: value for key, value in state.items() if key != "given"})
        self.given = state["given"]


def training_sequences(
    options: DataOptions, source: StandardLibrary | StreamedDataset, encoder: TextEncoder, seed: int, world: World
) -> Sequences:
    if isinstance(source, StreamedDataset):
        return StreamedSequences(source, encoder, options.seq_len, seed)
    path = cache_path(options, "train", source.fingerprint, encoder.fingerprint)
    tokens = cached_array(path, lambda: encoder.encode_all(source.texts("train")), world)
    if len(tokens) < options.seq_len:
        raise ConfigError(f"data={options.data!r} has {len(tokens)} tokens, less than one seq_len={options.seq_len}")
    return CachedSequences(tokens, options.seq_len, seed)


def validation_sequences(
    options: DataOptions, source: StandardLibrary | StreamedDataset, encoder: TextEncoder, world: World
) -> np.ndarray:
    """(sequences, seq_len), the same on every rank and in every run on the same data."""
    if world.is_main and isinstance(source, StreamedDataset) and source.holds_out_tail:
        print(f"{source.files[0]} is one document: its last {options.validation_fraction:.1%} are held out", flush=True)
    limit = options.validation_tokens
    path = cache_path(options, "validation", source.fingerprint, encoder.fingerprint, limit)
    tokens = cached_array(path, lambda: encoder.encode_all(source.texts("validation"), at_most=limit), world)
    if len(tokens) < options.seq_len:
        raise ConfigError(
            f"data={options.data!r}: the held-out documents have {len(tokens)} tokens, less than one sequence of "
            f"seq_len={options.seq_len}. Raise validation_fraction (now {options.validation_fraction}), give more "
            "documents, or cut text files into smaller ones with text_unit=paragraph"
        )
    return pack(tokens, options.seq_len)


def pack(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """(tokens // seq_len, seq_len); what does not fill the last sequence is left out."""
    count = len(tokens) // seq_len
    return tokens[: count * seq_len].reshape(count, seq_len)


def local_slice(rows: np.ndarray, world: World) -> torch.Tensor:
    """This rank's part of a global batch: (batch, seq_len) to (batch / ranks, seq_len), on its device."""
    share = len(rows) // world.size
    local = rows[world.dp_rank * share : (world.dp_rank + 1) * share]
    return torch.from_numpy(local.astype(np.int64)).to(world.device)


def cache_path(options: DataOptions, name: str, *key: object) -> Path:
    return Path(options.cache_dir).expanduser() / f"{name}-{digest(*key)}.npy"


def cached_array(path: Path, build: Callable[[], np.ndarray], world: World) -> np.ndarray:
    """The array at ``path``, built by one process of each machine if it is missing, never seen half written."""

    def build_missing() -> None:
        if world.local_rank or path.is_file():
            return
        print(f"tokenising (once; kept in {path})", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp.npy")
        np.save(temporary, build())
        os.replace(temporary, path)

    world.attempt(build_missing)
    return np.load(path, mmap_mode="r")
