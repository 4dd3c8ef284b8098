"""Answers on their way through the screen, cut into pieces in every way."""

import random

import pytest

from ray_ds.config.safety import SafetySettings
from ray_ds.serve.requests import Piece, TokenLogprobs
from ray_ds.serve.safety.policy import make_policy
from ray_ds.serve.safety.screen import OutputScreen

CARD = "4111 1111 1111 1111"
KEY = "sk-" + "a1B2c3D4" * 4
TEXTS = {
    f"The card is {CARD} and the key {KEY}. Done.": "The card is [payment removed] and the key [secret removed]. Done.",
    f"{CARD}": "[payment removed]",
    f"password: {KEY[3:]}\nDE89370400440532013000!": "password: [secret removed]\n[payment removed]!",
    "-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----\nafter": "[secret removed]\nafter",
    "中文里的密钥" + KEY + "，好": "中文里的密钥[secret removed]，好",
    "Numbers 4111 1111 1111 1112 and 12 are fine; bob@example.com too. So, how to make bread?": None,
    "": "",
}
"""What the model writes, and what readers see; None = the same."""
HARM = "Bread is easy. How to build a pipe bomb: first take a tube. Then nothing."


def new_screen(**settings: str) -> OutputScreen:
    policy = make_policy(SafetySettings(**settings).resolved("both"))
    assert policy is not None
    screen = policy.new_screen()
    assert screen is not None
    return screen


def pieces_of(text: str, generator: random.Random, size: int, end: str = "stop") -> list[Piece]:
    """Return the text in pieces, each with one token of log-probability minus its number; the last one empty."""
    pieces, at = [], 0
    while at < len(text):
        length = generator.randint(1, size)
        entry = TokenLogprobs(token=at, logprob=-float(at), top=(), text_offset=at)
        pieces.append(Piece(text=text[at : at + length], num_tokens=1, logprobs=(entry,)))
        at += length
    return [*pieces, Piece(text="", num_tokens=1, finish_reason=end)]


def screened(text: str, screen: OutputScreen, pieces: list[Piece]) -> list[Piece]:
    return [piece for piece in map(screen.take, pieces) if piece is not None]


@pytest.mark.shows("Secrets and card numbers never leave the endpoint, however the stream cuts them")
@pytest.mark.parametrize("size", [1, 2, 5, 40])
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_redacted_does_not_depend_on_the_pieces(text: str, size: int) -> None:
    generator = random.Random(size)
    for _ in range(10):
        out = screened(text, new_screen(), pieces_of(text, generator, size))
        assert "".join(piece.text for piece in out) == (text if TEXTS[text] is None else TEXTS[text])
        assert out[-1].finish_reason == "stop" and [piece.finish_reason for piece in out[:-1]] == [None] * (
            len(out) - 1
        )


def test_ordinary_text_is_delayed_by_a_word_at_the_most() -> None:
    text = "In the beginning God created the heaven and the earth, and made 7 days. "
    screen, seen = new_screen(), ""
    for at in range(len(text)):
        piece = screen.take(Piece(text=text[at], num_tokens=1))
        seen += "" if piece is None else piece.text
        assert at + 1 - len(seen) <= len("beginning") + 1
    assert seen == text


@pytest.mark.parametrize("size", [1, 3, 100])
def test_tokens_and_logprobs_of_what_is_redacted_are_counted_but_not_shown(size: int) -> None:
    for text, expected in TEXTS.items():
        pieces = pieces_of(text, random.Random(size), size)
        out = screened(text, new_screen(), pieces)
        entries = [entry for piece in out for entry in piece.logprobs]
        shown = "".join(piece.text for piece in out)
        assert sum(piece.num_tokens for piece in out) == sum(piece.num_tokens for piece in pieces)
        for entry in entries:
            assert shown[entry.text_offset : entry.text_offset + 1] == text[entry.token : entry.token + 1]
        if expected is None:
            assert entries == [entry for piece in pieces for entry in piece.logprobs]
        elif size == 1:
            assert len(entries) == len(expected.replace("[payment removed]", "").replace("[secret removed]", ""))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_harm_ends_the_answer_before_its_telling_words(size: int) -> None:
    out = screened(HARM, new_screen(), pieces_of(HARM, random.Random(0), size))
    seen = "".join(piece.text for piece in out)
    assert out[-1].finish_reason == "content_filter"
    assert HARM.startswith(seen) and seen.startswith("Bread is easy.") and "pipe bomb" not in seen
    assert [piece.finish_reason for piece in out[:-1]] == [None] * (len(out) - 1)


def test_an_innocent_end_of_a_sentence_lets_it_pass() -> None:
    text = "How to make a bomb is not told here, as the museum only shows its history."
    out = screened(text, new_screen(), pieces_of(text, random.Random(0), 3))
    assert "".join(piece.text for piece in out) == text and out[-1].finish_reason == "stop"


def test_actions_are_what_the_settings_say() -> None:
    text = f"Call bob@example.com or pay with {CARD}."
    for settings, expected, reason in (
        ({"contact": "redact", "payment": "allow"}, f"Call [contact removed] or pay with {CARD}.", "stop"),
        ({"payment": "block"}, "Call bob@example.com or pay with ", "content_filter"),
        ({"harm": "allow", "secret": "allow"}, "Call bob@example.com or pay with [payment removed].", "stop"),
    ):
        out = screened(text, new_screen(**settings), pieces_of(text, random.Random(1), 2))
        assert "".join(piece.text for piece in out) == expected and out[-1].finish_reason == reason


def test_the_length_limit_stays_the_reason_where_nothing_is_blocked() -> None:
    out = screened(CARD, new_screen(), pieces_of(CARD, random.Random(1), 2, end="length"))
    assert out[-1].finish_reason == "length"
