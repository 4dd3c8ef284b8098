"""No answer's bits tell what else was answered, how its prompt was cut, or what was in the cache.

`make soak` plays ten thousand schedules and keeps the result in `tests/end_to_end/soak_results/engine.json`.
"""

import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ray_ds.serve.answer import Answer
from ray_ds.serve.core import EngineCore
from ray_ds.serve.requests import GenerationRequest, SamplingParams
from tests.end_to_end.conftest import SOAK_RESULTS
from tests.serve.schedules import Letters, Played, alone, draw_requests, int8_model, play

RESULTS = SOAK_RESULTS / "engine.json"
SOAK_SCHEDULES = 10_000


@pytest.mark.shows("An INT8 answer's tokens and logprobs are the same bits in any batch, cut, prefix hit or preemption")
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["latent", "grouped"])
def test_an_answers_bits_are_those_it_has_alone(kind: str, tmp_path: Path) -> None:
    model = int8_model(kind, tmp_path, "schedule")
    outcomes, played = alone(model, draw_requests()), Played()
    for seed in range(100):
        play(model, seed, outcomes, played)
    assert (played.differences, played.differing, played.lost_blocks) == (0, [], 0)
    assert min(played.preemptions, played.aborts, played.prefix_hits) > 20, "the schedules are hard enough"


def test_batch_mates_do_not_tell_where_no_more_is_promised(tmp_path: Path) -> None:
    model = int8_model("latent", tmp_path, "batch")
    outcomes, played = alone(model, draw_requests(), "batch"), Played()
    for seed in range(25):
        play(model, seed, outcomes, played, "batch")
    assert (played.differences, played.differing, played.preemptions, played.prefix_hits) == (0, [], 0, 0)


def test_without_exactness_bits_do_tell(tmp_path: Path) -> None:
    """So that the test above is known to see it."""
    model = int8_model("latent", tmp_path, "none")
    outcomes, played = alone(model, draw_requests()), Played()
    for seed in range(20):
        play(model, seed, outcomes, played)
    assert played.differences > 0 and played.lost_blocks == 0


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_ten_thousand_schedules(tmp_path: Path) -> None:
    results: dict[str, Played] = {}
    for kind in ("latent", "grouped"):
        model = int8_model(kind, tmp_path / kind, "schedule")
        outcomes, results[kind] = alone(model, draw_requests()), Played()
        for seed in range(SOAK_SCHEDULES // 2):
            play(model, seed, outcomes, results[kind])
            if seed % 100 == 99:
                keep(results)
    assert [(played.differences, played.lost_blocks) for played in results.values()] == [(0, 0)] * 2


def keep(results: Mapping[str, Played]) -> None:
    """Write the results so far."""
    content = {
        "soak": "engine",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "schedules": sum(played.schedules for played in results.values()),
        "differences": sum(played.differences for played in results.values()),
        "models": {kind: asdict(played) for kind, played in results.items()},
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


@pytest.mark.shows("10,000 answers broken off at any point leave no block of the cache taken")
def test_aborts_leave_no_block_taken(fake_model: Callable[..., object]) -> None:
    draw = random.Random(0)
    model = fake_model(num_sequences=2, max_len=64)
    model.next_logits = lambda sequence: torch.ones(512)
    core = EngineCore(
        model,
        Letters(512),
        lambda answer, last: open_answers.remove(answer),
        max_running=6,
        step_tokens=48,
        cuts_anywhere=True,
        reuses_prefixes=True,
    )
    open_answers: list[Answer] = []
    num_aborted = 0
    while num_aborted < 10_000:
        while len(open_answers) < 9:
            prompt = (*range(draw.choice([0, 16, 32])), *(draw.randrange(512) for _ in range(draw.randrange(1, 9))))
            request = GenerationRequest(prompt=prompt, params=SamplingParams(max_tokens=draw.randrange(1, 24)))
            open_answers.append(Answer(request, lambda event: None))
            core.scheduler.add(open_answers[-1:])
        core.step()
        for answer in draw.sample(open_answers, min(len(open_answers), draw.randrange(3))):
            open_answers.remove(answer)
            before = core.pool.num_free
            core.scheduler.release(answer)
            assert core.pool.num_free >= before
            num_aborted += 1
    for answer in open_answers:
        core.scheduler.release(answer)
    assert core.pool.num_free == model.num_blocks
    assert core.scheduler.num_preemptions > 100
