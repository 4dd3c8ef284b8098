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


def test_a_comparison_as_a_table() -> None:
    own = Difference(
        task="pick", metric="accuracy", items=1200, first=0.5, second=0.52, low=-0.01, high=0.05, p_value=0.2134,
        test="mcnemar",
    )  # fmt: skip
    assert difference_rows([own])[1] == (
        "pick", "accuracy", "1,200", "50.00%", "52.00%", "2.00%", "-1.00% to 5.00%", "0.21", "mcnemar",
    )  # fmt: skip
