"""The tokenize stage: Corpus + Tokenizer -> TokenShards, on Ray Data."""

import functools
import json
import os
import time
from typing import Any

import ray.data

from ray_ds import storage
from ray_ds.artifacts import Artifact, Corpus, StageRun, Tokenizer
from ray_ds.config.tokenize import TokenizeSettings
from ray_ds.data.documents import file_names
from ray_ds.data.shards import SPLITS
from ray_ds.data.tokenization import Counts, TokenizeJob, read_commits, sum_counts, tokenize_file
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.logs import Progress
from ray_ds.on_ray.preflight import check_shared
from ray_ds.on_ray.user_errors import user_errors


def tokenize(settings: TokenizeSettings, run: StageRun) -> Artifact:
    """Turn each file of the corpus into a shard of each split; files that are done already are not done again."""
    started = time.monotonic()
    corpus, tokenizer = run.input(Corpus), run.input(Tokenizer)
    check_same_corpus(corpus, tokenizer)
    check_shared(run.uri.rsplit("/", 2)[0])
    job = TokenizeJob(
        step=run.step,
        corpus_uri=corpus.uri,
        tokenizer_uri=tokenizer.path("tokenizer.json"),
        output_uri=run.uri,
        work_uri=run.work_path("units"),
        validation_fraction=settings.validation_fraction,
        hold_out=settings.hold_out,
        seed=settings.seed,
    )
    names = file_names(corpus)
    finished = read_commits(names, job)
    progress = Progress(run.step, len(names))
    progress.update(len(finished))
    missing = [name for name in names if name not in finished]
    with user_errors():
        for row in _tokenize_files(missing, job, settings).iter_rows() if missing else ():
            finished[row["file"]] = json.loads(row["counts"])
            progress.update(len(finished), tokens=sum_counts(finished.values())["tokens"]["train"])
    counts = sum_counts(finished.values())
    check_counts(counts, corpus, settings, run.step)
    storage.write_bytes(run.path("tokenizer.json"), storage.read_bytes(job.tokenizer_uri))
    facts = {"vocab_size": tokenizer.fact("vocab_size"), "tokenizer_digest": tokenizer.digest, **counts}
    return run.commit(facts, seconds=time.monotonic() - started)


def _tokenize_files(names: list[str], job: TokenizeJob, settings: TokenizeSettings) -> Any:
    """Return the lazy Ray Data dataset whose rows are the finished files: `file`, `counts`.

    Text does not pass through Ray Data: a row names a file, and its task writes the shards. So shards follow the files
    of the corpus and not Ray Data's blocks, whose layout depends on cluster and version (Ray 2.60).
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    units = ray.data.from_items([{"file": name} for name in names], override_num_blocks=max(len(names), 1))
    return units.map(functools.partial(_tokenize_row, job=job), num_cpus=1, concurrency=settings.max_running_units)


def _tokenize_row(row: dict[str, Any], job: TokenizeJob) -> dict[str, str]:
    # One CPU is reserved; without this the Rust library would start a thread for every core of the node.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return {"file": row["file"], "counts": json.dumps(tokenize_file(row["file"], job))}


def check_same_corpus(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that was trained on another corpus."""
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
