"""Characters to train on, and what simple statistics make of them."""

import gzip
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ray_ds.errors import InputError

SHAKESPEARE = "tinyshakespeare"
"""`id` of the text in a jsonl file of several."""
TRAIN_PART = 0.9
"""Of the text, its beginning; the rest is for validation. Source: nanoGPT, data/shakespeare_char/prepare.py."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text as the numbers of its characters, in the order of their code points."""

    train: Tensor
    """(N,) int64."""
    validation: Tensor
    vocab_size: int
    sha256: str
    """Of the text in UTF-8."""


def read_corpus(path: Path, device: torch.device) -> Corpus:
    """Return a text: a .txt file, or the row with id `tinyshakespeare` of a .jsonl or .jsonl.gz file.

    Raises:
        InputError: there is no such row.
    """
    text = path.read_text() if path.suffix == ".txt" else _read_row(path)
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([numbers[character] for character in text], device=device)
    end = int(len(text) * TRAIN_PART)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(train=tokens[:end], validation=tokens[end:], vocab_size=len(numbers), sha256=digest)


def _read_row(path: Path) -> str:
    """Return the text of the row named `SHAKESPEARE`."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as lines:
        for row in map(json.loads, lines):
            if row["id"] == SHAKESPEARE:
                return str(row["text"])
    raise InputError("corpus", str(path), f"must have a row with id {SHAKESPEARE}", "name another file")


def random_rows(tokens: Tensor, rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows from random places and the characters that follow each, (rows, length) both."""
    starts = torch.randint(len(tokens) - length, (rows, 1), generator=generator).to(tokens.device)
    places = starts + torch.arange(length + 1, device=tokens.device)
    taken = tokens[places]  # (rows, length + 1)
    return taken[:, :-1], taken[:, 1:]


def all_rows(tokens: Tensor, length: int) -> Tensor:
    """Return a text in whole rows one behind the other, (R, length + 1): a row's last is the next one's first."""
    return tokens.unfold(0, length + 1, length)


def unigram_nats(corpus: Corpus) -> float:
    """Return the cross-entropy of the validation text by the frequencies of the training text, in nats a character."""
    counts = corpus.train.bincount(minlength=corpus.vocab_size).double() + 1
    return -float((counts / counts.sum()).log()[corpus.validation].mean())


def bigram_nats(corpus: Corpus) -> float:
    """Return the same given the character before, each pair counted once more than it was seen."""
    size = corpus.vocab_size
    pairs = corpus.train[:-1] * size + corpus.train[1:]
    counts = pairs.bincount(minlength=size * size).view(size, size).double() + 1
    logs = (counts / counts.sum(dim=1, keepdim=True)).log()
    return -float(logs[corpus.validation[:-1], corpus.validation[1:]].mean())
