"""The artefacts that a model is trained from must go together: what each check says when they do not."""

import json
from collections.abc import Mapping

from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint, ReferenceLogProbs, TeacherLogits, TokenShards
from ray_ds.config.model import ModelConfig
from ray_ds.config.objective import Distill
from ray_ds.config.train import TrainSettings
from ray_ds.data.rows import ROW_KIND, RowKind
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.model.hugging_face import from_hf_config
from ray_ds.model.local_folder import MODEL_FOLDER


def read_model(checkpoint: Artifact, shards: TokenShards, *, seq_len: int, step: str) -> ModelConfig:
    """Return what a checkpoint's model is, if it goes with the shards.

    Raises:
        ArtifactError: it has another tokenizer, or knows fewer tokens.
        ConfigError: rows are longer than it takes.
    """
    config = from_hf_config(json.loads(storage.read_bytes(checkpoint.path(MODEL_FOLDER, "config.json"))))
    check_same_tokenizer(checkpoint, shards)
    if config.vocab_size < shards.fact("vocab_size"):
        allowed = f"must be at least the {shards.fact('vocab_size')} tokens of the shards"
        raise ArtifactError(f"{checkpoint.uri}: vocab_size", config.vocab_size, allowed, "use a checkpoint made for it")
    if seq_len > config.max_position_embeddings:
        allowed = f"must be at most {config.max_position_embeddings}, what {checkpoint.uri} was made for"
        raise ConfigError(f"{step}.seq_len", seq_len, allowed, "lower it")
    return config


def check_same_tokenizer(artifact: Artifact, shards: TokenShards) -> None:
    """Refuse what has another tokenizer than the shards."""
    found, wanted = artifact.fact("tokenizer_digest"), shards.fact("tokenizer_digest")
    if found != wanted:
        allowed = f"must have the tokenizer of the shards, {wanted}, or its tokens mean other text"
        raise ArtifactError(artifact.uri, f"tokenizer {found}", allowed, "tokenize the text with its own tokenizer")


def row_kind(shards: TokenShards) -> RowKind:
    """Return how the documents of shards become rows."""
    kind: RowKind = shards.manifest.facts.get(ROW_KIND, "stream")  # type: ignore[assignment]
    return kind


def check_row_kind(shards: TokenShards, settings: TrainSettings, step: str) -> RowKind:
    """Return how the shards become rows.

    Raises:
        ConfigError: the objective wants other shards.
    """
    kind = row_kind(shards)
    if (kind == "preference") != (settings.objective.kind == "dpo"):
        allowed = "must be dpo on preference shards, and only there; these are " + kind
        raise ConfigError(f"{step}.objective.kind", settings.objective.kind, allowed, "name other shards in `from`")
    check_document_mask(settings.document_mask, kind, step)
    return kind


def check_document_mask(document_mask: bool, kind: RowKind, step: str) -> None:
    """Refuse a mask where rows have one of their own."""
    if document_mask and kind != "stream":
        allowed = "has no effect on conversations, which never see each other"
        raise ConfigError(f"{step}.document_mask", True, allowed, "remove it")


def check_teacher_logits(logits: TeacherLogits, shards: TokenShards, settings: TrainSettings, step: str) -> None:
    """Refuse logits that a teacher did not say to the rows that are trained on.

    Raises:
        ArtifactError: they are of other shards or tokens, or lie on an object store where the shards do not.
        ConfigError: rows, or the temperature, are others.
    """
    assert isinstance(settings.objective, Distill), "the recipe was checked"
    shared: dict[str, JsonValue] = {
        "seq_len": settings.seq_len,
        "document_mask": settings.document_mask,
        "objective.temperature": settings.objective.temperature,
    }
    _check_stored(logits, shards, shared, step, key="teacher", name="the logits")


def check_reference(
    reference: ReferenceLogProbs, start: Checkpoint, shards: TokenShards, settings: TrainSettings, step: str
) -> None:
    """Refuse log-probabilities of another model than training starts from, or of other rows than it reads.

    Raises:
        ArtifactError: they are another model's, of other pairs or tokens, or of pairs in another chat template; or they
            lie on an object store where the shards do not.
        ConfigError: rows are others.
    """
    _check_stored(reference, shards, {"seq_len": settings.seq_len}, step, key="reference", name="the log-probabilities")
    action = "name that one in `init_from`, or store the log-probabilities of this one"
    _check_made_from(reference, start, "that training starts from", action)


def _check_stored(
    stored: TeacherLogits | ReferenceLogProbs,
    shards: TokenShards,
    shared: Mapping[str, JsonValue],
    step: str,
    *,
    key: str,
    name: str,
) -> None:
    """Refuse what was not said to the rows that are trained on.

    Args:
        shared: settings of the train step that must be those it was stored with.
        key: what the step names it by.
    """
    check_same_tokenizer(stored, shards)
    action = f"name both in `from`, or store {name} of these shards"
    _check_made_from(stored, shards, "that are trained on", action)
    if storage.is_remote(stored.uri) and not storage.is_remote(shards.uri):
        allowed = "must lie on a disk where the shards do"
        raise ArtifactError(key, stored.uri, allowed, "copy them there, or the shards to the object store")
    for field, own in shared.items():
        found = stored.fact(field.rsplit(".", 1)[-1])
        if own != found:
            raise ConfigError(f"{step}.{field}", own, f"must be that of {name}, {found}", "correct one")


def _check_made_from(artifact: Artifact, wanted: TokenShards | Checkpoint, which: str, action: str) -> None:
    """Refuse an artefact one of whose inputs has other content than it should."""
    found = next(ref for ref in artifact.manifest.inputs if ref.kind == wanted.kind)
    if found.content_sha256 != wanted.content_sha256:
        name = "shards" if wanted.kind == TokenShards.kind else "checkpoint"
        value = f"made from the {name} {found.uri}, {found.content_sha256[:12]}"
        allowed = f"must be made from the {name} {which}, {wanted.uri}, {wanted.content_sha256[:12]}"
        raise ArtifactError(artifact.uri, value, allowed, action)
