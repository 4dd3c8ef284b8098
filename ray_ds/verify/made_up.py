"""Made-up inputs: a small text to clean, shards to train on, and a run of a stage outside any recipe."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint, make_digest
from ray_ds.config.settings import as_json
from ray_ds.config.train import TrainSettings
from ray_ds.data.sample_chinese import PARAGRAPHS
from ray_ds.data.sample_text import chinese_paragraphs, package_documents
from ray_ds.data.shard_file import token_dtype, write_shard
from ray_ds.stage_run import StageRun
from ray_ds.stage_table import find_stage
from ray_ds.tokenizer import train_bpe

TEXT_BYTES = 400_000
TEXT_FILES = 4
SHARDS = 2
SHARD_DOCUMENTS = 24
"""About 12,000 tokens a split: a run of the checks reads a few of them."""
VOCAB_SIZE = 512


def write_text(folder: str) -> int:
    """Write real text that is at hand, in a few files, and return the number of documents."""
    documents = [*_up_to(package_documents(), TEXT_BYTES), *chinese_paragraphs()]
    for number in range(TEXT_FILES):
        lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents[number::TEXT_FILES]]
        storage.write_bytes(storage.join(folder, f"text-{number}.jsonl"), "".join(lines).encode())
    return len(documents)


def _up_to(documents: Iterable[dict[str, str]], max_bytes: int) -> Iterator[dict[str, str]]:
    """Yield documents until they are more than `max_bytes`."""
    num_bytes = 0
    for document in documents:
        num_bytes += len(document["text"].encode())
        if num_bytes > max_bytes:
            return
        yield document


def write_shards(folder: str) -> int:
    """Write token shards and their tokenizer, without Ray; return the size of the vocabulary."""
    tokenizer = train_bpe(PARAGRAPHS, VOCAB_SIZE)
    texts = itertools.cycle(PARAGRAPHS)
    dtype = token_dtype(tokenizer.vocab_size)
    for split, shard in itertools.product(("train", "validation"), range(SHARDS)):
        encoded = tokenizer.encode_batch(list(itertools.islice(texts, SHARD_DOCUMENTS)))
        documents = [np.array([0, *ids], dtype) for ids in encoded]
        names = [f"{split}-{shard}-{number}" for number in range(len(documents))]
        write_shard(storage.join(folder, split, f"{shard}.arrow"), documents, names, dtype)
    storage.write_bytes(storage.join(folder, "tokenizer.json"), tokenizer.to_json().encode())
    return tokenizer.vocab_size


def make_run(folder: str, stage: str, settings: object, inputs: Sequence[Artifact] = (), *, run_dir: str) -> StageRun:
    """Return a run of a stage that writes below `folder`."""
    row = find_stage(stage)
    digest = make_digest([stage, *(artifact.digest for artifact in inputs)])
    return StageRun(
        step=f"verify-{stage}",
        stage=stage,
        stage_version=row.version,
        kind=row.writes,
        run_dir=run_dir,
        uri=storage.join(folder, stage, digest),
        digest=digest,
        settings=as_json(settings),
        inputs=tuple(inputs),
    )


def commit_model(run: StageRun, settings: TrainSettings) -> Checkpoint:
    """Make an artefact of a model that lies in a run's folder."""
    artifact = run.commit({"steps": settings.num_steps}, seconds=0.0)
    assert isinstance(artifact, Checkpoint)
    return artifact
