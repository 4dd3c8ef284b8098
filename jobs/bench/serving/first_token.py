"""What HTTP and Ray Serve add to an engine's time to its first token."""

import asyncio
import random
import time
from queue import SimpleQueue

from jobs.bench.serving.load import Question, ask, new_session, percentile
from ray_ds.serve.engine import Engine
from ray_ds.serve.requests import Event, GenerationRequest, Piece, SamplingParams

WARM_UP = 20
"""Requests that are not counted."""


async def measure_first_tokens(question: Question, engine: Engine, *, requests: int) -> dict[str, float]:
    """Return milliseconds to the first token through the endpoint and of the bare engine, one request at a time.

    Each prompt goes to both, one after the other, so that whatever slows the machine slows both.

    Args:
        engine: started, with the endpoint's model and settings.
    """
    generator = random.Random("first tokens")
    through_http, bare = [], []
    async with new_session(question) as session:
        for number in range(WARM_UP + requests):
            prompt = question.prompt(generator)
            reply = await ask(session, question, prompt)
            if not reply.is_whole or reply.first_token_s is None:
                raise RuntimeError(f"{question.url} answered with status {reply.status} and no whole stream")
            bare_s = await asyncio.to_thread(bare_first_token_s, engine, prompt, question.answer_tokens)
            if number >= WARM_UP:
                through_http.append(1000 * reply.first_token_s)
                bare.append(1000 * bare_s)
    figures = {}
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        figures[f"http_{name}_ms"] = percentile(through_http, part)
        figures[f"engine_{name}_ms"] = percentile(bare, part)
        figures[f"overhead_{name}_ms"] = figures[f"http_{name}_ms"] - figures[f"engine_{name}_ms"]
    return figures


def bare_first_token_s(engine: Engine, prompt: list[int], num_tokens: int) -> float:
    """Return the seconds from handing a prompt to an engine to the first piece of its answer; wait for the last."""
    events: SimpleQueue[Event] = SimpleQueue()
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    started = time.monotonic()
    engine.submit([(GenerationRequest(prompt=tuple(prompt), params=params), events.put)])
    event = events.get()
    seconds = time.monotonic() - started
    while isinstance(event, Piece) and event.finish_reason is None:
        event = events.get()
    if not isinstance(event, Piece):
        raise RuntimeError(f"the engine answered with {event}")
    return seconds
