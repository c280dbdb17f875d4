"""Labelled texts for launch/finetune.py: from the hub, a folder or a file, in two splits, their classes numbered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config import ConfigError, expect

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
HELD_OUT = ("validation", "test")
SPLIT_SEED = 42


@dataclass(frozen=True)
class LabelledTexts:
    """`texts` has the splits "train" and "validation", of columns "text" and "label"; `classes` names the labels."""

    texts: Any
    classes: list[str]


def labelled_texts(name: str, text_column: str, label_column: str, validation_fraction: float) -> LabelledTexts:
    """Read labelled texts.

    Args:
        name: a file, a folder with files whose names say their split (train.csv, test.csv), or a data set on the hub.
        text_column, label_column: their columns.
        validation_fraction: part of the texts to hold out where there is neither a validation nor a test split; the
            same texts each time.
    Raises:
        ConfigError: there is no such data, it has no such columns, or fewer than two classes.
    """
    from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset

    disable_progress_bars()
    path = Path(name).expanduser()
    try:
        if path.is_file():
            expect(path.suffix in FORMATS, f"--data {name}: expected a file of one of {', '.join(FORMATS)}")
            more = {"sep": "\t"} if path.suffix == ".tsv" else {}
            found = load_dataset(FORMATS[path.suffix], data_files=str(path), **more)
        else:
            found = load_dataset(str(path) if path.is_dir() else name)
    except ConfigError:
        raise
    except Exception as error:  # of many kinds, of the hub, of pandas and pyarrow
        raise ConfigError(f"--data {name}: cannot be read: {' '.join(str(error).split())}") from error
    expect("train" in found, f"--data {name}: expected a split 'train', found {', '.join(found)}")
    held_out = next((split for split in HELD_OUT if split in found), None)
    splits = {"train": found["train"]} | ({"validation": found[held_out]} if held_out else {})
    for split, texts in splits.items():
        for column in (text_column, label_column):
            expect(
                column in texts.column_names,
                f"--data {name}: split {split} has the columns {', '.join(texts.column_names)}, not {column!r}: "
                "set text_column and label_column",
            )
    if held_out is None:
        parts = splits["train"].train_test_split(test_size=validation_fraction, seed=SPLIT_SEED)
        splits = {"train": parts["train"], "validation": parts["test"]}
    classes = sorted({label for texts in splits.values() for label in texts[label_column]})
    expect(
        len(classes) > 1 and not any(isinstance(label, float) for label in classes),
        f"--data {name}: column {label_column!r} has {len(classes)} different values"
        f"{', ' + type(classes[0]).__name__ if classes else ''}: expected two classes or more, whole numbers or words",
    )
    names = getattr(splits["train"].features[label_column], "names", None) or [str(label) for label in classes]
    numbers = {label: number for number, label in enumerate(classes)}
    made = {
        split: Dataset.from_dict(
            {"text": list(texts[text_column]), "label": [numbers[label] for label in texts[label_column]]}
        )
        for split, texts in splits.items()
    }
    return LabelledTexts(DatasetDict(made), [str(name) for name in names])
