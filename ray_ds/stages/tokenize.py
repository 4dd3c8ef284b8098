"""The tokenize stage: Corpus + Tokenizer -> TokenShards, on Ray Data.

Each file of the corpus is a work unit (`on_ray/units.py`) whose task writes a shard of each split. So shards follow the
files of the corpus and not Ray Data's blocks, whose layout depends on cluster and version (Ray 2.60).
"""

import os
import time
from functools import partial
from typing import Any

from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint, Corpus, Tokenizer, make_digest
from ray_ds.config.tokenize import TokenizeSettings
from ray_ds.data.documents import file_names, file_path
from ray_ds.data.shards import SHARD_TOKENS, SPLITS
from ray_ds.data.tokenization import Counts, TokenizeJob, count_shards, sum_counts, tokenize_file
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.on_ray.preflight import check_shared
from ray_ds.on_ray.units import Publish, WorkUnit, run_units
from ray_ds.stage_run import WORK, StageRun
from ray_ds.tokenizer import load_tokenizer
from ray_ds.tokenizer_files import TOKENIZER_FILE, copy_tokenizer

TOKENIZE_FOLDER = f"{WORK}/tokenize"


def tokenize(settings: TokenizeSettings, run: StageRun) -> Artifact:
    """Turn each file of the corpus into a shard of each split; files that are done already are not done again.

    Raises:
        ArtifactError: an input is damaged, or the tokenizer was trained on another corpus.
        ConfigError: a split is empty, or groups are asked for where documents have none.
    """
    started = time.monotonic()
    corpus, tokenizer = run.input(Corpus), run.input(Tokenizer, Checkpoint)
    folder, tokenizer_digest = find_tokenizer(tokenizer)
    check_same_corpus(corpus, tokenizer)
    check_shared(run.run_dir)
    for artifact in (tokenizer, corpus):
        artifact.verify_files()  # last, for it reads the whole corpus
    job = TokenizeJob(
        step=run.step,
        corpus_uri=corpus.uri,
        tokenizer_uri=storage.join(folder, TOKENIZER_FILE),
        validation_fraction=settings.validation_fraction,
        hold_out=settings.hold_out,
        seed=settings.seed,
    )
    commits = run_units(
        plan_units(corpus, tokenizer),
        partial(_tokenize_unit, job=job),
        root=run.uri,
        folder=TOKENIZE_FOLDER,
        step=run.step,
        max_running=settings.max_running_units,
    )
    counts = sum_counts(commit.facts for commit in commits)
    check_counts(counts, corpus, settings, run.step)
    # A model learns a new tokenizer's template from conversations only; a checkpoint's has learnt it.
    copy_tokenizer(folder, run.uri, with_template=isinstance(tokenizer, Checkpoint))
    facts: dict[str, Any] = {
        "vocab_size": load_tokenizer(job.tokenizer_uri).vocab_size,
        "tokenizer_digest": tokenizer_digest,
        **counts,
        SHARD_TOKENS: count_shards({commit.unit: commit.facts for commit in commits}),
    }
    return run.commit(facts, seconds=time.monotonic() - started)


def find_tokenizer(artifact: Artifact) -> tuple[str, str]:
    """Return the folder of an artefact's tokenizer, and the digest that says which tokenizer it is.

    A Checkpoint has the tokenizer it was trained or imported with.
    """
    if isinstance(artifact, Checkpoint):
        return artifact.path("model"), artifact.fact("tokenizer_digest")
    return artifact.uri, artifact.digest


def plan_units(corpus: Corpus, tokenizer: Artifact) -> list[WorkUnit[str]]:
    """Return a work unit for each file of the corpus."""
    sha256 = {info.path: info.sha256 for info in corpus.manifest.files}
    return [
        WorkUnit(name=name, input_hash=make_digest([sha256[file_path(name)], tokenizer.content_sha256]), payload=name)
        for name in file_names(corpus)
    ]


def _tokenize_unit(name: str, publish: Publish, job: TokenizeJob) -> dict[str, JsonValue]:
    # One CPU is reserved; without this the Rust library would start a thread for every core of the node.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    facts: dict[str, Any] = {**tokenize_file(name, publish, job)}
    return facts


def check_same_corpus(corpus: Corpus, tokenizer: Artifact) -> None:
    """Refuse a tokenizer that was trained on another corpus; a checkpoint's stays with its model, whatever the text."""
    if isinstance(tokenizer, Checkpoint):
        return
    trained_on = tokenizer.input_digest("Corpus")
    if trained_on != corpus.digest:
        raise ArtifactError(
            tokenizer.uri,
            f"trained on corpus {trained_on}",
            f"must be trained on the corpus that is tokenized, {corpus.digest}",
            "name both in `from`, or run the tokenizer step on this corpus",
        )


def check_counts(counts: Counts, corpus: Corpus, settings: TokenizeSettings, step: str) -> None:
    """Make sure that no document is lost and no split is empty."""
    documents = counts["documents"]
    if sum(documents.values()) != corpus.fact("documents", "kept"):
        allowed = f"must have {corpus.fact('documents', 'kept')} documents, as its manifest says"
        raise ArtifactError(corpus.uri, sum(documents.values()), allowed, "run the clean step again")
    for split in SPLITS:
        if not documents[split]:
            raise ConfigError(
                f"{step}.validation_fraction",
                settings.validation_fraction,
                f"must leave documents for {split}: of {sum(documents.values())} it has none "
                f"(hold_out = {settings.hold_out}, seed = {settings.seed})",
                f"{'raise' if split == 'validation' else 'lower'} it, choose another seed, or give more text",
            )
