"""Data: every kind of source, hold-out, packing, order, and taking it up again."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import launch.data
import launch.tokenizer
from launch.config import ConfigError, DataOptions
from launch.data import CachedSequences, Sequences, StreamedSequences, local_slice, training_sequences
from launch.data import validation_sequences as build_validation
from launch.distributed import World
from launch.sources import StandardLibrary, StreamedDataset, open_source
from launch.tokenizer import EOS, TextEncoder, load_tokenizer

SEQ_LEN = 16
ALONE = World(dp_rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture
def options(corpus: Path, tmp_path: Path) -> DataOptions:
    return DataOptions(
        data=str(corpus), seq_len=SEQ_LEN, vocab_size=300, validation_fraction=0.2, cache_dir=str(tmp_path / "cache")
    )


def changed(options: DataOptions, **values: object) -> DataOptions:
    return DataOptions(**{**vars(options), **values})


@pytest.fixture(params=["text", "jsonl", "parquet"])
def any_options(
    request: pytest.FixtureRequest, options: DataOptions, documents: list[str], tmp_path: Path
) -> DataOptions:
    """The same documents in three forms."""
    if request.param == "jsonl":
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps({"content": text, "id": i}) + "\n" for i, text in enumerate(documents)))
        return changed(options, data=str(path), text_column="content")
    if request.param == "parquet":
        for part in range(2):
            table = pyarrow.table({"text": documents[part::2]})
            pyarrow.parquet.write_table(table, tmp_path / f"{part}.parquet")
        return changed(options, data=str(tmp_path / "*.parquet"))
    return options


def streamed(options: DataOptions, seed: int = 0) -> StreamedSequences:
    source = open_source(options)
    assert isinstance(source, StreamedDataset)
    return StreamedSequences(source, load_tokenizer(options, source, ALONE), options.seq_len, seed)


def test_every_document_is_in_one_split(any_options: DataOptions, documents: list[str]) -> None:
    source = open_source(any_options)
    train, validation = list(source.texts("train")), list(source.texts("validation"))
    assert sorted(train + validation) == sorted(documents)
    assert 0 < len(validation) < len(train)


def test_an_epoch_has_every_training_token_once(any_options: DataOptions) -> None:
    source = open_source(any_options)
    sequences = streamed(any_options)
    expected = sequences.encoder.encode(list(source.texts("train")))
    rows = sequences.take(len(expected) // SEQ_LEN)
    left = len(expected) % SEQ_LEN
    assert Counter(rows.ravel().tolist()) == Counter(expected[: len(expected) - left].tolist())
    assert (expected == sequences.encoder.eos_id).sum() == len(list(source.texts("train")))


def test_seed_decides_the_order(options: DataOptions) -> None:
    first, again, other = (streamed(options, seed).take(20) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def assert_resumes(sequences: Sequences, fresh: Iterable[Sequences], counts: Iterable[int]) -> None:
    """Wherever a run is left, a new one that takes up its state goes on with the same sequences."""
    for count, resumed in zip(counts, fresh, strict=True):
        if count:
            sequences.take(count)
        state = json.loads(json.dumps(sequences.state_dict()))
        expected = sequences.take(50)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        np.testing.assert_array_equal(resumed.take(50), expected)


def test_stream_is_taken_up_where_it_was_left(any_options: DataOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.data, "BLOCK_CHARACTERS", 3_000)
    counts = [0, 1, 60, 700, 3000]  # before the first block, in it, at its end or later, epochs later
    assert_resumes(streamed(any_options), [streamed(any_options) for _ in counts], counts)


def test_cached_corpus_is_taken_up_where_it_was_left() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    counts = [0, 1, 61, 200]
    fresh = [CachedSequences(tokens, SEQ_LEN, seed=3) for _ in counts]
    assert_resumes(CachedSequences(tokens, SEQ_LEN, seed=3), fresh, counts)


def test_cached_epochs_are_permutations() -> None:
    sequences = CachedSequences(np.arange(1000, dtype=np.uint16), SEQ_LEN, seed=0)
    first, second = sequences.take(62), sequences.take(62)
    assert sorted(first[:, 0]) == sorted(second[:, 0]) == list(range(0, 992, SEQ_LEN))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_one_global_batch(options: DataOptions, ranks: int) -> None:
    batch = streamed(options).take(8)
    parts = []
    for dp_rank in range(ranks):  # every rank reads for itself
        world = World(dp_rank=dp_rank, size=ranks, local_rank=dp_rank, device=ALONE.device)
        parts.append(local_slice(streamed(options).take(8), world))
    assert {len(part) for part in parts} == {8 // ranks}
    assert torch.equal(torch.cat(parts), local_slice(batch, ALONE))


def test_tokenizer_is_trained_once(options: DataOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(options)
    first = load_tokenizer(options, source, ALONE)
    monkeypatch.setattr(launch.tokenizer, "train_bpe", lambda *_: pytest.fail("trained again"))
    second = load_tokenizer(options, open_source(options), ALONE)
    assert second.fingerprint == first.fingerprint
    assert first.vocab_size == 300
    assert [path.name for path in Path(options.cache_dir).glob("*.tmp*")] == []


def test_tokenizer_represents_everything(options: DataOptions) -> None:
    encoder = load_tokenizer(options, open_source(options), ALONE)
    text = "  tabs\t, Grüße, 漢字, \x00 and 🦙\r\n\n"
    ids = encoder.encode([text])
    assert ids[-1] == encoder.eos_id == encoder.tokenizer.token_to_id(EOS)
    assert encoder.tokenizer.decode(ids[:-1].tolist()) == text


def test_huggingface_tokenizer_from_a_folder(options: DataOptions, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    trained = load_tokenizer(options, open_source(options), ALONE)
    fast = PreTrainedTokenizerFast(tokenizer_object=trained.tokenizer, eos_token=EOS)
    fast.save_pretrained(tmp_path / "tokenizer")
    other = changed(options, tokenizer=str(tmp_path / "tokenizer"), vocab_size=None)
    loaded = load_tokenizer(other, open_source(other), ALONE)
    np.testing.assert_array_equal(loaded.encode(["one", "two"]), trained.encode(["one", "two"]))


def test_validation_is_limited_and_cached(options: DataOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(options)
    encoder = load_tokenizer(options, source, ALONE)
    rows = build_validation(options, source, encoder, ALONE)
    limited = build_validation(changed(options, validation_tokens=SEQ_LEN * 5 + 3), source, encoder, ALONE)
    np.testing.assert_array_equal(limited, rows[:5])
    monkeypatch.setattr(TextEncoder, "encode", lambda *_: pytest.fail("tokenised again"))
    np.testing.assert_array_equal(build_validation(options, source, encoder, ALONE), rows)


def test_standard_library_is_held_out_by_file(options: DataOptions) -> None:
    source = open_source(changed(options, data="stdlib", validation_fraction=0.02))
    assert isinstance(source, StandardLibrary)
    assert len(source.files) > 500
    assert not any("site-packages" in name for name in source.files)
    assert list(source.files) == sorted(source.files)
    source.files = dict(list(source.files.items())[:200])
    train, validation = list(source.texts("train")), list(source.texts("validation"))
    assert len(train) + len(validation) == 200
    assert 0 < len(validation) < 20


def test_standard_library_corpus_is_cached(options: DataOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    options = changed(options, data="stdlib")
    source = open_source(options)
    assert isinstance(source, StandardLibrary)
    source.files = dict(list(source.files.items())[:20])
    encoder = load_tokenizer(options, source, ALONE)
    first = training_sequences(options, source, encoder, 0, ALONE).take(10)
    monkeypatch.setattr(TextEncoder, "encode", lambda *_: pytest.fail("tokenised again"))
    np.testing.assert_array_equal(training_sequences(options, source, encoder, 0, ALONE).take(10), first)


def test_text_may_be_cut_into_lines(options: DataOptions, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("first line\nsecond line\n\nthird line\n")
    lines = changed(options, data=str(tmp_path / "one.txt"), text_unit="line")
    source = open_source(lines)
    assert sorted([*source.texts("train"), *source.texts("validation")]) == ["first line", "second line", "third line"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"data": "no/such/folder"}, "no such file"),
        ({"data": "missing.jsonl"}, "no such file"),
        ({"data": "*.nothing"}, "no such file"),
        ({"text_column": "content"}, "text_column='content' has no effect on text"),
        ({"data_subset": "en"}, "data_subset='en' has no effect"),
        ({"data": "stdlib", "text_unit": "line"}, "text_unit='line' has no effect"),
    ],
)
def test_unusable_data_is_refused(options: DataOptions, values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace("*", r"\*")):
        open_source(changed(options, **values))


def test_folders_of_several_kinds_and_empty_ones_are_refused(options: DataOptions, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    with pytest.raises(ConfigError, match="in this folder"):
        open_source(changed(options, data=str(folder)))
    (folder / "a.txt").write_text("text")
    (folder / "b.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="json and text"):
        open_source(changed(options, data=str(folder)))


def test_missing_column_and_missing_validation_are_named(options: DataOptions, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"content": "some text"}\n')
    with pytest.raises(ConfigError, match="no column 'text', only content"):
        list(open_source(changed(options, data=str(path))).texts("train"))
    tiny = changed(options, data=str(path), text_column="content", validation_fraction=1e-9)
    source = open_source(tiny)
    with pytest.raises(ConfigError, match="Raise validation_fraction"):
        build_validation(tiny, source, load_tokenizer(tiny, source, ALONE), ALONE)
