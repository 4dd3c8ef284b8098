"""What each detector finds, and what it must leave alone."""

import random
import time
from pathlib import Path

import pytest

from jobs.bench.safety import made_numbers, measure_cases, read_cases
from ray_ds.serve.safety.policy import DETECTORS

CASES = read_cases(Path(__file__).parent / "cases.toml")


def found(category: str, text: str) -> list[str]:
    return [text[finding.start : finding.end] for finding in DETECTORS[category].find(text)]


@pytest.mark.parametrize(
    "secret",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1B2" * 9,
        "sk-proj-" + "Ab3_" * 10,
        "xoxb-123456789012-abcdefABCDEF",
        "hf_" + "Qw3r" * 9,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    ],
)
def test_keys_of_services_are_found_whole(secret: str) -> None:
    for text in (secret, f"key: {secret}.", f'"{secret}"', f"这是{secret}。"):
        assert any(secret in span for span in found("secret", text)), text


def test_private_keys_are_found_to_their_end_or_to_the_texts() -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow+/=\nabc\n-----END RSA PRIVATE KEY-----"
    assert found("secret", f"see\n{key}\nthere") == [key]
    assert found("secret", f"see\n{key[:45]}") == [key[:45]]


@pytest.mark.parametrize(
    ("text", "secrets"),
    [
        ("password = hunter2Zk9qL1x", ["hunter2Zk9qL1x"]),
        ('API_KEY: "9f86d081884c7d65"', ["9f86d081884c7d65"]),
        ("password = correct-horse-battery", []),
        ("token: aaaaaaaaaaaa1111", []),
        ("The secret of the house is in the garden of 1611.", []),
        ("sk-learn and sk-short", []),
        ("task-0123456789abcdef0123456789", []),
    ],
)
def test_named_values_are_secrets_where_they_look_random(text: str, secrets: list[str]) -> None:
    assert found("secret", text) == secrets


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("card 4111 1111 1111 1111 please", ["4111 1111 1111 1111"]),
        ("5500-0055-5555-5559", ["5500-0055-5555-5559"]),
        ("378282246310005", ["378282246310005"]),
        ("4111 1111 1111 1112", []),
        ("order 1234567890123456", []),
        ("0000 0000 0000 0000", []),
        ("3.14159265358979323846", []),
        ("IBAN DE89 3704 0044 0532 0130 00 BIC COBADEFF", ["DE89 3704 0044 0532 0130 00"]),
        ("GB82WEST12345698765432", ["GB82WEST12345698765432"]),
        ("GB82WEST12345698765433", []),
        ("XX82WEST12345698765432", []),
    ],
)
def test_numbers_of_money_are_told_by_their_check_digits(text: str, numbers: list[str]) -> None:
    assert found("payment", text) == numbers


@pytest.mark.shows("The safety filter's recall and false positives are measured and do not fall")
def test_recall_and_false_positives_stay_where_they_were_measured() -> None:
    figures = measure_cases(CASES)
    found = {
        (label, part): round(figures[label][part]["recall"] * figures[label][part]["sentences"])
        for label in ("harm", "jailbreak")
        for part in ("tuning", "unseen")
    }
    assert found["harm", "tuning"] >= 79 and found["jailbreak", "tuning"] >= 39
    assert found["harm", "unseen"] >= 3 and found["jailbreak", "unseen"] >= 4, "of 24 and 14 in other words"
    assert figures["clean"]["tuning"]["false_positives"] <= 1, "the key logger for pianos"
    assert figures["clean"]["unseen"]["false_positives"] == 0


def test_numbers_made_at_random_are_found_and_near_misses_are_not() -> None:
    for category, positive, near_miss in made_numbers(random.Random(0), 200):
        assert found(category, f"It is {positive}, I think."), positive
        assert not found(category, f"It is {near_miss}, I think."), near_miss


@pytest.mark.parametrize(
    "text",
    ["-" * 4000, "make " * 800, "'" * 4000, "a" * 4000, "1 " * 2000, "how to kill " * 300, "@." * 2000, "A1 " * 1300],
)
def test_no_text_takes_long(text: str) -> None:
    started = time.process_time()
    for detector in DETECTORS.values():
        detector.find(text)
        detector.undecided(text)
    assert time.process_time() - started < 0.5
