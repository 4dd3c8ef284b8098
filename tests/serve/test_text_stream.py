import random

import pytest

from ray_ds.serve.text_stream import TextStream


def feed(stream: TextStream, parts: list[bytes]) -> list[str]:
    return [*(stream.push(part) for part in parts), stream.finish()]


@pytest.mark.parametrize("seed", range(20))
def test_split_characters_never_give_replacement_marks(seed: int) -> None:
    text = "中文 é 👩‍👩‍👧 naïve \u2028 end"
    data = text.encode()
    cuts = sorted(random.Random(seed).sample(range(1, len(data)), 12))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    pieces = feed(TextStream(), parts)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("data", [b"a\xe4\xb8", b"\xff\xfeab", b"\xe4\xb8\xe4\xb8\xad", b"\xed\xa0\x80", b"\xf0\x9f"])
def test_bytes_that_are_no_utf8_become_what_decode_makes_of_them(data: bytes) -> None:
    pieces = feed(TextStream(), [data[i : i + 1] for i in range(len(data))])
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("stop", [["\n\n"], ["abcab", "cabx"], ["a", "b"], ["aab"], ["zz", "<|end|>"], ["中"]])
@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_cut_at_their_first_place_wherever_parts_end(stop: list[str], seed: int) -> None:
    generator = random.Random(seed)
    text = "".join(generator.choice(["a", "b", "c", "x", "\n", "z", "<|end|>", "<|en", "中"]) for _ in range(30))
    ends = [text.find(own) for own in stop if own in text]
    expected = text[: min(ends)] if ends else text
    data = text.encode()
    parts, at = [], 0
    stream = TextStream(stop)
    shown = ""
    while at < len(data) and not stream.is_stopped:
        size = generator.randint(1, 4)
        shown += stream.push(data[at : at + size])
        at += size
        assert expected.startswith(shown), "nothing of a stop string or behind it may be shown"
        parts.append(shown)
    shown += stream.finish()
    if len(expected) < len(text) and stream.is_stopped:
        # The stop that was complete first ended the text; it may begin later than one that completes after it.
        assert text.startswith(shown) and any(text[len(shown) :].startswith(own) for own in stop)
    else:
        assert shown == expected


def test_text_is_held_back_no_longer_than_it_must() -> None:
    stream = TextStream(["END"])
    assert stream.push(b"one E") == "one "
    assert stream.push(b"N") == ""
    assert stream.push(b"x two") == "ENx two"


def test_a_stop_string_that_may_not_stop_is_text_and_the_next_one_stops() -> None:
    stream = TextStream(["END"])
    text = stream.push(b"aEN", may_stop=False) + stream.push(b"Db", may_stop=False)
    assert text == "aENDb" and not stream.is_stopped
    assert stream.push(b"cEN") + stream.push(b"D") == "c" and stream.is_stopped


def test_a_stop_string_begun_too_early_may_end_in_time() -> None:
    stream = TextStream(["END"])
    assert stream.push(b"aEN", may_stop=False) == "a"
    assert stream.push(b"Db") == "" and stream.is_stopped
