"""Measure the safety filter: recall on labelled sentences and made-up numbers, false positives on real text, speed.

python -m jobs.bench.safety --texts ../shared/corpora/sotu.jsonl.gz ../shared/corpora/books-en.jsonl.gz
"""

import argparse
import gzip
import json
import random
import re
import string
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ray_ds.serve.safety.policy import DETECTORS

CASES = Path("tests/serve/safety/cases.toml")
PARTS = ("tuning", "unseen")
DOCUMENT_CHARS = 2000
"""Texts are looked at in documents of about this size, cut at sentences' ends."""

Cases = Mapping[str, Mapping[str, Sequence[str]]]


def read_cases(path: Path) -> Cases:
    """Return sentences by label and part."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def categories_in(text: str) -> set[str]:
    """Return what all detectors find in a text."""
    return {finding.category for detector in DETECTORS.values() for finding in detector.find(text)}


def measure_cases(cases: Cases) -> dict[str, dict[str, dict[str, float]]]:
    """Return recall of harm and jailbreaks, and the false positives among the near misses, by part."""
    figures: dict[str, dict[str, dict[str, float]]] = {"harm": {}, "jailbreak": {}, "clean": {}}
    for part in PARTS:
        for label in ("harm", "jailbreak"):
            sentences = cases[label][part]
            hits = sum(label in categories_in(sentence) for sentence in sentences)
            figures[label][part] = {"sentences": len(sentences), "recall": hits / len(sentences)}
        clean = cases["clean"][part]
        figures["clean"][part] = {"sentences": len(clean), "false_positives": sum(map(bool, map(categories_in, clean)))}
    return figures


def made_numbers(generator: random.Random, count: int) -> Iterator[tuple[str, str, str]]:
    """Yield (category, a number that must be found, one that must not be: a digit of it is another)."""
    for _ in range(count):
        card = _with_luhn("4" + "".join(generator.choices(string.digits, k=14)))
        yield "payment", card, card[:-1] + str((int(card[-1]) + generator.randint(1, 9)) % 10)
        account = "".join(generator.choices(string.digits, k=18))
        check = 98 - int(account + "131400") % 97
        yield "payment", f"DE{check:02d}{account}", f"DE{check % 97 + 1:02d}{account}"
        key = "".join(generator.choices(string.ascii_letters + string.digits, k=36))
        yield "secret", f"ghp_{key}", f"ghx_{key}"


def _with_luhn(digits: str) -> str:
    """Return digits with the check digit that makes Luhn's sum a multiple of ten."""
    total = sum(sum(divmod(int(digit) * (2 - i % 2), 10)) for i, digit in enumerate(reversed(digits)))
    return digits + str(-total % 10)


def documents(path: Path) -> Iterator[str]:
    """Yield the texts of a jsonl.gz file in documents."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            text = row.get("text") or row.get("kjv") or ""
            document = ""
            for sentence in re.split(r"(?<=[.!?\n])(?=\s)", text):
                document += sentence
                if len(document) >= DOCUMENT_CHARS:
                    yield document
                    document = ""
            if document.strip():
                yield document


def measure_texts(paths: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Return documents with a finding per 1,000, by file and category, and how fast the detectors read."""
    figures: dict[str, dict[str, float]] = {}
    for path in paths:
        count, characters, findings, started = 0, 0, Counter[str](), time.process_time()
        for document in documents(path):
            count += 1
            characters += len(document)
            findings.update(categories_in(document))
        seconds = time.process_time() - started
        rates = {name: round(1000 * findings[name] / count, 2) for name in DETECTORS}
        figures[path.name] = {"documents": count, **rates, "characters_per_s": round(characters / seconds)}
    return figures


def main() -> None:
    """Print the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description="Measure the safety filter.")
    parser.add_argument("--cases", type=Path, default=CASES)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="jsonl.gz files of clean text")
    parser.add_argument("--numbers", type=int, default=1000, help="made-up cards, accounts and keys each")
    options = parser.parse_args()
    numbers = list(made_numbers(random.Random(0), options.numbers))
    found = sum(category in categories_in(f"It is {number}.") for category, number, _ in numbers)
    near = sum(bool(categories_in(f"It is {number}.")) for _, _, number in numbers)
    figures = {
        "sentences": measure_cases(read_cases(options.cases)),
        "numbers": {"count": len(numbers), "recall": found / len(numbers), "near_misses_found": near},
        "documents_with_findings_per_1000": measure_texts(options.texts),
    }
    inputs = {"cases": str(options.cases), "texts": [str(path) for path in options.texts], "numbers": options.numbers}
    print(json.dumps({"name": "safety", "inputs": inputs, "figures": figures, "peers": {}}))


if __name__ == "__main__":
    main()
