"""Tokenizer: a byte-level BPE trained once and cached, or one from Hugging Face."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from launch.config import ConfigError, DataOptions
from launch.distributed import World
from launch.sources import Source, digest

EOS = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 4096
TRAINING_CHARACTERS = 64_000_000  # a BPE of some thousand tokens does not change with more text
BATCH_CHARACTERS = 4_000_000  # encoded at once: bounds the memory of a large corpus


class TextEncoder:
    """Documents to token ids, each document followed by the end-of-text token."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.eos_id = eos_id
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)
        self.json: str = tokenizer.to_str()
        self.fingerprint = digest(self.json, eos_id)

    def encode(self, texts: list[str]) -> np.ndarray:
        """(tokens,), all documents one after another."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array([*encoding.ids, self.eos_id], dtype=self.dtype) for encoding in encodings]
        return np.concatenate(ids) if ids else np.empty(0, self.dtype)

    def encode_all(self, texts: Iterable[str], at_most: int | None = None) -> np.ndarray:
        """(tokens,), reading no more documents than ``at_most`` tokens need."""
        parts: list[np.ndarray] = []
        count = 0
        for batch in batches(texts, BATCH_CHARACTERS if at_most is None else at_most):
            parts.append(self.encode(batch))
            count += len(parts[-1])
            if at_most is not None and count >= at_most:
                break
        return np.concatenate(parts)[:at_most] if parts else np.empty(0, self.dtype)


def batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Lists of documents of at least that many characters together."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def load_tokenizer(options: DataOptions, source: Source, world: World, saved: Path | None = None) -> TextEncoder:
    """The tokenizer that the options name; ``saved`` is the one that a run has trained with, as JSON."""
    if options.tokenizer == "bpe":
        text = world.attempt_on_main(
            lambda: saved.read_text(encoding="utf-8") if saved else trained_bpe(options, source)
        )
        tokenizer = Tokenizer.from_str(text)
        return TextEncoder(tokenizer, tokenizer.token_to_id(EOS))
    from transformers import AutoTokenizer

    try:
        pretrained = AutoTokenizer.from_pretrained(options.tokenizer)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer={options.tokenizer!r}: expected bpe, a folder or a hub name: {error}") from error
    if not pretrained.is_fast or pretrained.eos_token_id is None:
        raise ConfigError(f"tokenizer={options.tokenizer!r}: expected a fast tokenizer with an end-of-text token")
    return TextEncoder(pretrained.backend_tokenizer, pretrained.eos_token_id)


def trained_bpe(options: DataOptions, source: Source) -> str:
    """The tokenizer as JSON, from the cache or trained on the training documents and put there."""
    vocab_size = options.vocab_size or DEFAULT_VOCAB_SIZE
    folder = Path(options.cache_dir).expanduser()
    path = folder / f"bpe-{vocab_size}-{digest(source.fingerprint, TRAINING_CHARACTERS)}.json"
    if not path.is_file():
        print(f"training a byte-level BPE of {vocab_size:,} tokens (once; kept in {path})", flush=True)
        text = train_bpe(next(batches(source.texts("train"), TRAINING_CHARACTERS), []), vocab_size)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return path.read_text(encoding="utf-8")


def train_bpe(texts: list[str], vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()
