"""Tasks in the evaluate stage: the scores of single sequences for any batch and number of actors, kept and compared."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ds.artifacts import Artifact, Checkpoint, EvalReport, TokenShards
from ray_ds.config.evaluate import EvaluateSettings
from ray_ds.config.tasks import TaskSettings
from ray_ds.data.sample_tasks import write_sample_tasks
from ray_ds.errors import ArtifactError, ConfigError, InputError
from ray_ds.evaluate.comparison import compare_reports
from ray_ds.evaluate.continuations import encode_choices
from ray_ds.evaluate.outcomes import read_outcomes
from ray_ds.evaluate.questions import read_questions
from ray_ds.evaluate.tables import scores_lines
from ray_ds.model.checkpoint_folder import load_checkpoint_folder, save_checkpoint_folder
from ray_ds.quantize import load_quantized, quantize_folder
from ray_ds.recipe import load_recipe
from ray_ds.stages.evaluate import evaluate
from ray_ds.steps import step_digest
from ray_ds.tokenizer import load_tokenizer
from tests.evaluate.tiny_tasks import (
    CHOOSE,
    CLASSIFY,
    GENERATE,
    task,
    tiny_config,
    tiny_decoder,
    tiny_tokenizer,
    write_jsonl,
)
from tests.stages.small_artifacts import stage_run
from tests.stages.test_evaluate import make_shards

WORDS = ["sky", "colour", "blue", "true", "one", "two", "three", "four", "maybe", "false"]
PROJECT = Path(__file__).parent.parent.parent
HAS_SACREBLEU = importlib.util.find_spec("sacrebleu") is not None


def make_checkpoint(folder: Path, seed: int = 0, *, template: str | None = None) -> Checkpoint:
    tokenizer = tiny_tokenizer()
    run = stage_run(folder, "Checkpoint", name=f"seed{seed}{template}")
    target = Path(run.path("model"))
    state = tiny_decoder(tokenizer, seed).state_dict()
    config = tiny_config(tokenizer.vocab_size)
    save_checkpoint_folder(state, config, target, dtype=torch.float32, max_shard_bytes=1 << 30)
    (target / "tokenizer.json").write_text(tokenizer.to_json())
    if template is not None:
        (target / "chat_template.jinja").write_text(template)
    checkpoint = run.commit({"tokenizer_digest": "t0"}, seconds=0.0)
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


def make_quantized(folder: Path, checkpoint: Artifact) -> Artifact:
    run = stage_run(folder, "QuantizedModel", checkpoint)
    quantize_folder(Path(checkpoint.path("model")), Path(run.path("model")), max_shard_bytes=1 << 30)
    return run.commit({"tokenizer_digest": "t0"}, seconds=0.0)


def make_tasks(folder: Path, num_items: int = 24) -> tuple[TaskSettings, ...]:
    items = [
        {
            "question": f"what is {WORDS[i % 10]} of {WORDS[i // 3 % 10]}?",
            "options": [WORDS[(i + j) % 10] + " " * (j > 1) + "yes" * (j > 1) for j in range(2 + i % 3)],
            "right": i % 2,
            "label": ["yes", "no", "maybe"][i % 3],
            "answer": WORDS[i % 10],
        }
        for i in range(num_items)
    ]
    files = write_jsonl(folder / "items.jsonl", *items)
    metrics = ["exact_match", "bleu"] if HAS_SACREBLEU else ["exact_match"]
    written = {**GENERATE, "metrics": metrics, "stop": ["\n"], "temperature": 0.5}
    return (
        task(files, name="choose", choose={**CHOOSE, "length_normalisation": "bytes"}, shots=2),
        task(files, name="classify", classify=CLASSIFY),
        task(files, name="write", generate=written, max_items=9),
    )


def settings(tasks: tuple[TaskSettings, ...], **changes: Any) -> EvaluateSettings:
    return EvaluateSettings(
        **{"seq_len": 128, "precision": "fp32", "max_tokens": 256, "baseline_tokens": 0, "tasks": tasks, **changes}
    )


def run_evaluate(folder: Path, model: Artifact, shards: TokenShards, own: EvaluateSettings, name: str) -> EvalReport:
    report = evaluate(own, stage_run(folder, "EvalReport", model, shards, name=name))
    assert isinstance(report, EvalReport)
    return report


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("A task's scores do not depend on the batch size or the number of workers")
def test_scores_are_those_of_single_sequences_for_any_batch_and_number_of_workers(
    tmp_path: Path, local_ray: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, shards, tasks = make_checkpoint(tmp_path), make_shards(tmp_path), make_tasks(tmp_path)
    first = run_evaluate(tmp_path, checkpoint, shards, settings(tasks, micro_batch=5), "first")
    second = run_evaluate(tmp_path, checkpoint, shards, settings(tasks, micro_batch=5, num_workers=2), "second")
    third = run_evaluate(tmp_path, checkpoint, shards, settings(tasks, micro_batch=1), "third")
    assert first.fact("tasks") == second.fact("tasks") == third.fact("tasks")
    items = Path(first.path("items.parquet")).read_bytes()
    assert items == Path(second.path("items.parquet")).read_bytes()  # to the last bit

    outcomes = read_outcomes(first)
    decoder = load_checkpoint_folder(Path(checkpoint.path("model")), dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(checkpoint.path("model", "tokenizer.json"))
    right = 0
    for question, outcome in zip(read_questions(tasks[0]), outcomes["choose"], strict=True):
        nats = []
        for own in encode_choices(tokenizer, question.prompt, [f" {choice}" for choice in question.choices]):
            with torch.no_grad():
                logprobs = decoder(torch.tensor([own.tokens]))[0].double().log_softmax(-1)
            nats.append(sum(logprobs[i - 1, own.tokens[i]].item() for i in range(own.start, len(own.tokens))))
        assert outcome.nats == pytest.approx(nats, abs=1e-3)
        per_byte = [own / len(choice.encode()) for own, choice in zip(nats, question.choices, strict=True)]
        assert outcome.answer == question.choices[per_byte.index(max(per_byte))]
        right += per_byte.index(max(per_byte)) == question.right
    found = first.fact("tasks", "choose")
    assert found["scores"]["accuracy"]["score"] == right / 24
    assert found["scores"]["accuracy"]["low"] < right / 24 < found["scores"]["accuracy"]["high"]
    assert (found["items"], found["shots"], found["cut"]) == (24, 2, 0)
    assert set(first.fact("tasks", "classify", "scores")) == {"accuracy", "macro_f1"}
    assert first.fact("tasks", "write", "items") == 9
    assert json.loads(Path(first.path("report.json")).read_text())["tasks"] == first.fact("tasks")
    assert {source.source for source in first.manifest.sources} == {
        f"files of task {name}: not stated" for name in ("choose", "classify", "write")
    }


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("Two checkpoints are compared item by item from their reports, without a second run")
def test_a_quantized_model_is_compared_with_its_checkpoint(tmp_path: Path, local_ray: str) -> None:
    checkpoint, shards, tasks = make_checkpoint(tmp_path), make_shards(tmp_path), make_tasks(tmp_path)
    quantized = make_quantized(tmp_path, checkpoint)
    first = run_evaluate(tmp_path, checkpoint, shards, settings(tasks), "first")
    second = run_evaluate(tmp_path, quantized, shards, settings(tasks), "second")
    assert second.fact("model_kind") == "QuantizedModel"
    assert load_quantized(Path(quantized.path("model"))) is not None

    found = {(own.task, own.metric): own for own in compare_reports(first, second)}
    assert found["choose", "accuracy"].test == "mcnemar" and found["classify", "macro_f1"].test == "permutation"
    for (name, metric), own in found.items():
        assert own.first == first.fact("tasks", name, "scores", metric, "score")
        assert own.second == second.fact("tasks", name, "scores", metric, "score")
        assert own.low <= own.second - own.first <= own.high and 0 < own.p_value <= 1

    table = "\n".join(scores_lines([first.uri]))
    assert "choose" in table and "length normalisation bytes; 2 shots; guessing" in table
    compared = scores_lines([first.uri, second.uri + "/"])
    assert compared[0].split() == ["first", first.uri] and "second - first" in compared[3]
    assert any(line.startswith("classify") and "permutation" in line for line in compared)

    other = settings(tuple(dataclasses.replace(own, seed=1) for own in tasks))
    third = run_evaluate(tmp_path, checkpoint, shards, other, "third")
    with pytest.raises(ArtifactError, match=r"task choose, item items.jsonl:\d+ \(\w+\) must be asked as in the first"):
        compare_reports(first, third)
    fourth = run_evaluate(tmp_path, checkpoint, shards, settings(()), "fourth")
    with pytest.raises(ArtifactError, match=r"\(no tasks\) must be a report of tasks; evaluate with `tasks`"):
        compare_reports(first, fourth)


@pytest.mark.ray
@pytest.mark.slow
def test_too_long_prompts_are_refused_or_cut_and_counted(tmp_path: Path, local_ray: str) -> None:
    checkpoint, shards, tasks = make_checkpoint(tmp_path), make_shards(tmp_path), make_tasks(tmp_path, 6)
    with pytest.raises(InputError) as caught:
        run_evaluate(tmp_path, checkpoint, shards, settings(tasks, seq_len=40), "first")
    assert str(caught.value).startswith(f"task choose: {tmp_path}/items.jsonl line 1 (")
    assert str(caught.value).endswith(
        'must fit, with its answer, into seq_len = 40; ask for fewer shots, or set too_long = "cut_left" to cut the '
        "beginning off."
    )
    cutting = tuple(dataclasses.replace(own, too_long="cut_left") for own in tasks)
    report = run_evaluate(tmp_path, checkpoint, shards, settings(cutting, seq_len=40), "second")
    assert report.fact("tasks", "choose", "cut") == 6
    assert all(own.is_cut for own in read_outcomes(report)["choose"])
    assert "6 prompts cut on the left" in "\n".join(scores_lines([report.uri]))
    with pytest.raises(InputError, match=r"must fit, with its answer, into seq_len = 2; ask for fewer shots\."):
        run_evaluate(tmp_path, checkpoint, shards, settings(cutting, seq_len=2), "third")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("The tasks recipe chooses, classifies and writes on the questions that a command makes")
def test_the_shipped_recipes_tasks_are_answered(tmp_path: Path, local_ray: str) -> None:
    write_sample_tasks(str(tmp_path / "runs/sample_tasks"))
    step = load_recipe(str(PROJECT / "jobs/recipes/tasks.toml"), root=str(tmp_path)).step("tasks")
    # Fewer questions, and cut ones, for a model whose tokens are about letters.
    few = tuple(dataclasses.replace(own, max_items=10, too_long="cut_left") for own in step.settings.tasks)
    small = dataclasses.replace(step.settings, tasks=few, max_tokens=256, num_workers=1)
    report = run_evaluate(tmp_path, make_checkpoint(tmp_path), make_shards(tmp_path), small, "recipe")
    found = {name: sorted(own["scores"]) for name, own in report.fact("tasks").items()}
    assert found == {"endings": ["accuracy"], "kinds": ["accuracy", "macro_f1"], "next_words": ["exact_match"]}
    assert report.fact("tasks", "endings", "guessing_accuracy") == 0.25
    assert {len(rows) for rows in read_outcomes(report).values()} == {10}


def test_scores_of_three_reports_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be one or two"):
        scores_lines(["/a", "/b", "/c"])


def test_a_changed_item_makes_another_report_and_a_moved_file_the_same(tmp_path: Path) -> None:
    checkpoint, shards = make_checkpoint(tmp_path), make_shards(tmp_path)

    def digest(files: str) -> str:
        table = {"name": "t", "files": files, "prompt": "{q}", "classify": CLASSIFY}
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(
            f'name = "t"\nrun_dir = "{tmp_path}"\n[[step]]\nstage = "evaluate"\n'
            f'from = ["{checkpoint.uri}", "{shards.uri}"]\n'
            "settings.seq_len = 8\n[[step.settings.tasks]]\n"
            + "".join(f"{name} = {_toml(value)}\n" for name, value in table.items())
        )
        return step_digest(load_recipe(str(recipe)).step("evaluate"))

    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    item = {"q": "?", "label": "no"}
    first = digest(write_jsonl(tmp_path / "a" / "items.jsonl", item))
    assert first == digest(write_jsonl(tmp_path / "b" / "items.jsonl", item))
    assert first != digest(write_jsonl(tmp_path / "c" / "items.jsonl", {**item, "label": "yes"}))


def _toml(value: object) -> str:
    """Return an inline TOML value; JSON but for tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {json.dumps(own)}" for name, own in value.items()) + "}"
    return json.dumps(value)
