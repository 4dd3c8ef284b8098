"""With `keep_best` a run leaves its best model: here an early one, for the validation split is of another kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from ray_ds.data.shard_file import write_shard
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.train.checkpoints.folders import committed_steps
from ray_ds.train.task import TrainTask
from tests.train.runs import VOCAB_SIZE, make_settings, make_task, read_records, train_in_processes, write_shards

pytestmark = pytest.mark.slow

SEQ_LEN = 16
SETTINGS: dict[str, Any] = {
    "steps": 11,
    "checkpoint_every": 3,
    "validate_every": 3,
    "validation_tokens": 100_000,
    "keep_checkpoints": 1,
    "keep_best": True,
}


def write_random_validation(shards: Path) -> torch.Tensor:
    """Replace the validation split by random tokens, which a model that learns to count takes for ever less likely.

    Returns:
        All its rows of tokens and the targets behind them, (rows, SEQ_LEN + 1).
    """
    rng = np.random.default_rng(1)
    rows = []
    for shard in range(2):
        documents = [np.array([0, *rng.integers(3, VOCAB_SIZE, 40)], np.uint16) for _ in range(20)]
        names = [f"validation-{shard}-{number}" for number in range(len(documents))]
        write_shard(str(shards / "validation" / f"{shard}.arrow"), documents, names, np.uint16)
        stream = np.concatenate(documents).astype(np.int64)
        starts = range(0, len(stream) - SEQ_LEN, SEQ_LEN)
        rows += [stream[start : start + SEQ_LEN + 1] for start in starts]
    return torch.from_numpy(np.stack(rows))


def loss_of_model(task: TrainTask, rows: torch.Tensor) -> float:
    """Return the mean loss of the model that a run has left."""
    decoder = load_checkpoint_folder(Path(task.output) / "model", dtype=torch.float32, device="cpu")
    with torch.no_grad():
        logits = decoder(rows[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


@pytest.mark.shows("With `keep_best` the artefact is the model of the best checkpoint, also after a kill in between")
def test_the_model_is_that_of_the_best_checkpoint(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    rows = write_random_validation(tmp_path / "shards")
    task = make_task(tmp_path, make_settings(**SETTINGS), "best")
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        train_in_processes(task, die_at_step=8)
    train_in_processes(task)
    looks = {r["step"]: r["validation_loss"] for r in read_records(task) if "validation_loss" in r}
    best = min(looks, key=lambda step: looks[step])
    assert list(looks) == [3, 6, 9, 11] and best < 11 and looks[best] < looks[11] - 0.01
    assert loss_of_model(task, rows) == pytest.approx(looks[best], rel=1e-5)
    assert committed_steps(task.checkpoints) == sorted({best, 9, 11})
