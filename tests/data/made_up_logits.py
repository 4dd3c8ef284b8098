"""Stored logits that no model said, for tests of how they are kept and read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ray_ds.artifacts import TeacherLogits
from ray_ds.data.rows import Row, Rows
from ray_ds.data.shards import Split
from ray_ds.data.stored_rows import encode_rows, plan_ranges
from ray_ds.data.teacher_logits import LogitArrays
from tests.stages.small_artifacts import stage_run

TOP_K = 3
ROWS_PER_FILE = 20


def said_to(row: Row) -> LogitArrays:
    """Return made-up logits that tell rows apart."""
    ids = (row.tokens[:, None] + np.arange(TOP_K)).astype(np.uint16)
    return LogitArrays(ids, -ids.astype(np.float16) / 64, row.targets.astype(np.float32))


def store_made_up(folder: Path, of_splits: Mapping[Split, Rows]) -> TeacherLogits:
    """Return an artefact of `said_to` for all rows of some splits."""
    run = stage_run(folder, "TeacherLogits")
    file_rows: dict[str, Any] = {}
    for split, rows in of_splits.items():
        ranges = plan_ranges(split, rows.shard_rows, ROWS_PER_FILE)
        for part in ranges:
            own = [rows.row(number) for number in range(part.first, part.stop)]
            top = LogitArrays(*(np.stack(each) for each in zip(*map(said_to, own), strict=True)))
            path = Path(run.path(split, part.file))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_rows(own, top._asdict()))
        file_rows[split] = {part.file: part.stop - part.first for part in ranges}
    artifact = run.commit({"seq_len": 16, "top_k": TOP_K, "file_rows": file_rows}, seconds=0.0)
    assert isinstance(artifact, TeacherLogits)
    return artifact
