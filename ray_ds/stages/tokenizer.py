"""The tokenizer stage: Corpus -> Tokenizer, in one Ray task that uses the cores of its node."""

import time
from collections.abc import Iterator

import ray
from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import Artifact, Corpus
from ray_ds.chat.template import ROLE_TEMPLATE, TEMPLATE_FILE
from ray_ds.config.tokenizer import TokenizerSettings
from ray_ds.data.documents import file_names, hash_fraction, read_documents
from ray_ds.errors import ConfigError
from ray_ds.logs import log_event
from ray_ds.on_ray.preflight import check_shared
from ray_ds.on_ray.user_errors import user_errors
from ray_ds.stage_run import StageRun
from ray_ds.tokenizer import ROUND_TRIP_PROBES, train_bpe


def train_tokenizer(settings: TokenizerSettings, run: StageRun) -> Artifact:
    """Learn a byte-level BPE from a sample of the corpus, check that text comes back from it, and write it.

    Raises:
        ArtifactError: the corpus is damaged.
        ConfigError: the sample is empty.
        InputError: a text does not come back unchanged.
    """
    started = time.monotonic()
    corpus = run.input(Corpus)
    check_shared(run.run_dir)
    corpus.verify_files()  # last, for it reads the whole corpus
    task = ray.remote(num_cpus=1)(learn)
    with user_errors():
        facts: dict[str, JsonValue] = ray.get(task.remote(settings, corpus, run.step, run.path("tokenizer.json")))
    if facts["vocab_size"] != settings.vocab_size:
        log_event("vocabulary_is_smaller", asked=settings.vocab_size, got=facts["vocab_size"], reason="small sample")
    storage.write_bytes(run.path(TEMPLATE_FILE), ROLE_TEMPLATE.encode())
    return run.commit(facts, seconds=time.monotonic() - started)


def learn(settings: TokenizerSettings, corpus: Corpus, step: str, uri: str) -> dict[str, JsonValue]:
    """Write a tokenizer learned from a sample of the corpus to `uri`; return the artefact's facts.

    Raises:
        ConfigError: the sample is empty.
        InputError: a text does not come back unchanged.
    """
    sample = _Sample(settings, corpus)
    tokenizer = train_bpe(sample.texts(), settings.vocab_size)
    if not sample.num_documents:
        allowed = "must be enough for a document"
        raise ConfigError(f"{step}.sample_bytes", settings.sample_bytes, allowed, "raise it, or choose another seed")
    tokenizer.check_round_trip([(f"probe {i}", text) for i, text in enumerate(ROUND_TRIP_PROBES)])
    num_tokens = tokenizer.check_round_trip(sample.checked)
    storage.write_bytes(uri, tokenizer.to_json().encode())
    checked_bytes = sum(len(text.encode()) for _, text in sample.checked)
    return {
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": round(checked_bytes / max(num_tokens, 1), 4),
        "sample": {"documents": sample.num_documents, "bytes": sample.num_bytes},
    }


class _Sample:
    """The documents that a tokenizer learns from, and those of them that it is checked with."""

    def __init__(self, settings: TokenizerSettings, corpus: Corpus) -> None:
        self._corpus = corpus
        self._seed = settings.seed
        self._fraction = settings.sample_bytes / max(corpus.fact("bytes"), 1)
        expected = corpus.fact("documents", "kept") * min(self._fraction, 1.0)
        self._checked_fraction = self._fraction * settings.check_documents / max(expected, 1)
        self.num_documents = 0
        self.num_bytes = 0
        self.checked: list[tuple[str, str]] = []

    def texts(self) -> Iterator[str]:
        """Yield the sample's texts in the order of the corpus."""
        for name in file_names(self._corpus):
            for batch in read_documents(self._corpus.uri, name):
                for doc_id, text in batch:
                    place = hash_fraction(doc_id, "tokenizer", self._seed)
                    if place >= self._fraction:
                        continue
                    if place < self._checked_fraction or not self.checked:
                        self.checked.append((doc_id, text))
                    self.num_documents += 1
                    self.num_bytes += len(text.encode())
                    yield text
