"""Turning one file of a corpus into token shards."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_ds.config.tokenize import HoldOut
from ray_ds.data.clean_text import Publish
from ray_ds.data.documents import group_of, hash_fraction, identity_of, read_documents
from ray_ds.data.shard_file import encode_shard, token_dtype
from ray_ds.data.shards import SHARD_SUFFIX, SPLITS, Split
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
    validation_fraction: float
    hold_out: HoldOut
    seed: int


def split_of(doc_id: str, job: TokenizeJob) -> Split:
    """Return the split a document belongs to.

    Raises:
        ConfigError: groups are asked for, and the document has none.
    """
    key = group_of(doc_id) if job.hold_out == "group" else identity_of(doc_id)
    if key is None:
        allowed = f"must be document where documents have no id of their own, such as {doc_id}"
        raise ConfigError(f"{job.step}.hold_out", job.hold_out, allowed, "name their id_column in the clean step")
    return "validation" if hash_fraction(key, "validation", job.seed) < job.validation_fraction else "train"


def tokenize_file(name: str, publish: Publish, job: TokenizeJob) -> Counts:
    """Publish a file's shard of each split that it has documents of, `<split>/<file>.arrow`; return what they hold.

    The bytes depend on the file and the job alone. Each document is BOS and its tokens; no EOS, since the next BOS ends
    it.

    Raises:
        ArtifactError: the file is damaged.
        ConfigError: groups are asked for, and a document has none.
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
            publish(f"{split}/{name}{SHARD_SUFFIX}", encode_shard(documents[split], doc_ids[split], dtype))
    return {
        "documents": {split: len(documents[split]) for split in SPLITS},
        "tokens": {split: sum(map(len, documents[split])) for split in SPLITS},
        "bytes": {split: num_bytes[split] for split in SPLITS},
    }


def count_shards(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the tokens of each shard, by split and name, from what `tokenize_file` returned for each file."""
    return {
        split: {
            f"{name}{SHARD_SUFFIX}": part["tokens"][split] for name, part in parts.items() if part["documents"][split]
        }
        for split in SPLITS
    }


def sum_counts(parts: Iterable[Mapping[str, Any]]) -> Counts:
    """Return the sums over files."""
    total: Counts = {key: dict.fromkeys(SPLITS, 0) for key in ("documents", "tokens", "bytes")}
    for part in parts:
        for key, splits in part.items():
            for split, count in splits.items():
                total[key][split] += count
    return total
