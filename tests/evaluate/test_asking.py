"""A chat's questions become the tokens that the model's template and its training make of the same messages."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ds.chat.encoding import ChatEncoder
from ray_ds.chat.template import DEFAULT_TEMPLATE, ChatTemplate
from ray_ds.errors import InputError
from ray_ds.evaluate.asking import ask_task
from ray_ds.evaluate.questions import read_questions
from ray_ds.evaluate.tasks import judge, plan_work, run_batch
from tests.evaluate.tiny_tasks import CHOOSE, CLASSIFY, GENERATE, task, tiny_decoder, tiny_tokenizer, write_jsonl
from tests.exchange.hf_folders import MARKS
from tests.exchange.test_tokenizer import imported

ITEMS: list[dict[str, Any]] = [
    {"question": "the sky?", "options": ["blue", "two three"], "right": 0, "answer": "blue", "label": "yes"},
    {"question": "one two?", "options": ["four", "three"], "right": 1, "answer": "three", "label": "no"},
]
PLAIN_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


def encoder(template: str = DEFAULT_TEMPLATE) -> ChatEncoder:
    return ChatEncoder(ChatTemplate(template), tiny_tokenizer())


def chat_task(folder: Path, **settings: Any) -> Any:
    return task(write_jsonl(folder / "a.jsonl", *ITEMS), prompt="{question}", chat=True, **settings)


@pytest.mark.shows("Plain prompts in evaluation are the tokens that transformers makes of them, BOS included or not")
@pytest.mark.parametrize("style", list(MARKS))
def test_plain_prompts_are_those_of_the_models_own_tokenizer(tmp_path: Path, style: str) -> None:
    from transformers import AutoTokenizer

    ours, theirs = imported(tmp_path, style), AutoTokenizer.from_pretrained(tmp_path)
    files = write_jsonl(tmp_path / "a.jsonl", *ITEMS)
    written = task(files, prompt="{question} Answer:", generate=GENERATE)
    chosen = task(files, prompt="{question} Answer:", choose=CHOOSE, joiner=" ")
    prompts = ask_task(0, written, read_questions(written), ours, 128).prompts
    choices = ask_task(0, chosen, read_questions(chosen), ours, 128).continuations
    for i, item in enumerate(ITEMS):
        prompt = f"{item['question']} Answer:"
        assert list(prompts[i].tokens) == theirs(prompt).input_ids
        for j, option in enumerate(item["options"]):
            assert list(choices[0, i, j].tokens) == theirs(f"{prompt} {option}").input_ids
    assert (prompts[0].tokens[0] == ours.bos_id) == (style != "qwen")


@pytest.mark.shows("Few-shot examples of a chat task are turns, written by the model's own chat template")
def test_shots_are_turns_of_the_models_template(tmp_path: Path) -> None:
    own = chat_task(tmp_path, generate=GENERATE, shots=1, preamble="Be short.")
    questions = read_questions(own)
    assert questions[0].messages == (
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one two?"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "the sky?"},
    )
    tokenizer = tiny_tokenizer()
    asked = ask_task(0, own, questions, tokenizer, 128, encoder())
    bos, eos, encode = tokenizer.bos_id, tokenizer.eos_id, tokenizer.encode
    written = [bos, *encode("system\nBe short."), eos, *encode("user\none two?"), eos]
    written += [*encode("assistant\nthree"), eos, *encode("user\nthe sky?"), eos, *encode("assistant\n")]
    assert list(asked.prompts[0].tokens) == written


def test_choices_are_the_answers_that_training_learns(tmp_path: Path) -> None:
    own = chat_task(tmp_path, choose=CHOOSE, shots=1)
    questions = read_questions(own)
    tokenizer, chat = tiny_tokenizer(), encoder()
    asked = ask_task(3, own, questions, tokenizer, 128, chat)
    for i, question in enumerate(questions):
        for choice, text in enumerate(question.choices):
            answered = [*question.messages, {"role": "assistant", "content": text}]
            learnt = chat.encode(answered, first_answer=len(question.messages))
            found = asked.continuations[3, i, choice]
            # The answer of training ends with EOS.
            assert (*found.tokens, tokenizer.eos_id) == tuple(learnt.tokens[: len(found.tokens) + 1])
            assert learnt.is_answer.index(True) == found.start


def test_a_chat_is_answered_from_start_to_end(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    decoder = tiny_decoder(tokenizer)
    own = chat_task(tmp_path, classify=CLASSIFY)
    asked = ask_task(0, own, read_questions(own), tokenizer, 128, encoder())
    results = {}
    for batch in plan_work([asked], 4, tokenizer.vocab_size):
        results |= run_batch(decoder, tokenizer, batch)
    for i, outcome in enumerate(judge(0, asked, results)):
        expected = []
        for choice in range(3):
            continuation = asked.continuations[0, i, choice]
            with torch.no_grad():
                logprobs = decoder(torch.tensor([continuation.tokens]))[0].double().log_softmax(-1)
            places = range(continuation.start, len(continuation.tokens))
            expected.append(sum(logprobs[at - 1, continuation.tokens[at]].item() for at in places))
        assert outcome.nats == pytest.approx(expected, abs=1e-3)
        assert outcome.answer == ["yes", "no", "maybe"][expected.index(max(expected))]


def test_reports_of_models_with_other_templates_can_be_compared(tmp_path: Path) -> None:
    own = chat_task(tmp_path, generate=GENERATE)
    questions = read_questions(own)
    ours, other = (
        ask_task(0, own, questions, tiny_tokenizer(), 128, encoder(t)) for t in (DEFAULT_TEMPLATE, PLAIN_TEMPLATE)
    )
    assert ours.prompts[0].tokens != other.prompts[0].tokens
    assert ours.questions[0].sha256 == other.questions[0].sha256
    plain = read_questions(task(own.files, prompt="{question}", generate=GENERATE))
    assert plain[0].sha256 != questions[0].sha256


def test_a_chat_that_does_not_fit_or_is_refused_by_its_template(tmp_path: Path) -> None:
    own = chat_task(tmp_path, choose=CHOOSE)
    questions = read_questions(own)
    with pytest.raises(InputError, match=r"line 1 \(\d+ tokens\) must fit.* seq_len = 8; ask for fewer shots\.$"):
        ask_task(0, own, questions, tiny_tokenizer(), 8, encoder())
    refusing = "{{ raise_exception('no users here') }}"
    with pytest.raises(InputError, match=r"task t: messages \(roles user\) must be what the chat template takes \(no"):
        ask_task(0, own, questions, tiny_tokenizer(), 128, encoder(refusing))
