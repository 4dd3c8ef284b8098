"""DPO by stored log-probabilities, against the reference that is asked."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ds.config.objective import Dpo
from ray_ds.data.reference_log_probs import open_log_probs
from ray_ds.data.rows import open_rows
from ray_ds.data.shards import TokenSplit
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.model.loss import IGNORED_TARGET
from ray_ds.train import start
from ray_ds.train.batches import read_rows
from ray_ds.train.objective import MicroBatch
from ray_ds.train.preference import DpoObjective, StoredDpoObjective
from ray_ds.train.reference import ask_reference
from tests.train.chats import new_checkpoint, tuned_settings, tuning_task, write_chats
from tests.train.teachers import finish_shards, store_reference
from tests.train.test_objectives import check_gradients, gradients, new_decoder, packed_rows

DPO = {"kind": "dpo", "beta": 0.3}


@pytest.mark.shows("DPO by a reference's stored log-probabilities has the loss and gradient of the reference in memory")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_objective_is_that_of_the_reference_in_memory(smoothing: float) -> None:
    tokens, targets, segments, _ = packed_rows()
    decoder, reference = new_decoder(1), new_decoder(2)
    settings = Dpo(kind="dpo", beta=0.3, label_smoothing=smoothing)
    stored = torch.from_numpy(ask_reference(reference, MicroBatch(tokens, targets, segments))["log_probs"])
    found = StoredDpoObjective(decoder, settings)(tokens, targets, segments, stored)
    expected = DpoObjective(decoder, settings, reference)(tokens, targets, segments)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert float(expected[1].detach().abs()) > 0.1
    check_gradients(gradients(decoder, found[0]), gradients(decoder, expected[0]))


def test_rows_without_targets_add_nothing() -> None:
    tokens, targets, segments, _ = packed_rows()
    decoder = new_decoder(1)
    padding = torch.full_like(targets, IGNORED_TARGET)
    objective = StoredDpoObjective(decoder, Dpo(kind="dpo"))
    sums = objective(tokens * 0, padding, segments * 0, torch.zeros(tokens.shape))
    assert not sums.any() and not any(gradient.any() for gradient in gradients(decoder, sums[0]).values())


def test_what_is_stored_are_log_probabilities_of_the_targets(tmp_path: Path) -> None:
    write_chats(tmp_path / "preference", "preference")
    shards = finish_shards(tmp_path / "preference", "preference")
    model = new_checkpoint(tmp_path / "start")
    artifact = store_reference(tmp_path, model, shards)
    decoder = load_checkpoint_folder(Path(model) / "model", dtype=torch.float32, device="cpu")
    for split in ("train", "validation"):
        rows = open_rows(TokenSplit.open(shards.uri, split), "preference", 16)
        stored = open_log_probs(artifact, split, rows)
        for index in range(0, sum(rows.shard_rows), 5):
            row = rows.row(index)
            (found,) = stored.row(index, row)
            tokens, segments = (torch.from_numpy(values)[None] for values in (row.tokens, row.segments))
            log_probs = decoder(tokens, segments=segments)[0].detach().double().log_softmax(-1)
            is_target = row.targets >= 0
            expected = log_probs[is_target].gather(1, torch.from_numpy(row.targets[is_target])[:, None])[:, 0]
            torch.testing.assert_close(torch.from_numpy(found[is_target]).double(), expected, rtol=1e-5, atol=1e-5)
            assert is_target.any() and not found[~is_target].any()


@pytest.mark.shows("DPO by a reference's stored log-probabilities holds no second model")
def test_no_second_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_chats(tmp_path / "preference", "preference")
    shards = finish_shards(tmp_path / "preference", "preference")
    stored = store_reference(tmp_path, new_checkpoint(tmp_path / "start"), shards)
    settings = tuned_settings(objective=DPO, num_workers=1)
    task = tuning_task(tmp_path, settings, "preference", "run", reference_log_probs=stored.uri)
    loaded: list[str] = []
    load = start.load_checkpoint
    monkeypatch.setattr(start, "load_checkpoint", lambda uri, *args: loaded.append(uri) or load(uri, *args))
    assert isinstance(start.make_objective(task, torch.device("cpu")), StoredDpoObjective)
    assert not loaded
    asking = tuning_task(tmp_path, settings, "preference", "asking")
    assert isinstance(start.make_objective(asking, torch.device("cpu")), DpoObjective)
    assert loaded == [asking.init_from]


def test_padding_rows_have_room_for_what_is_stored(tmp_path: Path) -> None:
    write_chats(tmp_path / "preference", "preference")
    shards = finish_shards(tmp_path / "preference", "preference")
    artifact = store_reference(tmp_path, new_checkpoint(tmp_path / "start"), shards)
    rows = open_rows(TokenSplit.open(shards.uri, "train"), "preference", 16)
    batch = read_rows(rows, np.array([0, -1]), 16, 0, open_log_probs(artifact, "train", rows))
    (stored,) = batch.stored
    assert stored.shape == (2, 16) and stored[0].any() and not stored[1].any()
