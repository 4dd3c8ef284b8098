import queue
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ray_ds.serve.engine import Engine, EngineStoppedError, QueueFullError, UnfitRequestError
from ray_ds.serve.requests import (
    Embedding,
    EmbeddingRequest,
    Event,
    Failure,
    GenerationRequest,
    Piece,
    PromptScores,
    SamplingParams,
)
from ray_ds.serve.text_stream import TextStream


def request(prompt: Sequence[int], **params: Any) -> GenerationRequest:
    return GenerationRequest(prompt=tuple(prompt), params=SamplingParams(**{"max_tokens": 20, **params}))


def start(engine: Engine, requests: Sequence[GenerationRequest]) -> tuple[list[Any], list["queue.SimpleQueue[Event]"]]:
    queues: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in requests]
    return engine.submit([(own, events.put) for own, events in zip(requests, queues, strict=True)]), queues


def collect(events: "queue.SimpleQueue[Event]") -> list[Event]:
    found = []
    while True:
        found.append(events.get(timeout=10))
        last = found[-1]
        if isinstance(last, Failure | Embedding) or (isinstance(last, Piece) and last.finish_reason is not None):
            return found


def answer(engine: Engine, *requests: GenerationRequest) -> list[str]:
    _, queues = start(engine, requests)
    return ["".join(event.text for event in collect(events) if isinstance(event, Piece)) for events in queues]


def wait_until(is_true: Any) -> None:
    deadline = time.monotonic() + 5
    while not is_true():
        assert time.monotonic() < deadline, "did not happen within 5 s"
        time.sleep(0.005)


def test_answers_in_a_batch_are_those_given_alone(engine, model) -> None:
    requests = [
        request(range(3, 5 + 3 * i), max_tokens=5 + 7 * i, temperature=i % 3 * 0.6, seed=f"s{i}") for i in range(8)
    ]
    alone = [answer(engine, own)[0] for own in requests]
    assert answer(engine, *requests) == alone
    assert answer(engine, *reversed(requests)) == alone[::-1]
    assert max(model.batch_sizes) == 4


def test_a_seed_repeats_an_answer_and_none_does_not(engine) -> None:
    assert len(set(answer(engine, *[request([5, 6], seed="7")] * 3))) == 1
    assert len(set(answer(engine, *[request([5, 6])] * 3))) == 3
    assert len(set(answer(engine, *[request([5, 6], seed=str(i)) for i in range(3)]))) == 3


def test_num_tokens_of_the_pieces_add_up_to_max_tokens(engine) -> None:
    _, queues = start(engine, [request([9], max_tokens=33)])
    events = collect(queues[0])
    assert sum(event.num_tokens for event in events) == 33
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == "length"


@pytest.mark.parametrize("end", [0, 1])
def test_bos_and_eos_end_an_answer_and_are_no_part_of_it(engine, model, tokenizer, end) -> None:
    model.scripts[(7, 8)] = [*tokenizer.encode("yes"), end, *tokenizer.encode("never")]
    _, queues = start(engine, [request([7, 8], temperature=0)])
    events = collect(queues[0])
    assert "".join(event.text for event in events) == "yes"
    assert events[-1].finish_reason == "stop" and sum(event.num_tokens for event in events) == 4


def test_a_stop_string_over_token_borders_ends_an_answer(engine, model, tokenizer) -> None:
    ab, ca = 3 + 256 + 4, 3 + 256 + 5
    model.scripts[(7, 8)] = [*tokenizer.encode("x"), ab, ca, ab, *tokenizer.encode("never")]
    _, queues = start(engine, [request([7, 8], temperature=0, stop=("bcaa",))])
    events = collect(queues[0])
    assert "".join(event.text for event in events) == "xa"
    assert events[-1].finish_reason == "stop"


def test_a_character_over_two_tokens_comes_whole(engine, model) -> None:
    model.scripts[(7, 8)] = [3 + 256 + 1, 3 + 256 + 2, 3 + 256 + 1, 1]
    _, queues = start(engine, [request([7, 8], temperature=0)])
    assert [event.text for event in collect(queues[0])] == ["中", "\ufffd"]


def test_a_long_prompt_is_read_in_parts_and_delays_others_by_one_part_a_step(fake_model, tokenizer) -> None:
    model = fake_model(num_sequences=2, max_len=400)
    engine = Engine(model, tokenizer, max_running=2, max_queued=0, step_tokens=32, reuses_prefixes=False)
    engine.start()
    short, long = request([4], max_tokens=50, seed="a"), request(range(3, 243), max_tokens=5, seed="b")
    alone = [answer(engine, own)[0] for own in (short, long)]
    wait_until(lambda: engine.stats.num_running == 0)
    steps = engine.stats.num_steps
    assert answer(engine, short, long) == alone
    # The short prompt and 31 tokens of the long one, then 31 a step beside the short one's token.
    wait_until(lambda: engine.stats.num_running == 0)
    assert engine.stats.num_steps - steps == 50
    engine.close()


def test_cancelling_frees_the_slot_for_those_who_wait(engine, model) -> None:
    model.gate.clear()
    running, _ = start(engine, [request([i + 5], max_tokens=200) for i in range(4)])
    wait_until(lambda: engine.stats.num_running == 4)
    _, queues = start(engine, [request([99], max_tokens=3)])
    waiting, _ = start(engine, [request([98], max_tokens=3)])
    steps = engine.stats.num_steps
    engine.cancel([*running, *waiting])
    model.gate.set()
    collect(queues[0])
    assert engine.stats.num_steps - steps <= 5, "the step under way, then one step a token"
    wait_until(lambda: engine.stats.num_running + engine.stats.num_waiting == 0)
    assert engine.stats.num_cached_tokens == 0


def test_cancelling_a_finished_answer_does_nothing(engine) -> None:
    answers, queues = start(engine, [request([5])])
    collect(queues[0])
    engine.cancel(answers)
    assert answer(engine, request([5], seed="1")) == answer(engine, request([5], seed="1"))


def test_more_requests_than_there_is_room_for_are_refused_whole(engine, model) -> None:
    model.gate.clear()
    _, queues = start(engine, [request([i + 5], max_tokens=2) for i in range(7)])
    with pytest.raises(QueueFullError):
        start(engine, [request([5]), request([6])])
    _, last = start(engine, [request([5], max_tokens=2)])
    model.gate.set()
    for events in [*queues, *last]:
        assert collect(events)[-1].finish_reason == "length"


def test_a_failure_ends_every_request_and_the_engine_says_so(engine, model) -> None:
    model.gate.clear()
    _, queues = start(engine, [request([i + 5]) for i in range(6)])
    model.breaks = True
    model.gate.set()
    for events in queues:
        assert collect(events)[-1] == Failure(message="the engine failed: RuntimeError: out of memory")
    assert engine.failure == "the engine failed: RuntimeError: out of memory"
    with pytest.raises(EngineStoppedError, match="out of memory"):
        start(engine, [request([5])])


def test_logits_that_are_no_numbers_fail_their_own_request_only(engine, model) -> None:
    model.spoils = 77
    _, queues = start(engine, [request([77] * 40), request([5], max_tokens=4), EmbeddingRequest(prompt=(77, 5))])
    assert isinstance(collect(queues[0])[-1], Failure)
    assert collect(queues[1])[-1].finish_reason == "length"
    assert isinstance(collect(queues[2])[-1], Failure)
    assert engine.failure is None
    assert all(77 not in block for block in model.cache), "what the failed ones left is wiped"
    model.spoils = None
    _, queues = start(engine, [request([77] * 40, max_tokens=2)])
    assert collect(queues[0])[-1].num_cached_tokens == 0


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn(fake_model, tokenizer, monkeypatch) -> None:
    original = fake_model.next_logits
    unknown = torch.full((7,), 99.0)
    plain, same = Engine(fake_model(), tokenizer, max_running=1, max_queued=0), request([5], seed="1")
    plain.start()
    text = answer(plain, same)
    plain.close()
    monkeypatch.setattr(
        fake_model, "next_logits", lambda self, sequence: torch.cat((original(self, sequence), unknown))
    )
    wider = Engine(fake_model(), tokenizer, max_running=1, max_queued=0)
    wider.start()
    assert answer(wider, same) == text
    wider.close()


def test_closing_ends_open_requests(engine, model) -> None:
    _, queues = start(engine, [request([5], max_tokens=250)])
    engine.close()
    assert isinstance(collect(queues[0])[-1], Failure)


def test_logprobs_cover_every_token_of_the_text(engine, tokenizer) -> None:
    _, queues = start(engine, [request([5, 6], temperature=0, logprobs=2)])
    events = collect(queues[0])
    entries = [entry for event in events for entry in event.logprobs]
    assert len(entries) == 20
    assert all(entry.top[0][0] == entry.token and len(entry.top) == 2 for entry in entries)
    assert tokenizer.decode([entry.token for entry in entries]) == "".join(event.text for event in events)


def test_a_prompt_takes_the_beginning_it_shares_from_the_cache(engine, model) -> None:
    long = list(range(3, 103))
    first = answer(engine, request(long, seed="1"))
    read = model.num_read
    _, queues = start(engine, [request(long, seed="1"), request([*long[:50], 200], seed="2")])
    events = [collect(own) for own in queues]
    assert ["".join(event.text for event in events[0])] == first
    assert {event.num_cached_tokens for event in events[0]} == {96}, "six whole blocks; the last token is computed"
    assert {event.num_cached_tokens for event in events[1]} == {48}
    assert model.num_read - read == 100 - 96 + 51 - 48
    wait_until(lambda: engine.stats.num_running == 0)
    assert engine.stats.num_prefix_hits == 96 + 48
    assert engine.stats.num_prompt_tokens == 100 + 100 + 51


def test_an_answer_is_a_prefix_like_any_other(engine, model, tokenizer) -> None:
    model.scripts[tuple(range(3, 23))] = [*tokenizer.encode("x" * 30), 1]
    answer(engine, request(range(3, 23), temperature=0, max_tokens=40))
    _, queues = start(engine, [request([*range(3, 23), *tokenizer.encode("x" * 30 + "y")], max_tokens=1)])
    assert collect(queues[0])[-1].num_cached_tokens == 48


def test_without_reuse_every_prompt_is_read(fake_model, tokenizer) -> None:
    model = fake_model()
    engine = Engine(model, tokenizer, max_running=2, max_queued=0, reuses_prefixes=False)
    engine.start()
    assert answer(engine, request(range(3, 103), seed="1")) == answer(engine, request(range(3, 103), seed="1"))
    assert (model.num_read, engine.stats.num_prefix_hits) == (200, 0)
    engine.close()


def test_an_answer_that_had_to_stop_goes_on_as_if_nothing_had_been(fake_model, tokenizer) -> None:
    requests = [request([i + 5], max_tokens=100, seed=str(i), logprobs=1) for i in range(4)]
    roomy = Engine(fake_model(), tokenizer, max_running=4, max_queued=0)
    tight = Engine(fake_model(num_sequences=1, max_len=160), tokenizer, max_running=4, max_queued=0)
    found = []
    for engine in (roomy, tight):
        engine.start()
        _, queues = start(engine, requests)
        found.append([[(e.text, e.logprobs) for e in collect(own)] for own in queues])
        wait_until(lambda engine=engine: engine.stats.num_running == 0)
    assert found[0] == found[1]
    assert roomy.stats.num_preemptions == 0 and tight.stats.num_preemptions > 0
    for engine in (roomy, tight):
        engine.close()


def test_what_could_never_fit_is_refused_at_once(fake_model, tokenizer) -> None:
    model = fake_model(num_sequences=1, max_len=64)
    engine = Engine(model, tokenizer, max_running=4, max_queued=0)
    assert engine.max_model_len == 64
    with pytest.raises(UnfitRequestError, match=r"prompt \(60 tokens\) and max_tokens \(5\).*max_model_len \(64\)"):
        start(engine, [request(range(3, 63), max_tokens=5)])
    with pytest.raises(UnfitRequestError, match="at least 1 token"):
        start(engine, [request([], max_tokens=5)])
    start(engine, [request(range(3, 63), max_tokens=4)])


def test_a_token_that_there_is_not_is_refused_and_breaks_no_step(fake_model, tokenizer) -> None:
    engine = Engine(fake_model(), tokenizer, max_running=1, max_queued=0)
    for unfit in (request([5, 999]), request([5], logit_bias=((-1, 2.0),)), EmbeddingRequest(prompt=(999,))):
        with pytest.raises(UnfitRequestError, match=r"token \((999|-1)\) must be below 265; use the model's tokenizer"):
            start(engine, [unfit])


def test_a_queue_full_of_tokens_refuses_and_says_for_how_long(fake_model, tokenizer) -> None:
    model = fake_model(num_sequences=8)
    engine = Engine(model, tokenizer, max_running=2, max_queued=6, max_queued_tokens=100, step_tokens=32)
    start(engine, [request(range(3, 203), max_tokens=5)])  # finds nobody waiting
    with pytest.raises(QueueFullError) as refused:
        start(engine, [request([5])])
    assert (refused.value.reason, refused.value.retry_after_s) == ("tokens", 1.0)
    engine.start()
    wait_until(lambda: engine.stats.num_tokens == 5)
    model.gate.clear()
    start(engine, [request(range(3, 90), max_tokens=50)] * 2)
    wait_until(lambda: engine.stats.num_waiting_tokens > 0)
    with pytest.raises(QueueFullError) as refused:
        start(engine, [request(range(3, 83))])
    stats = engine.stats
    excess = stats.num_waiting_tokens + 80 - 100
    assert refused.value.retry_after_s == pytest.approx(excess / stats.prefill_tokens_per_s)
    with pytest.raises(QueueFullError) as refused:
        start(engine, [request([5])] * 7)
    assert refused.value.reason == "requests" and refused.value.retry_after_s > 0
    model.gate.set()
    engine.close()


def test_a_prompts_scores_come_first_and_are_those_of_the_definition(fake_model, tokenizer) -> None:
    model = fake_model()
    engine = Engine(model, tokenizer, max_running=2, max_queued=0, step_tokens=32)
    engine.start()
    prompt = [*tokenizer.encode("中文 a"), 3 + 256 + 1, 3 + 256 + 2, *range(3, 83)]
    answer(engine, request(prompt, max_tokens=1))  # so that the cache has it
    _, queues = start(engine, [request(prompt, max_tokens=0, prompt_logprobs=3)])
    scores, last = collect(queues[0])
    assert isinstance(scores, PromptScores)
    assert (last.text, last.num_tokens, last.finish_reason) == ("", 0, "length")
    assert [entry.token for entry in scores.logprobs] == prompt[1:]
    text = TextStream()
    for i, entry in enumerate(scores.logprobs):
        wanted = model.next_logits(prompt[: i + 1]).log_softmax(dim=-1)
        text.push(tokenizer.token_bytes(prompt[i]))
        assert entry.logprob == pytest.approx(float(wanted[entry.token]), abs=1e-6)
        assert [token for token, _ in entry.top] == wanted.topk(3).indices.tolist()
        assert entry.text_offset == text.num_chars
    _, queues = start(engine, [request(prompt, max_tokens=4, prompt_logprobs=0, logprobs=0)])
    events = collect(queues[0])
    assert isinstance(events[0], PromptScores) and sum(event.num_tokens for event in events[1:]) == 4
    engine.close()


def test_a_texts_vector_is_the_mean_of_its_states(fake_model, tokenizer) -> None:
    model = fake_model()
    engine = Engine(model, tokenizer, max_running=2, max_queued=0, step_tokens=32)
    engine.start()
    prompt = tuple(range(3, 83))
    _, queues = start(engine, [EmbeddingRequest(prompt=prompt)])
    (event,) = collect(queues[0])
    states = torch.stack([model.next_logits(list(prompt[: i + 1])) for i in range(len(prompt))]).double()
    wanted = torch.nn.functional.normalize(states.mean(dim=0), dim=0)
    torch.testing.assert_close(torch.tensor(event.values, dtype=torch.float64), wanted)
    engine.close()


def test_nothing_ends_an_answer_before_min_tokens(engine, model, tokenizer) -> None:
    model.scripts[(7, 8)] = [*tokenizer.encode("no"), 1, *tokenizer.encode("!no end"), 1]
    plain, longer = request([7, 8], temperature=0), request([7, 8], temperature=0, min_tokens=3)
    assert answer(engine, plain) == ["no"]
    _, queues = start(engine, [longer])
    events = collect(queues[0])
    assert sum(event.num_tokens for event in events) > 3
    stop = request([7, 8], temperature=0, min_tokens=3, stop=("no",), ignore_eos=True)
    assert answer(engine, stop) == ["no!"]


def test_stop_tokens_end_an_answer_and_ignored_ones_do_not(engine, model, tokenizer) -> None:
    model.scripts[(7, 8)] = [*tokenizer.encode("ab"), 1, *tokenizer.encode("cd")]
    assert answer(engine, request([7, 8], temperature=0, max_tokens=5, ignore_eos=True)) == ["abcd"]
    own = frozenset(tokenizer.encode("c"))
    _, queues = start(engine, [request([7, 8], temperature=0, ignore_eos=True, stop_token_ids=own)])
    events = collect(queues[0])
    assert "".join(event.text for event in events) == "ab" and events[-1].finish_reason == "stop"


def test_rates_are_of_the_work_alone(engine) -> None:
    assert engine.stats.prefill_tokens_per_s == engine.stats.decode_tokens_per_s == 0
    answer(engine, request(range(3, 103), max_tokens=20))
    time.sleep(0.05)
    wait_until(lambda: engine.stats.num_running == 0)
    stats = engine.stats
    assert stats.prefill_tokens_per_s > 0 and stats.decode_tokens_per_s > 0
    time.sleep(0.1)
    assert engine.stats == stats
