"""The default rules keep good English and Chinese and drop junk."""

import pytest

from ray_ds.data.filters import PROFILES, RULES, Verdict, broken_rules, judge, measure_for
from ray_ds.data.language import LanguageGuess, detect_language
from ray_ds.data.sample_chinese import PARAGRAPHS
from tests.data.raw_files import GOOD, good_text


def _judge(text: str) -> Verdict:
    return judge(text, detect_language(text), languages=("en", "zh"), min_score=0.5)


@pytest.mark.shows("The default quality rules keep good English and good Chinese")
@pytest.mark.parametrize("text", PARAGRAPHS)
def test_good_chinese_is_kept(text: str) -> None:
    assert _judge(text) == Verdict("", 0)


def test_good_english_is_kept() -> None:
    assert all(_judge(good_text(number)).reason == "" for number in range(10))


WORDS = GOOD.split()

JUNK = {
    "empty": "",
    "too_short": "The harbour lay quiet in the early morning, and the boats had not yet gone out.",
    "language": "Der Hafen lag still im frühen Morgen, und die Boote waren noch nicht hinausgefahren. " * 3,
    "symbols": " ".join(f"#{word}" if i % 5 == 0 else word for i, word in enumerate(WORDS)),
    "few_letters": GOOD + " 12.50 | 13.75 | 14.00 | 99.10 |" * 14,
    "bullets": "\n".join(f"- {good_text(i)}" for i in range(4)),
    "ellipses": "\n".join(" ".join(WORDS[i : i + 12]) + "..." for i in range(0, 60, 12)),
    "unpunctuated_lines": "\n".join(" ".join(WORDS[i : i + 10]) for i in range(0, 60, 10)).replace(".", ""),
    "short_lines": "\n".join(" ".join(WORDS[i : i + 4]) + "." for i in range(0, 60, 4)),
    "duplicate_lines": "\n".join([GOOD, "Read more about it here today.", GOOD]),
    "duplicate_ngrams": GOOD + " " + GOOD[:230],
}


@pytest.mark.parametrize("rule", JUNK)
def test_junk_is_dropped_for_its_reason(rule: str) -> None:
    verdict = _judge(JUNK[rule])
    assert verdict.mask >> RULES.index(rule) & 1, (verdict, rule)


def test_repetitive_chinese_is_dropped() -> None:
    verdict = _judge("今天天气很好，我们去公园散步。" * 20)
    assert verdict.reason and verdict.mask >> RULES.index("duplicate_ngrams") & 1


def test_the_reason_is_the_first_rule_of_the_mask() -> None:
    verdict = _judge(JUNK["short_lines"])
    lowest = (verdict.mask & -verdict.mask).bit_length() - 1
    assert verdict.reason == RULES[lowest]


def test_an_uncertain_language_is_dropped() -> None:
    guess = LanguageGuess("en", 0.49)
    assert judge(GOOD, guess, languages=("en",), min_score=0.5).reason == "language"
    assert judge(GOOD, LanguageGuess("en", 0.51), languages=("zh",), min_score=0.5).reason == "language"


@pytest.mark.parametrize("text", ["", " ", "\n\n\n", "a", "中", "\u3000", "#", "…", "- ", "\ud83d\ude00", "1 2 3"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_is_too_small_to_measure(text: str, language: str) -> None:
    profile = PROFILES[language]  # type: ignore[index]
    assert "too_short" in broken_rules(measure_for(text, profile), profile)
    detect_language(text.encode("utf-16", "surrogatepass").decode("utf-16"))
