"""Metrics against scikit-learn and sacrebleu where they are installed, and against counts done by hand."""

import sys

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sklearn.metrics import accuracy_score, f1_score

from ray_ds.errors import ConfigError
from ray_ds.evaluate.bleu import bleu_counts, bleu_signature, check_sacrebleu
from ray_ds.evaluate.metrics import Metric, guessing_accuracy, make_metric, matches, normalise_text
from ray_ds.evaluate.outcomes import Outcome


def outcome(right: str = "a", answer: str = "a", **changes: object) -> Outcome:
    values = {"task": "t", "item": "i", "asked": "", "is_cut": False, "is_right": right == answer, **changes}
    return Outcome(right=right, answer=answer, **values)  # type: ignore[arg-type]


def total(metric: Metric) -> float:
    return float(metric.formula(metric.statistics[0].sum(axis=0)[None])[0])


def labelled(count: int, seed: int = 0) -> list[Outcome]:
    rng = np.random.default_rng(seed)
    right = rng.choice(["a", "b", "c", "d"], count, p=[0.6, 0.3, 0.08, 0.02])
    answer = np.where(rng.random(count) < 0.6, right, rng.choice(["a", "b", "e"], count))
    return [outcome(str(one), str(other)) for one, other in zip(right, answer, strict=True)]


def test_macro_f1_by_hand() -> None:
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("c", "b"), ("a", "a")]
    # a: 2*2/(3+2), b: 2*1/(1+3), c: 0
    assert total(make_metric("macro_f1", [outcome(*pair) for pair in pairs])) == pytest.approx((0.8 + 0.5 + 0) / 3)
    assert total(make_metric("accuracy", [outcome(*pair) for pair in pairs])) == 0.6


def test_macro_f1_is_scikit_learns() -> None:
    for seed in range(5):
        report = labelled(200, seed)
        right, answer = [own.right for own in report], [own.answer for own in report]
        expected = f1_score(right, answer, average="macro", zero_division=0)
        assert total(make_metric("macro_f1", report)) == pytest.approx(expected, rel=1e-12)
        assert total(make_metric("accuracy", report)) == accuracy_score(right, answer)


def test_guessing() -> None:
    assert guessing_accuracy(["a", "b", "a"], [3, 3, 3], same_labels=True) == pytest.approx(2 / 3)
    assert guessing_accuracy(["a", "b"], [2, 4], same_labels=False) == pytest.approx(0.375)


ANSWERS = ("the cat sat on a mat", "there is a dog here", "", "nothing, at all!")
REFERENCES = (
    ["the cat sat on the mat", "a cat sat on the mat"],
    ["there is a big dog here"],
    ["something", "anything"],
    ["nothing at all!"],
)


@pytest.mark.shows("BLEU is sacrebleu's to the last digit, and its signature is in the report")
@pytest.mark.parametrize("tokenizer", ["13a", "intl", "char", "none"])
def test_bleu_is_sacrebleus(tokenizer: str) -> None:
    report = [
        outcome(counts=bleu_counts(answer, references, tokenizer))
        for answer, references in zip(ANSWERS, REFERENCES, strict=True)
    ]
    columns = [[own[i] if i < len(own) else None for own in REFERENCES] for i in range(2)]
    expected = BLEU(tokenize=tokenizer).corpus_score(list(ANSWERS), columns)
    assert total(make_metric("bleu", report)) == expected.score
    # Without a match of four words, what counts is how sacrebleu smooths.
    last = BLEU(tokenize=tokenizer).corpus_score(list(ANSWERS[3:]), [own[3:] for own in columns])
    assert total(make_metric("bleu", report[3:])) == last.score
    assert f"tok:{tokenizer}" in bleu_signature(tokenizer, 2) and "nrefs:2" in bleu_signature(tokenizer, 2)


def test_bleu_without_sacrebleu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ConfigError) as caught:
        check_sacrebleu("evaluate.tasks.0.generate.metrics")
    assert str(caught.value) == (
        "evaluate.tasks.0.generate.metrics (bleu) needs the package sacrebleu, which is not installed here; "
        "pip install 'ray_ds[bleu]'."
    )


def test_steps_of_normalisation_are_done_in_order() -> None:
    text = " The  cat's «Mat», an\tanswer!"
    assert normalise_text(text, []) == text
    assert normalise_text(text, ["whitespace"]) == "The cat's «Mat», an answer!"
    assert normalise_text(text, ["lower", "punctuation", "articles", "whitespace"]) == "cats mat answer"
    assert normalise_text("a-n", ["punctuation", "articles"]) == " "
    assert normalise_text("a-n", ["articles", "punctuation"]) == " n"


@pytest.mark.parametrize(
    ("answer", "extract", "expected"),
    [
        (" 1,200 ", None, True),
        ("so #### 7 or #### 1,200", r"#### (-?[0-9.,]+)", True),
        ("#### 1,200 or #### 7", r"#### (-?[0-9.,]+)", False),
        ("it is 1,200", r"[0-9,]+", True),
        ("no number", r"[0-9,]+", False),
        ("1200", None, False),
    ],
)
def test_matching(answer: str, extract: str | None, expected: bool) -> None:
    assert matches(answer, ["x", "1,200"], extract=extract, normalise=["whitespace"]) is expected
