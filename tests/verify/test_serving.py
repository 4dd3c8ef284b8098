"""Requests that fail and a second replica that does not come are wrong; an untrained model can be served too."""

from pathlib import Path

from ray_ds.artifacts import Checkpoint
from ray_ds.verify.serving import Load, initial_model, judge_load
from tests.verify.test_runner import make_context


def test_load_that_was_answered_by_two_replicas_is_right() -> None:
    assert judge_load(Load(url="", key="", answers=5), 3.0) == []


def test_what_went_wrong_under_load_is_said() -> None:
    late, refused = judge_load(Load(url="", key="", answers=5), None), Load(url="", key="", answers=3, errors=["429"])
    assert "no second replica within" in late[0].wrong
    assert judge_load(refused, 3.0)[0].wrong == "1 of 4 requests failed: 429"


def test_clients_count_what_fails_and_end_when_told() -> None:
    load = Load(url="http://127.0.0.1:9", key="")
    threads = load.start()
    load.stop.wait(0.3)
    load.stop.set()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads) and load.answers == 0 and "no answer" in load.errors[0]


def test_there_is_a_model_without_the_training_check(tmp_path: Path) -> None:
    model = initial_model(make_context(tmp_path))
    assert isinstance(model, Checkpoint)
    model.verify_files()
    names = {info.path for info in model.manifest.files}
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json"} <= names
