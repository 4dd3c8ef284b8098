"""Artefacts: folders that stages hand to each other, finished when their manifest is there and matches."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import pydantic
from pydantic import JsonValue

from ray_ds import storage
from ray_ds.errors import ArtifactError

MANIFEST = "manifest.json"
DIGEST_LENGTH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactRef:
    """How one artefact points at another."""

    kind: str
    uri: str
    digest: str
    content_sha256: str
    """Of the names and hashes of its files: the same if it is made anew to the same bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileInfo:
    """A file of an artefact; `path` is relative to the artefact's folder."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A raw input file that an artefact was made from."""

    uri: str
    bytes: int
    sha256: str
    source: str
    licence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The common head of every artefact; written last, read first."""

    kind: str
    digest: str
    """Of the stage, its version, the settings that can change the output, and the digests of the inputs."""
    step: str
    stage: str
    stage_version: int
    settings: JsonValue
    inputs: tuple[ArtifactRef, ...]
    sources: tuple[SourceFile, ...]
    files: tuple[FileInfo, ...]
    facts: Mapping[str, JsonValue]
    """What this kind counts: documents, tokens, steps, sizes."""
    seconds: float
    """Wall-clock time of the run that finished it."""
    package_version: str


_MANIFEST_ADAPTER = pydantic.TypeAdapter(Manifest)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A finished artefact: where it is and what its manifest says. Its subclasses are the kinds."""

    kind: ClassVar[str] = ""
    uri: str
    manifest: Manifest

    def path(self, *parts: str) -> str:
        """Return the URI of a file in the artefact."""
        return storage.join(self.uri, *parts)

    @property
    def digest(self) -> str:
        """What the artefact was made from, in 16 hexadecimal digits."""
        return self.manifest.digest

    @property
    def content_sha256(self) -> str:
        """The sha256 of the names and hashes of its files."""
        listing = "".join(f"{info.sha256}  {info.path}\n" for info in self.manifest.files)
        return hashlib.sha256(listing.encode()).hexdigest()

    def ref(self) -> ArtifactRef:
        """Return the pointer that a descendant's manifest keeps."""
        return ArtifactRef(kind=self.kind, uri=self.uri, digest=self.digest, content_sha256=self.content_sha256)

    def fact(self, *names: str) -> Any:
        """Return a (nested) fact of the manifest."""
        value: Any = self.manifest.facts
        for name in names:
            value = value[name]
        return value

    def input_digest(self, kind: str) -> str:
        """Return the digest of the input of one kind."""
        return next(ref.digest for ref in self.manifest.inputs if ref.kind == kind)

    def verify_files(self) -> None:
        """Check every file against the manifest's sha256.

        Raises:
            ArtifactError: a file is missing or differs.
        """
        for info in self.manifest.files:
            uri = self.path(info.path)
            found = storage.sha256_file(uri) if storage.exists(uri) else "missing"
            if found != info.sha256:
                raise _damaged(
                    uri, f"sha256 {found[:12]}", f"must have sha256 {info.sha256[:12]}, as its manifest says", self.uri
                )


class Corpus(Artifact):
    """Clean documents: `documents-*.parquet` with doc_id, text, source, licence, language."""

    kind = "Corpus"


class Tokenizer(Artifact):
    """A byte-level BPE: `tokenizer.json`, and `chat_template.jinja` for conversations with its role tokens."""

    kind = "Tokenizer"


class TokenShards(Artifact):
    """Token ids: `train/*.arrow`, `validation/*.arrow` and a copy of `tokenizer.json`; of conversations also
    `chat_template.jinja`, and in the shards which tokens are learnt."""

    kind = "TokenShards"


class Checkpoint(Artifact):
    """A trained model: `model/` in Hugging Face's layout with `tokenizer.json`, `metrics.jsonl`, `curve.png`; with LoRA
    also `adapter/` in PEFT's."""

    kind = "Checkpoint"


class TeacherLogits(Artifact):
    """What a teacher says to the rows of token shards: its largest logits in `train/*.arrow`, `validation/*.arrow`."""

    kind = "TeacherLogits"


class ReferenceLogProbs(Artifact):
    """What DPO's reference says to pairs of answers: log-probabilities in `train/*.arrow`, `validation/*.arrow`."""

    kind = "ReferenceLogProbs"


class QuantizedModel(Artifact):
    """An INT8 model: `model/` in the compressed-tensors layout with `tokenizer.json`."""

    kind = "QuantizedModel"


class EvalReport(Artifact):
    """How good a model is: `report.json`, and `items.parquet` with what came of each item of its tasks."""

    kind = "EvalReport"


class Endpoint(Artifact):
    """A served model: its address is a fact; it is finished only while `/health` answers with its digest."""

    kind = "Endpoint"


KINDS: Mapping[str, type[Artifact]] = {
    cls.kind: cls
    for cls in (
        Corpus,
        Tokenizer,
        TokenShards,
        Checkpoint,
        TeacherLogits,
        ReferenceLogProbs,
        QuantizedModel,
        EvalReport,
        Endpoint,
    )
}

A = TypeVar("A", bound=Artifact)


def make_digest(content: JsonValue) -> str:
    """Return the first 16 hexadecimal digits of the sha256 of canonical JSON."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:DIGEST_LENGTH]


def folder_digest(uri: str) -> str:
    """Return the digest that an artefact's folder is named by."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def find_artifact(uri: str) -> Artifact | None:
    """Return the artefact in a folder, or None where it is unfinished (it has no manifest).

    Raises:
        ArtifactError: the manifest is damaged, belongs to another folder, or a file it names is missing or cut.
    """
    manifest_uri = storage.join(uri, MANIFEST)
    if not storage.exists(manifest_uri):
        return None
    data = storage.read_bytes(manifest_uri)
    try:
        manifest = _MANIFEST_ADAPTER.validate_json(data)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise _damaged(manifest_uri, f"{len(data)} bytes", f"must be a manifest ({reason})", uri) from error
    expected = folder_digest(uri)
    if manifest.digest != expected:
        raise ArtifactError(
            manifest_uri,
            f"digest {manifest.digest}",
            f"must have the digest of its folder, {expected}: it is an artefact of another recipe",
            "put it back where it was made, or delete this folder to make the step anew",
        )
    if manifest.kind not in KINDS:
        raise _damaged(manifest_uri, f"kind {manifest.kind}", f"must be one of {', '.join(KINDS)}", uri)
    _check_sizes(uri, manifest)
    return KINDS[manifest.kind](uri=uri, manifest=manifest)


def open_artifact(uri: str, kinds: Sequence[type[A]]) -> A:
    """Return the finished artefact in a folder.

    Raises:
        ArtifactError: it is unfinished, damaged or of a kind that is not among `kinds`.
    """
    found = find_artifact(uri)
    names = " or ".join(kind.kind for kind in kinds)
    if found is None:
        raise ArtifactError(uri, "no manifest", f"must be a finished {names}", "run the step that makes it first")
    for kind in kinds:
        if isinstance(found, kind):
            return found
    raise ArtifactError(uri, found.kind, f"must be a {names}", "name another step or folder in `from`")


def check_input(descendant: str, ref: ArtifactRef, found: Artifact) -> None:
    """Check that an artefact's input is still the one it was made from.

    Args:
        descendant: URI of the artefact that `ref` is of.
    Raises:
        ArtifactError: the input was made anew to other bytes.
    """
    if found.content_sha256 != ref.content_sha256:
        raise ArtifactError(
            f"{descendant}/{MANIFEST}: input {ref.uri}",
            f"content {found.content_sha256[:12]}",
            f"must have content {ref.content_sha256[:12]}, which this was made from; the input was made anew since",
            f"delete {descendant} and run the recipe again",
        )


def _check_sizes(uri: str, manifest: Manifest) -> None:
    sizes = {entry.path: entry.bytes for entry in storage.list_files(uri)}
    for info in manifest.files:
        found = sizes.get(info.path)
        if found != info.bytes:
            value = "missing" if found is None else f"{found} bytes"
            raise _damaged(
                storage.join(uri, info.path), value, f"must have {info.bytes} bytes, as its manifest says", uri
            )


def _damaged(field: str, value: str, allowed: str, folder: str) -> ArtifactError:
    return ArtifactError(field, value, allowed, f"restore it, or delete {folder} to make the step anew")
