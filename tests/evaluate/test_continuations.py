"""Log-likelihoods against a decoder that is given one whole sequence at a time, and against sharing and batching."""

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer

from ray_ds.evaluate.continuations import (
    Continuation,
    Key,
    Likelihood,
    cut_batches,
    cut_left,
    encode_choices,
    plan_rows,
    score_rows,
)
from ray_ds.model.decoder import Decoder
from ray_ds.tokenizer import BpeTokenizer
from tests.evaluate.tiny_tasks import tiny_decoder, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def decoder(tokenizer: BpeTokenizer) -> Decoder:
    return tiny_decoder(tokenizer)


def alone(decoder: Decoder, own: Continuation) -> Likelihood:
    """The reference: one sequence, all logits, one token after another."""
    with torch.no_grad():
        logits = decoder(torch.tensor([own.tokens]))[0].double().log_softmax(-1)
    places = range(own.start, len(own.tokens))
    nats = sum(logits[i - 1, own.tokens[i]].item() for i in places)
    return Likelihood(nats=nats, is_greedy=all(logits[i - 1].argmax().item() == own.tokens[i] for i in places))


def score(decoder: Decoder, continuations: dict[Key, Continuation], micro_batch: int) -> dict[Key, Likelihood]:
    found: dict[Key, Likelihood] = {}
    for batch in cut_batches(plan_rows(continuations), micro_batch, decoder.config.vocab_size):
        found |= score_rows(decoder, batch)
    return found


def some_continuations(tokenizer: BpeTokenizer, count: int) -> dict[Key, Continuation]:
    rng = random.Random(0)
    words = ["Question", "colour", "of", "the", "sky", "blue", "yes", "no", "maybe", "true", "false", "one", "two"]
    found: dict[Key, Continuation] = {}
    for i in range(count):
        prompt = " ".join(rng.choices(words, k=rng.randint(1, 25)))
        texts = [" " + " ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(3)]
        found |= {(i, j): own for j, own in enumerate(encode_choices(tokenizer, prompt, [*texts, " yes", " no"]))}
    return found


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_likelihoods_are_those_of_single_sequences(decoder: Decoder, tokenizer: BpeTokenizer, micro_batch: int) -> None:
    continuations = some_continuations(tokenizer, 12)
    found = score(decoder, continuations, micro_batch)
    assert found.keys() == continuations.keys()
    for key, own in continuations.items():
        expected = alone(decoder, own)
        assert found[key].nats == pytest.approx(expected.nats, abs=2e-4)
        assert found[key].is_greedy == expected.is_greedy


def test_a_continuation_that_the_model_would_write_is_greedy(decoder: Decoder, tokenizer: BpeTokenizer) -> None:
    tokens = [tokenizer.bos_id, *tokenizer.encode("Question: the sky?")]
    start = len(tokens)
    with torch.no_grad():
        for _ in range(4):
            tokens.append(int(decoder(torch.tensor([tokens]))[0, -1].argmax()))
    greedy = Continuation(tokens=tuple(tokens), start=start)
    other = Continuation(tokens=(*tokens[:-1], (tokens[-1] + 1) % 7), start=start)
    found = score(decoder, {(0,): greedy, (1,): other}, 8)
    assert found[0,].is_greedy and not found[1,].is_greedy


def test_labels_of_one_token_share_a_row_and_equal_texts_are_exactly_equal(
    decoder: Decoder, tokenizer: BpeTokenizer
) -> None:
    labels = [bytes([byte]).decode() for byte in b"abcdefgh"]
    own = encode_choices(tokenizer, "Answer:", [*labels, labels[0], "ab", "a"])
    rows = plan_rows({(0, i): continuation for i, continuation in enumerate(own)})
    assert len(rows) == 1  # `ab` has one input more than the labels have, and its row begins with theirs
    found = score(decoder, {(0, i): continuation for i, continuation in enumerate(own)}, 8)
    assert found[0, 0].nats == found[0, 8].nats == found[0, 10].nats


def test_longer_rows_come_first_and_large_vocabularies_make_small_batches() -> None:
    rows = plan_rows({(i,): Continuation(tokens=(0, i, *range(10, 10 + n)), start=1) for i, n in enumerate((3, 9, 5))})
    assert [len(row.inputs) for row in rows] == [10, 6, 4]
    assert [len(batch) for batch in cut_batches(rows, 8, vocab_size=1000)] == [3]
    assert [len(batch) for batch in cut_batches(rows, 8, vocab_size=1 << 24)] == [1, 2]
    assert [len(batch) for batch in cut_batches(rows, 2, vocab_size=1000)] == [2, 1]


@pytest.mark.parametrize(
    ("prompt", "texts", "judged"),
    [
        ("Answer:", [" yes", " no"], [" yes", " no"]),
        # The blank belongs to the word's token, as in training; it is judged in all choices or in none.
        ("Answer: ", ["yes", "no"], [" yes", " no"]),
        ("Answer: ", ["yes", "7"], [" yes", " 7"]),
        ("Answer: ye", ["s", "t"], [" yes", " yet"]),
        ("", [" yes"], [" yes"]),
    ],
)
def test_judged_text_begins_where_the_choices_make_a_difference(
    tokenizer: BpeTokenizer, prompt: str, texts: Sequence[str], judged: Sequence[str]
) -> None:
    found = encode_choices(tokenizer, prompt, texts)
    assert [tokenizer.decode(own.tokens[own.start :]) for own in found] == judged
    assert len({own.tokens[: own.start] for own in found}) == 1
    for own, text in zip(found, texts, strict=True):
        assert own.tokens == (tokenizer.bos_id, *tokenizer.encode(prompt + text))


def test_cutting_keeps_bos_and_cuts_all_choices_alike() -> None:
    own = [Continuation(tokens=(0, 1, 2, 3, 4, 5, 6), start=5), Continuation(tokens=(0, 1, 2, 3, 4, 7), start=5)]
    assert cut_left(own, 6, 0) == own
    assert cut_left(own, 4, 0) == [
        Continuation(tokens=(0, 3, 4, 5, 6), start=3),
        Continuation(tokens=(0, 3, 4, 7), start=3),
    ]
    assert cut_left(own, 2, 0) == [Continuation(tokens=(0, 5, 6), start=1), Continuation(tokens=(0, 7), start=1)]
    assert cut_left(own, 1, 0) is None


def test_without_bos_the_beginning_is_cut_off_whole() -> None:
    own = [Continuation(tokens=(1, 2, 3, 4), start=3)]
    assert cut_left(own, 2, 0) == [Continuation(tokens=(2, 3, 4), start=2)]
    assert cut_left(own, 1, 0) == [Continuation(tokens=(3, 4), start=1)]
    assert cut_left([Continuation(tokens=(1, 2, 3, 4), start=2)], 1, 0) is None


@pytest.mark.shows("A plain prompt starts with BOS where the tokenizer puts it there, as in transformers")
def test_choices_begin_as_the_tokenizer_says(tokenizer: BpeTokenizer) -> None:
    marks = dataclasses.replace(tokenizer.marks, adds_bos=False)
    plain = BpeTokenizer(Tokenizer.from_str(tokenizer.to_json()), marks)
    (found,) = encode_choices(plain, "Answer:", [" yes"])
    assert found.tokens == tuple(plain.encode("Answer: yes")) and found.start == len(plain.encode("Answer:"))
    (alone,) = encode_choices(plain, "", [" yes"])
    assert alone.tokens == (plain.bos_id, *plain.encode(" yes")) and alone.start == 1
    (opened,) = encode_choices(tokenizer, "", [" yes"], opening=(0, 7))
    assert opened.tokens == (0, 7, *tokenizer.encode(" yes")) and opened.start == 2
