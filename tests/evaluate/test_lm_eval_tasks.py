"""lm-evaluation-harness on local task files: what it finds, and that nothing outside their folder is read."""

import math
from pathlib import Path
from typing import Any

import pytest

from ray_ds.config.lm_eval import LmEvalSettings
from ray_ds.errors import ConfigError, InputError
from ray_ds.evaluate.lm_eval_tasks import run_harness
from tests.evaluate.lm_eval_sets import CHOICE, ITEMS, WRITTEN, write_sets
from tests.evaluate.test_lm_eval_model import answers

pytestmark = pytest.mark.slow


def run(folder: Path, *tasks: str, **settings: Any) -> dict[str, Any]:
    own = LmEvalSettings(include_path=str(folder), tasks=tasks, **settings)
    return run_harness(answers(), own, "evaluate.lm_eval")


def test_tasks_and_groups_have_scores_with_standard_errors(tmp_path: Path) -> None:
    group = {"group": "both", "task": ["mine", "write"], "aggregate_metric_list": [{"metric": "acc"}]}
    folder = write_sets(tmp_path / "sets", mine=CHOICE, write=WRITTEN, both=group)
    found = run(folder, "both")["tasks"]
    assert set(found) == {"both", "mine", "write"}
    model = answers()
    nats = [model.loglikelihood([(f"Question: {own['q']} Answer:", f" {o}") for o in ("yes", "no")]) for own in ITEMS]
    right = [(no[0] > yes[0]) == own["right"] for (yes, no), own in zip(nats, ITEMS, strict=True)]
    share = sum(right) / 6
    acc = found["mine"]["scores"]["acc"]
    assert acc["score"] == pytest.approx(share)
    assert acc["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 5))  # of the mean of six
    assert acc["higher_is_better"] is True
    assert (found["mine"]["items"], found["both"]["items"]) == (6, None)
    assert set(found["write"]["scores"]) == {"exact_match"}


def test_shots_and_items_are_as_the_settings_say(tmp_path: Path) -> None:
    folder = write_sets(tmp_path / "sets", mine={**CHOICE, "fewshot_split": "test"})
    found = run(folder, "mine", shots=2, max_items=4, seed=3)["tasks"]["mine"]
    assert (found["items"], found["shots"]) == (4, 2)


def test_an_unknown_task_is_named_with_those_there_are(tmp_path: Path) -> None:
    folder = write_sets(tmp_path / "sets", mine=CHOICE)
    with pytest.raises(ConfigError) as caught:
        run(folder, "hellaswag")
    assert str(caught.value) == (
        f"evaluate.lm_eval.tasks (hellaswag) must be a task, group or tag below {folder}: mine; name one of these."
    )


def test_data_outside_the_folder_or_missing_is_refused(tmp_path: Path) -> None:
    outside = {**CHOICE, "dataset_kwargs": {"data_files": {"test": "../other/items.jsonl"}}}
    missing = {**CHOICE, "dataset_kwargs": {"data_files": ["absent.jsonl"]}}
    folder = write_sets(tmp_path / "sets", outside=outside, missing=missing)
    write_sets(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"data_files of outside \(../other/items.jsonl\) must be below .*; move it"):
        run(folder, "outside")
    with pytest.raises(InputError, match=r"lm_eval.tasks \(missing\) must load without the network, .*absent.jsonl"):
        run(folder, "missing")
