"""Checkpoints of unfinished training: plain safetensors and JSON that any number of processes can read.

    <root>/step-00000100/COMMITTED.json                          written last; the checkpoint counts from then on
    <root>/step-00000100/<attempt>/rank-00000.safetensors        what rank 0 holds; rank-00000-00001... if it is large
    <root>/step-00000100/<attempt>/rank-00000.json               what lies where in them, and their sha256
    <root>/step-00000100/<attempt>/metrics.jsonl                 the records of all steps so far

`<attempt>` is different each time a checkpoint is written, so that what a killed process left, or one that is cut off
still writes, is never mixed with anything. Each `.json` is `{"sha256":"...","content":{...}}` and a line feed; the
sha256 is that of the bytes of `content`. COMMITTED.json has as content the step, the attempt, `world_size`, `facts`
(optimizer steps, the loss scaler), `extra` (what the loop adds: cursor, seed), `validation_loss` or null, and `files`:
path below `step-...`, bytes and sha256 of every other file. rank-*.json has the rank's own files, the file of each of
its tensors, and `index`, which `train.catalog` describes: name, kind, shape and range of each run of elements, and the
tensor and place it lies at.

A folder without COMMITTED.json is torn and does not count, unless all ranks' parts are whole in it: then only the last
file is missing, and `find_latest` writes it. One whose files do not match is damaged; the one before it is taken, and
`Commit.passed_over` says so.
"""

from ray_ds.train.checkpoints.commit import COMMITTED, METRICS, Commit, checkpoint_uri
from ray_ds.train.checkpoints.folders import Verify, delete, delete_newer, find_best, find_latest, latest_step
from ray_ds.train.checkpoints.reader import CheckpointReader
from ray_ds.train.checkpoints.writer import CheckpointWriter

__all__ = [
    "COMMITTED",
    "METRICS",
    "CheckpointReader",
    "CheckpointWriter",
    "Commit",
    "Verify",
    "checkpoint_uri",
    "delete",
    "delete_newer",
    "find_best",
    "find_latest",
    "latest_step",
]
