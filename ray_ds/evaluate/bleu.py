"""BLEU by sacrebleu, an optional package, cut into what each item adds and what the sums give."""

import importlib
from collections.abc import Sequence
from typing import Any

from ray_ds.errors import ConfigError

MAX_ORDER = 4
"""Words of the longest n-grams."""
SMOOTHING = "exp"
"""How n-grams that never match count; the default of sacrebleu's `BLEU`, which `compute_bleu` has another one than."""


def check_sacrebleu(field: str) -> None:
    """Refuse BLEU where sacrebleu is not installed.

    Raises:
        ConfigError: it is not.
    """
    _sacrebleu(field)


def bleu_counts(answer: str, references: Sequence[str], tokenizer: str) -> tuple[float, ...]:
    """Return what an answer adds to corpus BLEU: its length, the reference's, matches and n-grams of 1 to 4 words."""
    # A corpus of one: `sentence_score` gives the same counts, and a warning about their score, which is not used.
    score = (
        _sacrebleu()
        .BLEU(tokenize=tokenizer, smooth_method=SMOOTHING)
        .corpus_score([answer], [[reference] for reference in references])
    )
    return (score.sys_len, score.ref_len, *score.counts, *score.totals)


def bleu_of_counts(sums: Sequence[float]) -> float:
    """Return corpus BLEU, 0 to 100, of the sums of `bleu_counts`."""
    score = _sacrebleu().BLEU.compute_bleu(
        correct=[int(count) for count in sums[2 : 2 + MAX_ORDER]],
        total=[int(count) for count in sums[2 + MAX_ORDER :]],
        sys_len=int(sums[0]),
        ref_len=int(sums[1]),
        smooth_method=SMOOTHING,
    )
    return float(score.score)


def bleu_signature(tokenizer: str, num_references: int) -> str:
    """Return how BLEU is computed, in sacrebleu's short form, so that scores of different papers can be compared.

    Args:
        num_references: right answers of an item; -1 where items have different numbers.
    """
    metric = _sacrebleu().BLEU(tokenize=tokenizer, smooth_method=SMOOTHING)
    metric.num_refs = num_references
    return str(metric.get_signature())


def _sacrebleu(field: str = "bleu") -> Any:
    """Return `sacrebleu.metrics`."""
    try:
        return importlib.import_module("sacrebleu.metrics")
    except ImportError as error:
        allowed = "needs the package sacrebleu, which is not installed here"
        raise ConfigError(field, "bleu", allowed, "pip install 'ray_ds[bleu]'") from error
