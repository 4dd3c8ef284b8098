"""Turning one file of conversations into token shards."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ray_ds.artifacts import SourceFile
from ray_ds.chat.encoding import ChatEncoder
from ray_ds.chat.template import ChatTemplate
from ray_ds.data.clean_text import Publish
from ray_ds.data.conversations import encode_record, read_records
from ray_ds.data.documents import hash_fraction
from ray_ds.data.shard_file import encode_shard, token_dtype
from ray_ds.data.shards import SHARD_SUFFIX, SPLITS, Split
from ray_ds.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ChatJob:
    """What every file needs to become shards."""

    tokenizer_uri: str
    template: str
    """The template's text."""
    task: Literal["chat", "preference"]
    validation_fraction: float
    seed: int


def tokenize_chat_file(file: tuple[str, SourceFile], publish: Publish, job: ChatJob) -> dict[str, Any]:
    """Publish a file's shard of each split that it has conversations of; return what they hold.

    A record is one document, or of `preference` two that follow each other, the better answer first; its id is the
    file's sha256 and the record's number. Records that are equal are held out together.

    Raises:
        InputError: a record is damaged.
    """
    name, source = file
    tokenizer = load_tokenizer(job.tokenizer_uri)
    encoder = ChatEncoder(ChatTemplate(job.template), tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    documents: dict[Split, list[Any]] = {split: [] for split in SPLITS}
    masks: dict[Split, list[Any]] = {split: [] for split in SPLITS}
    ids: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for number, (place, record) in enumerate(read_records(source.uri)):
        key = json.dumps(record, sort_keys=True, default=str)
        is_held_out = hash_fraction(key, "validation", job.seed) < job.validation_fraction
        split: Split = "validation" if is_held_out else "train"
        for chat in encode_record(record, place, encoder, job.task):
            documents[split].append(np.array(chat.tokens, dtype))
            masks[split].append(np.array(chat.is_answer, np.uint8))
            ids[split].append(f"{source.sha256[:12]}-{number}")
    for split in SPLITS:
        if documents[split]:
            data = encode_shard(documents[split], ids[split], dtype, masks[split])
            publish(f"{split}/{name}{SHARD_SUFFIX}", data)
    return {
        "documents": {split: len(documents[split]) for split in SPLITS},
        "tokens": {split: sum(map(len, documents[split])) for split in SPLITS},
        "targets": {split: sum(int(mask[1:].sum()) for mask in masks[split]) for split in SPLITS},
    }
