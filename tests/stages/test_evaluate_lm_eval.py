"""Chats and lm-evaluation-harness's tasks in the evaluate stage, and what `ray-ds scores` shows of them."""

import dataclasses
from pathlib import Path

import pytest

from ray_ds.chat.encoding import ChatEncoder
from ray_ds.chat.template import DEFAULT_TEMPLATE, ChatTemplate
from ray_ds.config.lm_eval import LmEvalSettings
from ray_ds.errors import ConfigError, InputError
from ray_ds.evaluate.lm_eval_chats import LmEvalChats
from ray_ds.evaluate.lm_eval_tasks import run_harness
from ray_ds.evaluate.outcomes import read_outcomes
from ray_ds.evaluate.tables import scores_lines
from tests.evaluate.lm_eval_sets import CHOICE, WRITTEN, write_sets
from tests.evaluate.test_lm_eval_model import answers
from tests.evaluate.tiny_tasks import tiny_tokenizer
from tests.stages.test_evaluate import make_shards
from tests.stages.test_evaluate_tasks import make_checkpoint, make_tasks, run_evaluate, settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.shows("The evaluate stage runs lm_eval's tasks on local files and reports scores with standard errors")
def test_lm_eval_asks_the_actors_that_hold_the_model(tmp_path: Path, local_ray: str) -> None:
    checkpoint, shards = make_checkpoint(tmp_path), make_shards(tmp_path)
    folder = write_sets(tmp_path / "sets", mine=CHOICE, write=WRITTEN)
    own = LmEvalSettings(include_path=str(folder), tasks=("mine", "write"), licence="CC0-1.0")
    report = run_evaluate(tmp_path, checkpoint, shards, settings((), lm_eval=own, num_workers=2, seq_len=256), "first")
    assert report.fact("lm_eval") == run_harness(answers(), own, "here")
    assert {source.uri.rsplit("/", 1)[-1] for source in report.manifest.sources} == {
        "items.jsonl",
        "mine.yaml",
        "write.yaml",
    }
    assert {source.licence for source in report.manifest.sources} == {"CC0-1.0"}
    lines = scores_lines([report.uri])
    assert any(line.split()[:2] == ["mine", "acc"] and "lm_eval 0." in line for line in lines)


@pytest.mark.shows("The evaluate stage asks lm_eval's tasks in the turns of the model's own chat template")
def test_lm_eval_asks_in_turns_of_the_models_template(tmp_path: Path, local_ray: str) -> None:
    shards = make_shards(tmp_path)
    folder = write_sets(tmp_path / "sets", mine=CHOICE, write=WRITTEN)
    own = LmEvalSettings(
        include_path=str(folder), tasks=("mine", "write"), apply_chat_template=True, system_instruction="Be short."
    )
    plain = make_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"lm_eval.apply_chat_template \(True\) needs a chat template, which the"):
        run_evaluate(tmp_path, plain, shards, settings((), lm_eval=own), "first")
    talking = make_checkpoint(tmp_path, template=DEFAULT_TEMPLATE)
    report = run_evaluate(tmp_path, talking, shards, settings((), lm_eval=own, seq_len=256), "second")
    here = answers()
    here.chats = LmEvalChats(ChatEncoder(ChatTemplate(DEFAULT_TEMPLATE), tiny_tokenizer()), tiny_tokenizer())
    assert report.fact("lm_eval") == run_harness(here, own, "here") and report.fact("lm_eval", "chat") is True
    assert any("; chat" in line for line in scores_lines([report.uri]))


@pytest.mark.shows("A task of lm_eval that would download its data is refused")
def test_a_task_that_needs_the_network_is_refused(tmp_path: Path, local_ray: str) -> None:
    checkpoint, shards = make_checkpoint(tmp_path), make_shards(tmp_path)
    folder = write_sets(tmp_path / "sets", far={**CHOICE, "dataset_path": "rajpurkar/squad", "dataset_kwargs": {}})
    own = LmEvalSettings(include_path=str(folder), tasks=("far",))
    with pytest.raises(InputError) as caught:
        run_evaluate(tmp_path, checkpoint, shards, settings((), lm_eval=own), "first")
    assert str(caught.value).startswith(
        f"evalreport.lm_eval.tasks (far) must load without the network, from {folder} alone ("
    )
    assert "set dataset_path to json, csv, parquet or text" in str(caught.value)


def test_a_chat_needs_the_models_template(tmp_path: Path, local_ray: str) -> None:
    shards = make_shards(tmp_path)
    asked = dataclasses.replace(make_tasks(tmp_path)[0], joiner=None, shot_separator=None, chat=True)
    plain = make_checkpoint(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run_evaluate(tmp_path, plain, shards, settings((asked,)), "first")
    assert str(caught.value) == (
        f"evalreport.tasks.0.chat (True) needs a chat template, which the model {plain.uri} does not have; "
        "evaluate a model that was trained on shards of tokenize_chat, or leave chat out."
    )
    talking = make_checkpoint(tmp_path, template=DEFAULT_TEMPLATE)
    report = run_evaluate(tmp_path, talking, shards, settings((asked,), seq_len=256), "second")
    assert report.fact("tasks", "choose", "chat") is True
    assert len(read_outcomes(report)["choose"]) == 24
    assert any(line.startswith("choose") and "2 shots; chat;" in line for line in scores_lines([report.uri]))
