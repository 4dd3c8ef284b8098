import queue
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ray_ds.serve.engine import PREFILL_TOKENS, Engine, EngineStoppedError, QueueFullError
from ray_ds.serve.requests import Event, Failure, GenerationRequest, Piece, SamplingParams


def request(prompt: Sequence[int], **params: Any) -> GenerationRequest:
    return GenerationRequest(prompt=tuple(prompt), params=SamplingParams(**{"max_tokens": 20, **params}))


def start(engine: Engine, requests: Sequence[GenerationRequest]) -> tuple[list[Any], list["queue.SimpleQueue[Event]"]]:
    queues: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in requests]
    return engine.submit([(own, events.put) for own, events in zip(requests, queues, strict=True)]), queues


def collect(events: "queue.SimpleQueue[Event]") -> list[Event]:
    found = []
    while True:
        found.append(events.get(timeout=10))
        if isinstance(found[-1], Failure) or found[-1].finish_reason is not None:
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
    assert max(model.batch_sizes) == model.num_slots


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
    model = fake_model(num_slots=2, max_len=PREFILL_TOKENS * 3 + 100)
    engine = Engine(model, tokenizer, max_queued=0)
    engine.start()
    prompt = [3 + i % 256 for i in range(PREFILL_TOKENS * 3 + 50)]
    short, long = request([4], max_tokens=50, seed="a"), request(prompt, max_tokens=5, seed="b")
    together = answer(engine, short, long)
    assert together == [answer(engine, short)[0], answer(engine, long)[0]]
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
    assert model.sequences == {}


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


def test_logits_that_are_no_numbers_fail_their_own_request_only(engine, model, monkeypatch) -> None:
    original = type(model)._logits
    monkeypatch.setattr(
        type(model),
        "_logits",
        lambda self, slot: original(self, slot) * (float("nan") if 77 in self.sequences[slot] else 1),
    )
    _, queues = start(engine, [request([77]), request([5], max_tokens=4)])
    assert isinstance(collect(queues[0])[-1], Failure)
    assert collect(queues[1])[-1].finish_reason == "length"
    assert engine.failure is None


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn(fake_model, tokenizer, monkeypatch) -> None:
    original = fake_model._logits
    unknown = torch.full((7,), 99.0)
    monkeypatch.setattr(fake_model, "_logits", lambda self, slot: torch.cat((original(self, slot), unknown)))
    wider, same = Engine(fake_model(), tokenizer, max_queued=0), request([5], seed="1")
    wider.start()
    text = answer(wider, same)
    wider.close()
    monkeypatch.setattr(fake_model, "_logits", original)
    plain = Engine(fake_model(), tokenizer, max_queued=0)
    plain.start()
    assert answer(plain, same) == text
    plain.close()


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
