"""Prompts are as the template says; shots are drawn by seed and never answer the question itself."""

from pathlib import Path
from typing import Any

import pytest

from ray_ds.errors import ConfigError, InputError
from ray_ds.evaluate.questions import read_questions
from tests.evaluate.tiny_tasks import CHOOSE, CLASSIFY, GENERATE, task, write_jsonl


def items(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"q{i}?", "options": [f"a{i}", f"b{i}"], "right": i % 2, "answer": f"r{i}"} for i in range(count)
    ]


def test_a_prompt_with_two_shots_reads_as_written(tmp_path: Path) -> None:
    files = write_jsonl(tmp_path / "a.jsonl", *items(3))
    asked = read_questions(task(files, choose=CHOOSE, shots=2, preamble="Choose.\n\n", shot_separator="\n--\n"))
    first = asked[0]
    shots = {"Question: q1?\nAnswer: b1\n--\n", "Question: q2?\nAnswer: a2\n--\n"}
    assert first.prompt in {"Choose.\n\n" + a + b + "Question: q0?\nAnswer:" for a in shots for b in shots - {a}}
    assert (first.choices, first.right, first.answer, first.name) == (("a0", "b0"), 0, "a0", "a.jsonl:1")


@pytest.mark.shows("Few-shot examples are drawn by seed and never hold the question that is asked")
def test_shots_follow_from_the_seed_and_never_hold_the_question(tmp_path: Path) -> None:
    # The first question stands twice in the file, so that being another line is not enough.
    files = write_jsonl(tmp_path / "a.jsonl", *items(12), items(1)[0])
    settings: dict[str, Any] = {"generate": GENERATE, "shots": 5}
    asked = read_questions(task(files, **settings))
    for question in asked:
        *shots, own = question.prompt.split("\n\n")
        assert own == question.own_prompt and len(shots) == 5
        assert not any(shot.startswith(own) for shot in shots)
    assert asked == read_questions(task(files, **settings))
    assert asked != read_questions(task(files, **settings, seed=1))
    assert len({question.prompt.split("Question: ")[1] for question in asked}) > 3
    # Whatever else is asked, a question keeps its shots.
    some = read_questions(task(files, **settings, max_items=4))
    assert len(some) == 4 and all(question in asked for question in some)


def test_shots_from_other_files(tmp_path: Path) -> None:
    files = write_jsonl(tmp_path / "a.jsonl", *items(2))
    pool = write_jsonl(tmp_path / "pool.jsonl", {**items(1)[0], "answer": "x"}, {**items(6)[5], "answer": "y"})
    asked = read_questions(task(files, generate=GENERATE, shots=1, shot_files=pool))
    assert asked[0].prompt == "Question: q5?\nAnswer: y\n\nQuestion: q0?\nAnswer:"
    with pytest.raises(ConfigError) as caught:
        read_questions(task(files, generate=GENERATE, shots=2, shot_files=pool))
    assert str(caught.value) == (
        f"task t: shots (2) must be at most 1, the examples that do not ask what {files} line 1 asks; "
        "ask for fewer, or name more shot_files."
    )


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [("index", 1, 1), ("index", "1", 1), ("number", 1, 0), ("letter", "B", 1), ("text", "b0", 1)],
)
def test_forms_of_the_right_answer(tmp_path: Path, form: str, value: object, expected: int) -> None:
    files = write_jsonl(tmp_path / "a.jsonl", {**items(1)[0], "right": value})
    assert read_questions(task(files, choose={**CHOOSE, "answer_form": form}))[0].right == expected


def test_choices_as_templates_labels_and_lists_of_right_answers(tmp_path: Path) -> None:
    item = {"question": "q", "good": "x", "bad": "y", "label": "no", "all": ["one", "two"], "key": "A"}
    files = write_jsonl(tmp_path / "a.jsonl", item)
    fixed = {**CHOOSE, "choices": ["{good}", "{bad}"], "answer": "key", "answer_form": "letter"}
    assert read_questions(task(files, choose=fixed))[0].choices == ("x", "y")
    labelled = read_questions(task(files, classify=CLASSIFY))[0]
    assert (labelled.choices, labelled.right) == (("yes", "no", "maybe"), 1)
    written = {"metrics": ["exact_match"], "max_new_tokens": 1, "answers": "all"}
    assert read_questions(task(files, generate=written))[0].references == ("one", "two")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"question": None}, {"choose": CHOOSE}, "a.jsonl line 2, field question (null) must be text or a number"),
        ({"right": 2}, {"choose": CHOOSE}, "field right (2) must be the index of a choice: 0, 1; mend the item, or"),
        ({"options": ["a"]}, {"choose": CHOOSE}, "field options (1 values) must be a list of two choices or more"),
        ({"options": ["a", ""]}, {"choose": CHOOSE}, "field options[1] (empty) must be a text"),
        ({"options": ["a", None]}, {"choose": CHOOSE}, "field options[1] (null) must be text or a number"),
        ({"label": "yess"}, {"classify": CLASSIFY}, "field label (yess) must be the text of a choice: yes, no, maybe"),
        ({"all": []}, {"generate": {"metrics": ["bleu"], "max_new_tokens": 1, "answers": "all"}}, "an empty list"),
    ],
)
def test_a_bad_item_is_named_with_line_and_field(
    tmp_path: Path, change: dict[str, Any], kind: dict[str, Any], message: str
) -> None:
    good = {**items(1)[0], "label": "no", "all": ["a"]}
    files = write_jsonl(tmp_path / "a.jsonl", good, {**good, **change})
    with pytest.raises(InputError) as caught:
        read_questions(task(files, **kind))
    assert message in str(caught.value) and "a.jsonl line 2" in str(caught.value)
