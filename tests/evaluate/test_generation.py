"""Written answers against a decoder without a cache, alone and in batches; stop texts and seeds."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from ray_ds.evaluate.generation import Answer, Prompt, batch_prompts, fit_prompt, write_answers
from ray_ds.model.decoder import Decoder
from ray_ds.tokenizer import BpeTokenizer
from tests.evaluate.tiny_tasks import tiny_decoder, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def decoder(tokenizer: BpeTokenizer) -> Decoder:
    return tiny_decoder(tokenizer)


def prompts(tokenizer: BpeTokenizer, count: int, **settings: object) -> list[Prompt]:
    texts = [f"Question {i} of the sky{' blue' * (i % 5)}? Answer:" for i in range(count)]
    common: dict[str, object] = {"max_new_tokens": 12, "stop": (), **settings}
    return [
        Prompt(key=(0, i), tokens=(tokenizer.bos_id, *tokenizer.encode(text)), seed=f"{i}", **common)  # type: ignore[arg-type]
        for i, text in enumerate(texts)
    ]


def greedy_alone(decoder: Decoder, tokenizer: BpeTokenizer, prompt: Prompt) -> tuple[str, bool]:
    """The reference: the whole sequence anew for each token."""
    tokens = list(prompt.tokens)
    with torch.no_grad():
        while len(tokens) < len(prompt.tokens) + prompt.max_new_tokens:
            token = int(decoder(torch.tensor([tokens]))[0, -1].argmax())
            if token in tokenizer.stop_ids:
                return tokenizer.decode(tokens[len(prompt.tokens) :]), True
            tokens.append(token)
    return tokenizer.decode(tokens[len(prompt.tokens) :]), False


def write(
    decoder: Decoder, tokenizer: BpeTokenizer, asked: list[Prompt], micro_batch: int
) -> dict[tuple[int, ...], Answer]:
    found: dict[tuple[int, ...], Answer] = {}
    for batch in batch_prompts(asked, micro_batch):
        found |= write_answers(decoder, tokenizer, batch)
    return found


@pytest.mark.parametrize("micro_batch", [1, 3, 16])
def test_greedy_answers_are_those_of_the_whole_sequence(
    decoder: Decoder, tokenizer: BpeTokenizer, micro_batch: int
) -> None:
    asked = prompts(tokenizer, 10)
    found = write(decoder, tokenizer, asked, micro_batch)
    for prompt in asked:
        assert (found[prompt.key].text, found[prompt.key].is_stopped) == greedy_alone(decoder, tokenizer, prompt)


def test_sampled_answers_follow_from_their_seed_and_not_from_the_batch(
    decoder: Decoder, tokenizer: BpeTokenizer
) -> None:
    asked = prompts(tokenizer, 8, temperature=1.0)
    found = write(decoder, tokenizer, asked, 8)
    assert found == write(decoder, tokenizer, asked, 1) == write(decoder, tokenizer, asked[::-1], 3)
    other = write(decoder, tokenizer, [dataclasses.replace(own, seed=own.seed + "x") for own in asked], 8)
    assert sum(found[key] != other[key] for key in found) >= 6


def test_sampled_tokens_have_the_models_probabilities(decoder: Decoder, tokenizer: BpeTokenizer) -> None:
    (own,) = prompts(tokenizer, 1, temperature=0.7, max_new_tokens=1)
    with torch.no_grad():
        logits = decoder(torch.tensor([own.tokens]))[0, -1].double()
    wanted = (logits / 0.7).softmax(-1).numpy()
    text_of = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    likely = [i for i in np.argsort(-wanted)[:5] if text_of.count(text_of[i]) == 1]
    num = 4000
    drawn = write(decoder, tokenizer, [dataclasses.replace(own, key=(i,), seed=str(i)) for i in range(num)], 500)
    counts = np.array([sum(answer.text == text_of[i] for answer in drawn.values()) for i in likely])
    observed = [*counts, num - counts.sum()]
    expected = [*(num * wanted[likely]), num * (1 - wanted[likely].sum())]
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_a_stop_text_ends_an_answer_wherever_it_lies_in_tokens(decoder: Decoder, tokenizer: BpeTokenizer) -> None:
    (own,) = prompts(tokenizer, 1)
    text, _ = greedy_alone(decoder, tokenizer, own)
    middle = len(text) // 2
    stop = text[middle : middle + 2]
    found = write_answers(decoder, tokenizer, [dataclasses.replace(own, stop=("nowhere", stop))])
    assert found[own.key] == Answer(text=text[: text.index(stop)], is_stopped=True)


def test_prompts_lose_their_beginning_to_make_room() -> None:
    tokens = (0, 1, 2, 3, 4)
    assert fit_prompt(tokens, 4, 8, 0) == tokens  # 5 read, and 3 of the 4 written
    assert fit_prompt(tokens, 4, 7, 0) == (0, 2, 3, 4)
    assert fit_prompt(tokens, 4, 4, 0) == (0,)
    assert fit_prompt(tokens, 4, 3, 0) is None
    assert fit_prompt(tokens, 4, 7, 9) == (1, 2, 3, 4)
