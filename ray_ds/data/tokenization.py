"""Turning one file of a corpus into token shards."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ray_ds import storage
from ray_ds.config.tokenize import HoldOut
from ray_ds.data.documents import group_of, hash_fraction, read_documents
from ray_ds.data.shards import SHARD_SUFFIX, SPLITS, Split, token_dtype, write_shard
from ray_ds.errors import ConfigError
from ray_ds.tokenizer import load_tokenizer

Counts = dict[str, dict[str, int]]
"""documents, tokens and bytes of each split: `counts["tokens"]["train"]`."""


@dataclass(frozen=True, kw_only=True)
class TokenizeJob:
    """What every file of a corpus needs to become shards."""

    step: str
    """The step's name, for errors."""
    corpus_uri: str
    tokenizer_uri: str
    output_uri: str
    """Folder of the shards: `<split>/<file>.arrow`."""
    work_uri: str
    """Folder of the files' commits: `<file>.json`."""
    validation_fraction: float
    hold_out: HoldOut
    seed: int


def split_of(doc_id: str, job: TokenizeJob) -> Split:
    """Return the split a document belongs to.

    Raises:
        ConfigError: groups are asked for, and the document has none.
    """
    key = group_of(doc_id) if job.hold_out == "group" else doc_id
    if key is None:
        allowed = f"must be document where documents have no id of their own, such as {doc_id}"
        raise ConfigError(f"{job.step}.hold_out", job.hold_out, allowed, "name their id_column in the clean step")
    return "validation" if hash_fraction(key, "validation", job.seed) < job.validation_fraction else "train"


def tokenize_file(name: str, job: TokenizeJob) -> Counts:
    """Write a file's shard of each split that it has documents of, then its commit; return what they hold.

    The bytes depend on the file and the job alone, and shards appear whole, so a file that is done twice (a worker
    died, or was thought dead) leaves what one run leaves. Each document is BOS and its tokens; no EOS, since the next
    BOS ends it.
    """
    tokenizer = load_tokenizer(job.tokenizer_uri)
    dtype = token_dtype(tokenizer.vocab_size)
    documents: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
    doc_ids: dict[Split, list[str]] = {split: [] for split in SPLITS}
    num_bytes = dict.fromkeys(SPLITS, 0)
    for batch in read_documents(job.corpus_uri, name):
        encoded = tokenizer.encode_batch([text for _, text in batch])
        for (doc_id, text), ids in zip(batch, encoded, strict=True):
            split = split_of(doc_id, job)
            documents[split].append(np.array([tokenizer.bos_id, *ids], dtype))
            doc_ids[split].append(doc_id)
            num_bytes[split] += len(text.encode())
    for split in SPLITS:
        if documents[split]:
            uri = storage.join(job.output_uri, split, name + SHARD_SUFFIX)
            write_shard(uri, documents[split], doc_ids[split], dtype)
    counts: Counts = {
        "documents": {split: len(documents[split]) for split in SPLITS},
        "tokens": {split: sum(map(len, documents[split])) for split in SPLITS},
        "bytes": {split: num_bytes[split] for split in SPLITS},
    }
    storage.write_bytes(commit_uri(name, job), json.dumps(counts).encode())
    return counts


def commit_uri(name: str, job: TokenizeJob) -> str:
    """Return where the commit of a finished file lies."""
    return storage.join(job.work_uri, f"{name}.json")


def read_commits(names: Iterable[str], job: TokenizeJob) -> dict[str, Counts]:
    """Return the counts of the files that are finished already."""
    found = {entry.path for entry in storage.list_files(job.work_uri)}
    finished = [name for name in names if f"{name}.json" in found]
    return {name: json.loads(storage.read_bytes(commit_uri(name, job))) for name in finished}


def sum_counts(parts: Iterable[Mapping[str, Mapping[str, int]]]) -> Counts:
    """Return the sums over files."""
    total: Counts = {key: dict.fromkeys(SPLITS, 0) for key in ("documents", "tokens", "bytes")}
    for part in parts:
        for key, splits in part.items():
            for split, count in splits.items():
                total[key][split] += count
    return total
