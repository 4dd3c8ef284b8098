"""One run of one step: from its inputs to an artefact, which is finished when its manifest is written."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from ray_ds import __version__, storage
from ray_ds.artifacts import KINDS, MANIFEST, A, Artifact, FileInfo, Manifest, SourceFile, open_artifact

WORK = "work"
"""The folder inside an artefact's folder that holds a stage's unfinished pieces; it is no part of the artefact."""


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One run of one step: where it writes, what it reads, and how it commits."""

    step: str
    stage: str
    stage_version: int
    kind: str
    """The kind of artefact it makes."""
    run_dir: str
    """The recipe's run directory, which every node reads."""
    uri: str
    """The artefact's folder, `<run_dir>/<step>/<digest>`."""
    digest: str
    settings: JsonValue
    inputs: tuple[Artifact, ...]
    """One for each group of kinds that the stage reads."""
    named: Mapping[str, Artifact] = dataclasses.field(default_factory=dict)
    """Further inputs, by the key of the step that names them, such as `init_from`."""
    check_alone: Callable[[], None] = lambda: None
    """Raises where another job has taken over this run; may be sent to another process. Call it right before what that
    job must not find written or deleted."""

    def input(self, *kinds: type[A]) -> A:
        """Return the input artefact that is of one of the given kinds."""
        for artifact in self.inputs:
            if isinstance(artifact, kinds):
                return artifact
        raise AssertionError(f"step {self.step} reads no {' or '.join(kind.kind for kind in kinds)}")

    def path(self, *parts: str) -> str:
        """Return the URI of a file of the artefact."""
        return storage.join(self.uri, *parts)

    def work_path(self, *parts: str) -> str:
        """Return the URI of an unfinished piece, which is no part of the artefact."""
        return storage.join(self.uri, WORK, *parts)

    def commit(self, facts: Mapping[str, JsonValue], *, seconds: float, sources: Sequence[SourceFile] = ()) -> Artifact:
        """Hash the folder's files, write the manifest last and atomically, and return the finished artefact.

        Raises:
            TakenOverError: another job has taken over this run; no manifest is written.
        """
        entries = [
            entry
            for entry in storage.list_files(self.uri)
            if entry.path != MANIFEST and not entry.path.startswith(f"{WORK}/")
        ]
        files = tuple(
            FileInfo(path=entry.path, bytes=entry.bytes, sha256=storage.sha256_file(self.path(entry.path)))
            for entry in entries
        )
        manifest = Manifest(
            kind=self.kind,
            digest=self.digest,
            step=self.step,
            stage=self.stage,
            stage_version=self.stage_version,
            settings=self.settings,
            inputs=tuple(artifact.ref() for artifact in (*self.inputs, *self.named.values())),
            sources=tuple(sources),
            files=files,
            facts=facts,
            seconds=round(seconds, 3),
            package_version=__version__,
        )
        data = json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False).encode()
        self.check_alone()
        storage.write_bytes(self.path(MANIFEST), data + b"\n")
        return open_artifact(self.uri, [KINDS[self.kind]])
