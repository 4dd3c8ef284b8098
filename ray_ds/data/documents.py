"""Reading the documents of a corpus, and choosing among them by a hash of their ids."""

import re
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from ray_ds import storage
from ray_ds.artifacts import Corpus
from ray_ds.errors import ArtifactError

DOCUMENTS_PREFIX = "documents-"
DOCUMENTS_SUFFIX = ".parquet"
READ_ROWS = 256
_WITH_OWN_ID = re.compile(r"[0-9a-f]{12}(?:\.\d+)?-\d+:(.+)", re.DOTALL)
"""A document id with an own id in it, as `readers.py` makes them."""


def file_names(corpus: Corpus) -> list[str]:
    """Return the names of a corpus's files, sorted: `00000` for `documents-00000.parquet`.

    Raises:
        ArtifactError: it has none.
    """
    paths = [info.path for info in corpus.manifest.files]
    names = [
        path[len(DOCUMENTS_PREFIX) : -len(DOCUMENTS_SUFFIX)]
        for path in paths
        if path.startswith(DOCUMENTS_PREFIX) and path.endswith(DOCUMENTS_SUFFIX)
    ]
    if not names:
        allowed = "must hold documents-*.parquet"
        raise ArtifactError(corpus.uri, "no documents", allowed, "look at what the clean step dropped, or give it text")
    return sorted(names)


def file_path(name: str) -> str:
    """Return the path of a file in its corpus: `documents-00000.parquet` for `00000`."""
    return f"{DOCUMENTS_PREFIX}{name}{DOCUMENTS_SUFFIX}"


def read_documents(corpus_uri: str, name: str) -> Iterator[Sequence[tuple[str, str]]]:
    """Yield (doc_id, text) pairs of one file in order, a batch at a time.

    Raises:
        ArtifactError: the file is damaged.
    """
    uri = storage.join(corpus_uri, file_path(name))
    system, path = storage.filesystem(uri)
    try:
        with system.open_input_file(path) as file:
            for batch in pq.ParquetFile(file).iter_batches(READ_ROWS, columns=["doc_id", "text"]):
                yield list(zip(batch.column("doc_id").to_pylist(), batch.column("text").to_pylist(), strict=True))
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        allowed = "must be a parquet file with doc_id and text"
        raise ArtifactError(uri, reason, allowed, "restore it or run the clean step again") from error


def hash_fraction(key: str, purpose: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on nothing but the arguments.

    Documents with a number below f are a random share f of the corpus, whatever their order. Choices for different
    purposes, such as what to hold out and what to learn tokens from, are independent of each other.
    """
    return xxhash.xxh3_64_intdigest(f"{purpose}\n{seed}\n{key}".encode()) / 2**64


def identity_of(doc_id: str) -> str:
    """Return what a document is known by: `<file>:<own id>`, or its whole id where its raw file gave it none.

    So the parts of a document that share an own id are held out together.
    """
    found = _WITH_OWN_ID.fullmatch(doc_id)
    return doc_id if found is None else f"{doc_id.partition('-')[0]}:{found[1]}"


def group_of(doc_id: str) -> str | None:
    """Return the group of a document, such as the book of a chapter; None where its raw file gave it no id.

    A document id is `<file>-<position>`, and `:<own id>` after it where there is one; the group is the own id up to its
    last `:` or `/`. An own id without one is a group by itself.
    """
    found = _WITH_OWN_ID.fullmatch(doc_id)
    if found is None:
        return None
    own_id = found[1]
    cut = max(own_id.rfind(":"), own_id.rfind("/"))
    return own_id[:cut] if cut >= 0 else own_id
