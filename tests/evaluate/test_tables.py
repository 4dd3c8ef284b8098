"""Tables name what makes a score less than it seems, and give shares as percentages and BLEU as it is."""

from typing import Any

from ray_ds.evaluate.comparison import Difference
from ray_ds.evaluate.tables import difference_rows, report_rows


def score(value: float, low: float, high: float, how: str) -> dict[str, Any]:
    return {"score": value, "low": low, "high": high, "interval": "wilson", "how": how}


def test_a_report_as_a_table() -> None:
    choose = {"items": 1200, "shots": 5, "cut": 3, "seed": 0, "guessing_accuracy": 0.25}
    write = {"items": 10, "shots": 0, "cut": 0, "seed": 0, "unfinished": 4}
    facts = {
        "perplexity": 12.3456,
        "bits_per_byte": 1.5,
        "tokens": 61637,
        "tasks": {
            "pick": {**choose, "scores": {"accuracy": score(0.5, 0.47, 0.53, "length normalisation bytes")}},
            "write": {**write, "scores": {"bleu": score(12.345, 10.0, 15.0, "nrefs:1")}},
        },
    }
    assert report_rows(facts) == [
        ("task", "metric", "score", "95 % interval", "items", "note"),
        ("validation", "perplexity", "12.35", "-", "61,637 tokens", ""),
        ("validation", "bits_per_byte", "1.5", "-", "61,637 tokens", ""),
        (
            "pick", "accuracy", "50.00%", "47.00% to 53.00%", "1,200",
            "length normalisation bytes; 5 shots; 3 prompts cut on the left; guessing 25.00%",
        ),
        ("write", "bleu", "12.35", "10.00 to 15.00", "10", "nrefs:1; 4 answers broken off at max_new_tokens"),
    ]  # fmt: skip


def test_scores_of_lm_eval_have_the_interval_of_their_standard_error() -> None:
    scores = {"acc": {"score": 0.5, "stderr": 0.1}, "f1": {"score": 0.25, "stderr": None}}
    found = {"version": "0.4.13", "cut": 3, "tasks": {"mine": {"items": 26, "shots": 2, "scores": scores}}}
    rows = report_rows({"perplexity": 2.0, "bits_per_byte": 1.0, "tokens": 1, "lm_eval": found})
    assert rows[3:] == [
        (
            "mine",
            "acc",
            "0.5",
            "0.304 to 0.696",
            "26",
            "lm_eval 0.4.13; 2 shots; 3 prompts cut in all",
        ),  # 0.5 -+ 1.96 * 0.1
        ("mine", "f1", "0.25", "-", "26", "lm_eval 0.4.13; 2 shots; 3 prompts cut in all"),
    ]


def compared(metric: str, first: float, second: float, p_value: float) -> tuple[str, ...]:
    own = Difference(
        task="pick", metric=metric, items=1200, first=first, second=second, low=-0.01, high=0.05, p_value=p_value,
        test="mcnemar",
    )  # fmt: skip
    return difference_rows([own])[1]


def test_a_comparison_as_a_table() -> None:
    assert compared("accuracy", 0.5, 0.52, 0.2134) == (
        "pick", "accuracy", "1,200", "50.00%", "52.00%", "+2.00 points", "-1.00 to +5.00", "0.21", "not clear",
        "mcnemar",
    )  # fmt: skip
    assert compared("bleu", 12.0, 11.5, 0.2)[5:7] == ("-0.50", "-0.01 to +0.05")


def test_who_is_better_is_said_where_chance_is_unlikely() -> None:
    found = [compared("accuracy", *scores)[8] for scores in ((0.5, 0.6, 0.04), (0.6, 0.5, 0.04), (0.5, 0.6, 0.05))]
    assert found == ["second", "first", "not clear"]
