"""What an endpoint answers when five times as much is asked of it as it can answer."""

import math
import time
from collections.abc import Sequence

from pydantic import JsonValue

from jobs.bench.serving.load import Question, Reply, ask_by_chance, ask_in_turn, percentile

OVERLOAD = 5.0
WARM_UP = 0.2
"""Part of a load's time that is left out of what is counted: places and queue fill."""


async def measure_overload(
    question: Question, *, num_places: int, num_queued: int, seconds: float, target_ttft_s: float
) -> dict[str, JsonValue]:
    """Return the goodput at the most that is never refused and at five times that, and how refusals come.

    Goodput is whole answers a second whose first token came in time (DistServe, arXiv 2401.09670).

    Args:
        num_places, num_queued: answers that the endpoint writes at a time, and requests that may wait beside them; as
            many clients find every place taken and none is refused.
        seconds: of each of the two loads.
        target_ttft_s: what is in time.
    """
    started = time.monotonic()
    before = await ask_in_turn(question, clients=num_places + num_queued, seconds=seconds)
    peak_per_s = goodput(before, started, seconds, target_ttft_s)
    offered_per_s = OVERLOAD * goodput(before, started, seconds, math.inf)
    started = time.monotonic()
    replies = await ask_by_chance(question, per_s=offered_per_s, seconds=seconds)
    goodput_per_s = goodput(replies, started, seconds, target_ttft_s)
    refusals_s = [reply.total_s for reply in replies if reply.is_refused]
    ttfts_s = [reply.first_token_s for reply in replies if reply.first_token_s is not None]
    return {
        "target_ttft_s": target_ttft_s,
        "peak_per_s": peak_per_s,
        "refused_at_peak": sum(reply.is_refused for reply in before),
        "offered_per_s": offered_per_s,
        "goodput_per_s": goodput_per_s,
        "goodput_of_peak": goodput_per_s / peak_per_s if peak_per_s else None,
        "answered": sum(reply.is_whole for reply in replies),
        "refused": len(refusals_s),
        "broken": sum(not reply.is_whole and not reply.is_refused for reply in [*before, *replies]),
        "refusal_p50_ms": 1000 * percentile(refusals_s, 0.5) if refusals_s else None,
        "refusal_p99_ms": 1000 * percentile(refusals_s, 0.99) if refusals_s else None,
        "ttft_p99_ms": 1000 * percentile(ttfts_s, 0.99) if ttfts_s else None,
    }


def goodput(replies: Sequence[Reply], started: float, seconds: float, target_ttft_s: float) -> float:
    """Return good answers a second, of those that ended after the warm-up and before the load did."""
    begin, end = started + WARM_UP * seconds, started + seconds
    good = [
        reply
        for reply in replies
        if reply.is_whole and reply.first_token_s is not None and reply.first_token_s <= target_ttft_s
    ]
    return sum(begin <= reply.ended < end for reply in good) / (end - begin)
