"""The tokenize_chat stage: conversations + Tokenizer -> TokenShards of whole conversations, on Ray Data.

Each file is a work unit whose task writes a shard of each split. Beside each token a shard says whether it is an
answer's, which alone is learnt (`loss_mask`).
"""

import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import Artifact, SourceFile, Tokenizer, make_digest
from ray_ds.chat.template import DEFAULT_TEMPLATE, TEMPLATE_FILE, ChatTemplate
from ray_ds.config.tokenize_chat import TokenizeChatSettings
from ray_ds.data.chat_shards import ChatJob, tokenize_chat_file
from ray_ds.data.conversations import find_sources
from ray_ds.data.rows import ROW_KIND
from ray_ds.data.shards import SHARD_TOKENS, SPLITS
from ray_ds.data.tokenization import count_shards
from ray_ds.errors import ConfigError
from ray_ds.on_ray.preflight import check_shared
from ray_ds.on_ray.units import Publish, WorkUnit, run_units
from ray_ds.stage_run import WORK, StageRun

TOKENIZE_FOLDER = f"{WORK}/tokenize_chat"


def tokenize_chat(settings: TokenizeChatSettings, run: StageRun) -> Artifact:
    """Turn each file of conversations into a shard of each split; files that are done are not done again.

    Raises:
        ArtifactError: the tokenizer is damaged.
        ConfigError: a split is empty.
        InputError: a file is missing or damaged, or the template is no jinja.
    """
    started = time.monotonic()
    tokenizer = run.input(Tokenizer)
    sources = find_sources(settings)
    template = find_template(settings, tokenizer)
    ChatTemplate(template)
    check_shared(run.run_dir)
    tokenizer.verify_files()
    job = ChatJob(
        tokenizer_uri=tokenizer.path("tokenizer.json"),
        template=template,
        task=settings.task,
        validation_fraction=settings.validation_fraction,
        seed=settings.seed,
    )
    files = sources if settings.template is None else sources[:-1]
    commits = run_units(
        [_unit(number, source, tokenizer, template) for number, source in enumerate(files)],
        partial(_tokenize_unit, job=job),
        root=run.uri,
        folder=TOKENIZE_FOLDER,
        step=run.step,
        max_running=settings.max_running_units,
    )
    parts: Mapping[str, Mapping[str, Any]] = {commit.unit: commit.facts for commit in commits}
    counts = {name: sum_splits(part[name] for part in parts.values()) for name in ("documents", "tokens", "targets")}
    check_counts(counts["documents"], settings, run.step)
    facts = {
        "vocab_size": tokenizer.fact("vocab_size"),
        "tokenizer_digest": tokenizer.digest,
        ROW_KIND: settings.task,
        **counts,
        SHARD_TOKENS: count_shards(parts),
    }
    storage.write_bytes(run.path("tokenizer.json"), storage.read_bytes(job.tokenizer_uri))
    storage.write_bytes(run.path(TEMPLATE_FILE), template.encode())
    return run.commit(facts, seconds=time.monotonic() - started, sources=sources)


def find_template(settings: TokenizeChatSettings, tokenizer: Tokenizer) -> str:
    """Return the settings' chat template, or the tokenizer's, or our own."""
    own = tokenizer.path(TEMPLATE_FILE)
    uri = settings.template or (own if storage.exists(own) else None)
    return DEFAULT_TEMPLATE if uri is None else storage.read_bytes(uri).decode()


def _unit(number: int, source: SourceFile, tokenizer: Tokenizer, template: str) -> WorkUnit[tuple[str, SourceFile]]:
    name = f"{number:05d}"
    input_hash = make_digest([source.sha256, tokenizer.content_sha256, template])
    return WorkUnit(name=name, input_hash=input_hash, payload=(name, source))


def _tokenize_unit(file: tuple[str, SourceFile], publish: Publish, job: ChatJob) -> dict[str, JsonValue]:
    return tokenize_chat_file(file, publish, job)


def sum_splits(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums over files of what they have of each split."""
    listed = list(counts)
    return {split: sum(of_file[split] for of_file in listed) for split in SPLITS}


def check_counts(documents: Mapping[str, int], settings: TokenizeChatSettings, step: str) -> None:
    """Make sure that no split is empty."""
    for split in SPLITS:
        if not documents[split]:
            raise ConfigError(
                f"{step}.validation_fraction",
                settings.validation_fraction,
                f"must leave conversations for {split}; it has none (seed = {settings.seed})",
                f"{'raise' if split == 'validation' else 'lower'} it, choose another seed, or give more conversations",
            )
