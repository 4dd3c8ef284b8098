"""Clients of an endpoint: one question, clients that ask one after the other, and questions that come by chance."""

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import aiohttp

REFUSED = (429, 503)
TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """What clients ask: prompts of random tokens, new each time, and answers of one length."""

    url: str
    headers: Mapping[str, str]
    vocab_size: int
    prompt_tokens: int
    answer_tokens: int

    def prompt(self, generator: random.Random) -> list[int]:
        """Return a prompt."""
        return generator.choices(range(self.vocab_size), k=self.prompt_tokens)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What became of a question; all times are seconds."""

    status: int
    """Of HTTP; 0 = there was no connection, or it broke."""
    ended: float
    """On the monotonic clock."""
    total_s: float
    first_token_s: float | None = None
    is_whole: bool = False
    """Whether the stream came to its end without an error."""

    @property
    def is_refused(self) -> bool:
        """Whether the endpoint said that it has too much to do."""
        return self.status in REFUSED


def new_session(question: Question) -> aiohttp.ClientSession:
    """Return a session with as many connections as there are open questions."""
    return aiohttp.ClientSession(
        headers=question.headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
    )


async def ask(session: aiohttp.ClientSession, question: Question, prompt: Sequence[int]) -> Reply:
    """Ask for a stream and follow it to its end."""
    body = {
        "prompt": list(prompt),
        "max_tokens": question.answer_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    started, first_token_s, is_whole, status = time.monotonic(), None, False, 0
    try:
        async with session.post(f"{question.url}/v1/completions", json=body) as response:
            status = response.status
            async for line in response.content:
                data = line.strip().removeprefix(b"data: ")
                if status != 200 or not data:
                    continue
                if data == b"[DONE]":
                    is_whole = True
                elif "error" in json.loads(data):
                    break
                elif first_token_s is None:
                    first_token_s = time.monotonic() - started
    except (aiohttp.ClientError, TimeoutError):
        status = 0
    ended = time.monotonic()
    return Reply(status=status, ended=ended, total_s=ended - started, first_token_s=first_token_s, is_whole=is_whole)


async def ask_in_turn(question: Question, *, clients: int, seconds: float) -> list[Reply]:
    """Return the replies to clients that each ask again as soon as they have their answer, for so many seconds."""
    replies: list[Reply] = []
    until = time.monotonic() + seconds

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        generator = random.Random(f"in turn {number}")
        while time.monotonic() < until:
            replies.append(await ask(session, question, question.prompt(generator)))

    async with new_session(question) as session:
        await asyncio.gather(*(one(session, number) for number in range(clients)))
    return replies


async def ask_by_chance(question: Question, *, per_s: float, seconds: float) -> list[Reply]:
    """Return the replies to questions that arrive as a Poisson process, whatever became of those before."""
    generator = random.Random("by chance")
    started = at = time.monotonic()
    tasks = []
    async with new_session(question) as session:
        while (at := at + generator.expovariate(per_s)) < started + seconds:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            tasks.append(asyncio.create_task(ask(session, question, question.prompt(generator))))
        return list(await asyncio.gather(*tasks))


def percentile(values: Sequence[float], part: float) -> float:
    """Return the least value that this part of the values does not exceed."""
    return sorted(values)[math.ceil(part * len(values)) - 1]
