"""Random schedules of the engine, played in process, and each request alone to compare with."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ray_ds.config.serve import Exactness
from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from ray_ds.quantize import load_quantized, quantize_folder
from ray_ds.serve.answer import Answer
from ray_ds.serve.core import EngineCore
from ray_ds.serve.paged_decoder import PagedDecoder
from ray_ds.serve.requests import (
    Embedding,
    EmbeddingRequest,
    Event,
    Failure,
    GenerationRequest,
    Piece,
    PromptScores,
    Request,
    SamplingParams,
)
from tests.model.models import KINDS, new_decoder

VOCAB_SIZE = 512
"""Of all models of `KINDS`."""
BLOCK = 16
MAX_LEN = 128
NUM_BLOCKS = 48
"""Blocks that the model has; a schedule may use fewer."""
NUM_REQUESTS = 40
Promise = Literal["batch", "schedule"]
BY_BATCH = {"step_tokens": 32, "cuts_anywhere": False, "reuses_prefixes": False}
"""Of an engine that promises no more than `batch`: cuts follow from the prompt, no prefix is found."""


class Letters:
    """A tokenizer whose every token is a letter; token 0 ends an answer."""

    stop_ids = frozenset((0,))

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def token_bytes(self, token_id: int) -> bytes:
        return bytes((97 + token_id % 26,)) if token_id else b""


def int8_model(kind: str, folder: Path, exactness: Exactness) -> PagedDecoder:
    """Return a small INT8 model of one of `KINDS`, its weights large enough that many tokens are likely."""
    config = KINDS[kind]
    (folder / "model").mkdir(parents=True, exist_ok=True)
    state = new_decoder(config, scale=4.0).state_dict()
    save_checkpoint_folder(state, config, folder / "model", dtype=torch.float32, max_shard_bytes=1 << 30)
    (folder / "model" / "tokenizer.json").write_text("{}")
    quantize_folder(folder / "model", folder / "int8", max_shard_bytes=1 << 30)
    decoder = load_quantized(folder / "int8")
    return PagedDecoder(decoder, num_blocks=NUM_BLOCKS, block_size=BLOCK, max_len=MAX_LEN, exactness=exactness)


def draw_requests() -> list[Request]:
    """Return requests of all kinds, many of which begin alike."""
    draw = random.Random(7)
    beginnings = [[draw.randrange(1, VOCAB_SIZE) for _ in range(length)] for length in (0, 16, 40, 64)]
    requests: list[Request] = []
    for index in range(NUM_REQUESTS):
        own = [draw.randrange(1, VOCAB_SIZE) for _ in range(draw.randrange(1, 12))]
        prompt = (*draw.choice(beginnings), *own)
        if index % 10 == 9:
            requests.append(EmbeddingRequest(prompt=prompt))
            continue
        scores_only = index % 10 == 8
        params = SamplingParams(
            max_tokens=0 if scores_only else draw.choice([1, 7, 20, 50]),
            temperature=draw.choice([0.0, 0.7, 1.5]),
            top_p=draw.choice([1.0, 0.9]),
            top_k=draw.choice([None, 20]),
            min_p=draw.choice([0.0, 0.02]),
            repetition_penalty=draw.choice([1.0, 1.2]),
            frequency_penalty=draw.choice([0.0, 0.5]),
            seed=str(index),
            stop=draw.choice([(), ("qu",)]),
            logprobs=2,
            prompt_logprobs=1 if scores_only or index % 10 == 7 else None,
        )
        requests.append(GenerationRequest(prompt=prompt, params=params))
    return requests


Outcome = tuple[object, ...]
"""All that an answer says, to the last bit, but for how it came in pieces."""


def outcome_of(events: Sequence[Event]) -> Outcome:
    """Return what the events say."""
    pieces = [event for event in events if isinstance(event, Piece)]
    text = "".join(piece.text for piece in pieces)
    logprobs = tuple(entry for piece in pieces for entry in piece.logprobs)
    others = tuple(event for event in events if isinstance(event, PromptScores | Embedding | Failure))
    return text, logprobs, others, pieces[-1].finish_reason if pieces else None


@dataclass(kw_only=True, slots=True)
class Played:
    """What happened in some schedules."""

    schedules: int = 0
    answers: int = 0
    differences: int = 0
    aborts: int = 0
    steps: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    lost_blocks: int = 0
    differing: list[str] = field(default_factory=list)
    """Schedule and request of the first differences."""


def alone(model: PagedDecoder, requests: Sequence[Request], promise: Promise = "schedule") -> dict[Request, Outcome]:
    """Return what each request gets when nothing else ever ran."""
    model.num_blocks = NUM_BLOCKS
    settings = {"step_tokens": 512, "cuts_anywhere": True, "reuses_prefixes": False}
    outcomes = {}
    for request in requests:
        events: list[Event] = []
        core = _core(model, max_running=1, **(settings if promise == "schedule" else BY_BATCH))
        answer = Answer(request, events.append)
        core.scheduler.add([answer])
        while answer.is_running or core.scheduler.waiting:
            core.step()
        outcomes[request] = outcome_of(events)
    return outcomes


def play(
    model: PagedDecoder,
    seed: int,
    outcomes: Mapping[Request, Outcome],
    played: Played,
    promise: Promise = "schedule",
) -> None:
    """Play one schedule drawn from a seed, compare each answer that ended, and count what happened.

    Drawn are how many run, which requests come when, and which of them are aborted when; where the whole schedule is
    promised not to tell, also the size of the cache, how much a step reads and whether prefixes are reused.
    """
    draw = random.Random(seed)
    if promise == "schedule":
        model.num_blocks = draw.choice([8, 9, 11, 14, NUM_BLOCKS])
        core = _core(
            model,
            max_running=draw.choice([1, 4, 8, 8]),
            step_tokens=draw.choice([16, 33, 512]),
            reuses_prefixes=draw.random() < 0.75,
            cuts_anywhere=True,
        )
    else:
        model.num_blocks = NUM_BLOCKS
        core = _core(model, max_running=draw.choice([2, 4, 6]), **BY_BATCH)
    coming = draw.sample(list(outcomes), draw.randrange(2, 14))
    open_answers: dict[Answer, list[Event]] = {}
    while coming or open_answers:
        while coming and (not open_answers or draw.random() < 0.6):
            events: list[Event] = []
            answer = Answer(coming.pop(), events.append)
            core.scheduler.add([answer])
            open_answers[answer] = events
        if draw.random() < 0.02:
            aborted = draw.choice(list(open_answers))
            core.scheduler.release(aborted)
            del open_answers[aborted]
            played.aborts += 1
            continue
        core.step()
        for answer in [own for own in open_answers if not own.is_running and own not in core.scheduler.waiting]:
            played.answers += 1
            if outcome_of(open_answers.pop(answer)) != outcomes[answer.request]:
                played.differences += 1
                played.differing = [*played.differing, f"schedule {seed}: {answer.request}"][:5]
    played.schedules += 1
    played.steps += core.num_steps
    played.prefix_hits += core.scheduler.num_prefix_hits
    played.preemptions += core.scheduler.num_preemptions
    played.lost_blocks += model.num_blocks - core.pool.num_free


def _core(model: PagedDecoder, **settings: object) -> EngineCore:
    return EngineCore(model, Letters(VOCAB_SIZE), lambda answer, last: answer.emit(last), **settings)
