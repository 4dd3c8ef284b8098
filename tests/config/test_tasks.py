"""What is wrong with a task is said of its own field; nothing that is set stays without effect."""

from typing import Any

import pytest

from ray_ds.config.evaluate import EvaluateSettings
from ray_ds.config.settings import decode_settings, digest_settings
from ray_ds.errors import ConfigError
from tests.evaluate.tiny_tasks import CHOOSE, CLASSIFY, GENERATE, task


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "tasks.0.choose, classify, generate (none) must be exactly one of the three; give one."),
        ({"choose": CHOOSE, "classify": CLASSIFY}, "(choose, classify) must be exactly one of the three"),
        (
            {"choose": {**CHOOSE, "length_normalisation": "words"}},
            "tasks.0.choose.length_normalisation (words) must be",
        ),
        ({"choose": {"choices": "options", "answer": "right"}}, "tasks.0.choose.length_normalisation (missing)"),
        ({"choose": {**CHOOSE, "choices": ["A"]}}, "choose.choices (['A']) must be two templates or more"),
        ({"choose": {**CHOOSE, "choices": ["{a", "b"]}}, "choose.choices.0 ({a) must hold columns in braces"),
        ({"choose": {**CHOOSE, "answer": "a.b"}}, "choose.answer (a.b) must name columns"),
        ({"classify": {**CLASSIFY, "labels": ["a", "a"]}}, "classify.labels (['a', 'a']) must be two texts or more"),
        ({"generate": {**GENERATE, "metrics": []}}, "generate.metrics ([]) must be exact_match, bleu or both"),
        ({"generate": {**GENERATE, "answers": "all"}}, "generate.answer (both) must be given, or else answers"),
        ({"generate": {**GENERATE, "extract": "("}}, "generate.extract (() must be a regular expression"),
        ({"generate": {**GENERATE, "stop": [""]}}, "generate.stop (['']) must hold no empty text"),
        (
            {"generate": {**GENERATE, "bleu_tokenizer": "zh"}},
            "generate.bleu_tokenizer (zh) has no effect without the metric bleu; remove it.",
        ),
        (
            {"generate": {**GENERATE, "metrics": ["bleu"], "normalise": ["lower"]}},
            "has no effect without the metric exact_match",
        ),
        (
            {"generate": {**GENERATE, "metrics": ["bleu"], "extract": "a"}},
            "generate.extract (a) has no effect without the metric exact_match; remove it.",
        ),
        ({"choose": CHOOSE, "shot_files": "/a.jsonl"}, "tasks.0.shot_files (/a.jsonl) has no effect without shots"),
        ({"choose": CHOOSE, "shot_separator": "\n"}, "has no effect without shots; remove it."),
        (
            {"choose": CHOOSE, "chat": True, "joiner": "\n"},
            "tasks.0.joiner (\n) has no effect in a chat, whose template joins the turns; remove it.",
        ),
        ({"choose": CHOOSE, "chat": True, "shots": 1, "shot_separator": "-"}, "shot_separator (-) has no effect in a"),
        (
            {"choose": CHOOSE, "chat": True, "too_long": "cut_left"},
            "tasks.0.too_long (cut_left) must be refuse in a chat, whose turns stay whole; remove it and ask for fewer",
        ),
        ({"choose": CHOOSE, "prompt": "{a:>5}"}, "tasks.0.prompt ({a:>5}) must not format what it holds; write {a}."),
        ({"choose": CHOOSE, "prompt": "{}"}, "tasks.0.prompt ({}) must name columns"),
        ({"choose": CHOOSE, "name": "a b"}, "tasks.0.name (a b) must be letters, digits"),
        ({"choose": CHOOSE, "files": ""}, "tasks.0.files () must name files"),
        ({"choose": CHOOSE, "colour": 1}, "tasks.0.colour (1) must be one of the known settings: name, files, prompt"),
    ],
)
def test_wrong_tasks_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task(**settings)
    assert message in str(caught.value)


def test_defaults_follow_from_what_is_measured() -> None:
    generate = task(generate={**GENERATE, "metrics": ["exact_match", "bleu"]}).generate
    assert generate is not None and generate.normalise == ("whitespace",) and generate.bleu_tokenizer == "13a"
    assert task(choose=CHOOSE).shot_separator is None
    assert task(choose=CHOOSE, shots=1).shot_separator == "\n\n"


def test_what_joins_texts_is_absent_in_a_chat() -> None:
    assert task(choose=CHOOSE).joiner == " "
    asked = task(choose=CHOOSE, chat=True, shots=1)
    assert (asked.joiner, asked.shot_separator) == (None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include_path": "s3://bucket/sets"}, "lm_eval.include_path (s3://bucket/sets) must be a local folder"),
        ({"tasks": []}, "lm_eval.tasks ([]) must be names of tasks, each once; name one or more."),
        ({"tasks": ["a", "a"]}, "lm_eval.tasks (['a', 'a']) must be names of tasks, each once"),
    ],
)
def test_wrong_settings_of_lm_eval_are_refused(settings: dict[str, Any], message: str) -> None:
    raw = {"seq_len": 8, "lm_eval": {"include_path": "/sets", "tasks": ["a"], **settings}}
    with pytest.raises(ConfigError) as caught:
        decode_settings(EvaluateSettings, raw, where="evaluate")
    assert message in str(caught.value)


def test_lm_evals_folder_is_below_the_root() -> None:
    raw = {"seq_len": 8, "lm_eval": {"include_path": "sets", "tasks": ["a"]}}
    rooted = decode_settings(EvaluateSettings, raw, where="evaluate").with_root("/base", where="evaluate")
    assert rooted.lm_eval is not None and rooted.lm_eval.include_path == "/base/sets"


def test_two_tasks_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tasks.1.name \(t\) must be the name of one task only"):
        EvaluateSettings(seq_len=8, tasks=(task(choose=CHOOSE), task(choose=CHOOSE)))


def test_relative_files_are_below_the_root() -> None:
    settings = EvaluateSettings(seq_len=8, tasks=(task("a.jsonl", choose=CHOOSE, shots=1, shot_files="b.jsonl"),))
    rooted = settings.with_root("/base", where="demo.toml: evaluate").tasks[0]
    assert (rooted.files, rooted.shot_files) == ("/base/a.jsonl", "/base/b.jsonl")
    with pytest.raises(ConfigError, match=r"demo.toml: evaluate.tasks.0.shot_files \(b.jsonl\) must be absolute"):
        settings.with_root(None, where="demo.toml: evaluate")


def test_where_files_lie_is_not_digested_but_how_they_are_asked_is() -> None:
    def digested(**settings: Any) -> object:
        return digest_settings(EvaluateSettings(seq_len=8, tasks=(task(choose=CHOOSE, **settings),)))

    assert digested(files="/a/x.jsonl") == digested(files="/b/x.jsonl")
    assert digested(seed=1) != digested()
    assert digested(prompt="{question}") != digested()
