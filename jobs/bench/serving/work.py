"""What every measured system does, and how it is timed; the standard library alone, for any interpreter runs this."""

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULT = "RESULT "
"""Begins the line of a system's output that holds its figures."""

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], Sequence[int]]
"""Answers all prompts at once with so many tokens each, greedily; returns how many tokens each answer has."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a system has to do."""

    folder: str
    """Its model, in Hugging Face's layout."""
    vocab_size: int
    prompt_tokens: int
    output_tokens: int
    """Of every answer, whatever its tokens are; at least 2."""
    concurrency: list[int]
    """Prompts that are answered at the same time, one measurement each."""
    runs: int
    threads: int
    device: str = "cpu"
    exactness: str = "none"
    """Of our engine, as `ServeSettings.exactness`."""
    precision: str = "fp32"
    """Of our engine, as `ServeSettings.precision`."""

    @property
    def max_len(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.prompt_tokens + self.output_tokens

    def prompts(self, count: int, name: str) -> Prompts:
        """Return prompts of random tokens, the same for every system and new for every name: no prefix comes twice."""
        generator = random.Random(f"{count} {name}")
        return [generator.choices(range(self.vocab_size), k=self.prompt_tokens) for _ in range(count)]

    def to_json(self) -> str:
        """Return the command line's only argument."""
        return json.dumps(asdict(self))


def run_as_program(load: Callable[[Work], Generate]) -> None:
    """Do the work of the command line with what `load` gives, and print the figures."""
    work = Work(**json.loads(sys.argv[1]))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: work.threads])
    print(RESULT + json.dumps(measure(work, load)), flush=True)


def measure(work: Work, load: Callable[[Work], Generate]) -> dict[str, Any]:
    """Return a row for each concurrency, and what the loaded model takes.

    `prefill` is the time until every prompt has its first token, from runs of their own with one token an answer;
    `decode` is what the other tokens take beyond that. Both are outside views, so they mean the same for every system.
    """
    started = time.perf_counter()
    generate = load(work)
    load_s = time.perf_counter() - started
    rows = []
    for count in work.concurrency:
        _seconds(generate, work.prompts(count, "warm-up"), work.output_tokens)
        firsts, wholes = [], []
        for run in range(work.runs):
            firsts.append(_seconds(generate, work.prompts(count, f"{run} first"), 1))
            wholes.append(_seconds(generate, work.prompts(count, f"{run} whole"), work.output_tokens))
        rows.append(_row(work, count, firsts, wholes))
    return {"load_s": load_s, "rss_bytes": resident_bytes(os.getpid()), "rows": rows}


def _seconds(generate: Generate, prompts: Prompts, num_tokens: int) -> float:
    started = time.perf_counter()
    lengths = generate(prompts, num_tokens)
    seconds = time.perf_counter() - started
    if list(lengths) != [num_tokens] * len(prompts):
        raise RuntimeError(f"answers have {list(lengths)} tokens; each of {len(prompts)} must have {num_tokens}")
    return seconds


def _row(work: Work, count: int, firsts: list[float], wholes: list[float]) -> dict[str, float | None]:
    """Return medians; `decode_tokens_per_s` is None where the other tokens took no time that could be told apart."""
    first_s, whole_s = statistics.median(firsts), statistics.median(wholes)
    decode_s = whole_s - first_s
    tokens = count * work.output_tokens
    return {
        "concurrency": count,
        "output_tokens_per_s": tokens / whole_s,
        "slowest_output_tokens_per_s": tokens / max(wholes),
        "fastest_output_tokens_per_s": tokens / min(wholes),
        "prefill_tokens_per_s": count * work.prompt_tokens / first_s,
        "decode_tokens_per_s": (tokens - count) / decode_s if decode_s > 0 else None,
    }


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and of all that it started."""
    status = Path(f"/proc/{pid}/status").read_text()
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0)
    children = [child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    return own + sum(resident_bytes(int(child)) for child in children)
