"""Clean raw text: files of any quality become a corpus of documents worth learning from.

    raw files ─plan→ work units ─clean→ parts + keys ─compare keys→ duplicates ─write→ documents-*.parquet

Each work unit is read, mended, judged and masked by one task, and committed (`on_ray/units.py`). Exact duplicates are
found on the driver, from keys of 16 bytes a document. Text is never shuffled. What was damaged lies in `quarantine/`,
what was dropped and why in `report.json`.
"""

import json
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import Artifact
from ray_ds.config.clean import CleanSettings
from ray_ds.data.clean_text import clean_unit
from ray_ds.data.corpus_files import CorpusFile, Part, decode_parts, plan_corpus, summarise, write_corpus_file
from ray_ds.data.counts import Counts, counts_from_json, counts_to_json, merge_counts
from ray_ds.data.exact import find_duplicates, unpack_keys
from ray_ds.data.readers import check_columns
from ray_ds.data.units import Unit, find_input_files, fingerprint_inputs, plan_units
from ray_ds.errors import InputError
from ray_ds.logs import log_event
from ray_ds.on_ray.preflight import check_shared
from ray_ds.on_ray.units import Commit, Publish, WorkUnit, run_units
from ray_ds.stage_run import WORK, StageRun

CLEAN_FOLDER = f"{WORK}/clean"
PARTS_FOLDER = f"{WORK}/parts"
WRITE_FOLDER = f"{WORK}/write"


def clean(settings: CleanSettings, run: StageRun) -> Artifact:
    """Make a Corpus of the raw files that the settings name.

    Raises:
        ConfigError, InputError: input is missing, empty or lacks a column; too much of it is damaged; nothing is kept.
        LostRecordsError: in = kept + dropped + quarantined does not hold.
    """
    started = time.monotonic()
    sources = fingerprint_inputs(settings)
    check_columns(find_input_files(settings))
    units = plan_units(settings, sources)
    check_shared(run.run_dir)
    log_event("clean_planned", files=len(sources), bytes=sum(source.bytes for source in sources), units=len(units))

    cleaned = _run_clean(units, settings, run)
    counts = merge_counts(counts_from_json(commit.facts["counts"]) for commit in cleaned)
    _check_quarantined(counts, settings, run.uri)

    parts = [part for commit in cleaned for part in decode_parts(commit.facts["parts"])]
    duplicates = _find_duplicates(parts, settings, run)
    files = plan_corpus(parts, duplicates, settings.unit_bytes)
    _check_not_empty(files, counts)
    written = _run_write(files, settings, run)

    facts = summarise(counts, [commit.facts for commit in written], sum(int(mask.sum()) for mask in duplicates))
    report = {"facts": facts, "counts": counts_to_json(counts)}
    storage.write_bytes(run.path("report.json"), json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    corpus = run.commit(facts, seconds=time.monotonic() - started, sources=sources)
    storage.delete_folder(run.path(PARTS_FOLDER))
    return corpus


def _run_clean(units: Sequence[Unit], settings: CleanSettings, run: StageRun) -> list[Commit]:
    """Clean every work unit into parts and a share of the quarantine."""
    return run_units(
        [WorkUnit(name=unit.name, input_hash=unit.input_hash, payload=unit) for unit in units],
        partial(_clean_unit, settings=settings),
        root=run.uri,
        folder=CLEAN_FOLDER,
        step=run.step,
        max_running=settings.max_running_units,
    )


def _clean_unit(unit: Unit, publish: Publish, settings: CleanSettings) -> dict[str, JsonValue]:
    return clean_unit(unit, settings, publish, folder=PARTS_FOLDER)


def _check_quarantined(counts: Counts, settings: CleanSettings, uri: str) -> None:
    """Fail when too much of the input is damaged."""
    if counts.num_quarantined > settings.max_quarantined_fraction * counts.num_in:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.quarantined.items()))
        raise InputError(
            "records in quarantine",
            f"{counts.num_quarantined} of {counts.num_in}: {reasons}",
            f"must be at most the share max_quarantined_fraction = {settings.max_quarantined_fraction:g}",
            f"mend what {storage.join(uri, 'quarantine')} lists, or raise max_quarantined_fraction",
        )


def _check_not_empty(files: Sequence[CorpusFile], counts: Counts) -> None:
    """Fail when nothing is kept."""
    if not files:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.dropped.items())) or "no records"
        raise InputError(
            "documents kept",
            f"0 of {counts.num_in}: {reasons}",
            "must be one or more",
            "check the text column and `languages`; the rules are described in ray_ds/data/filters.py",
        )


def _find_duplicates(parts: Sequence[Part], settings: CleanSettings, run: StageRun) -> list[NDArray[np.bool_]]:
    """Return for each part which rows to leave out."""
    if not settings.exact_duplicates:
        return [np.zeros(part.num_rows, dtype=bool) for part in parts]
    return find_duplicates([unpack_keys(storage.read_bytes(run.path(f"{part.path}.keys"))) for part in parts])


def _run_write(files: Sequence[CorpusFile], settings: CleanSettings, run: StageRun) -> list[Commit]:
    """Write the corpus without its duplicates."""
    return run_units(
        [WorkUnit(name=file.name, input_hash=file.input_hash, payload=file) for file in files],
        partial(write_corpus_file, root=run.uri),
        root=run.uri,
        folder=WRITE_FOLDER,
        step=run.step,
        max_running=settings.max_running_units,
    )
