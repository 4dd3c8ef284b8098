"""Nodes die, join and drain by drawn schedules, and no loss tells.

`make soak` plays fifty of them and keeps the results in `tests/end_to_end/soak_results/nodes.json`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.end_to_end.conftest import SOAK_RESULTS
from tests.on_ray.kill_join_schedules import Outcome, draw, play, undisturbed_losses
from tests.on_ray.two_nodes import start_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_STEPS = 2500
"""Of the quiet run: more than the longest schedule trains for."""
SOAK_SEEDS = range(100, 150)
RESULTS = SOAK_RESULTS / "nodes.json"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return undisturbed_losses(tmp_path_factory.mktemp("quiet"), NUM_STEPS)


@pytest.mark.shows("Nodes die, join and drain in any order and no step's loss tells: schedules by seed on real raylets")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(5))
def test_no_loss_tells_what_happened_to_nodes(cluster: Cluster, losses: list[float], tmp_path: Path, seed: int) -> None:
    outcome = play(draw(seed, num_events=2), cluster, tmp_path, losses)
    assert outcome.faults == [], outcome


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_fifty_schedules(cluster: Cluster, losses: list[float], tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    for seed in SOAK_SEEDS:
        outcomes.append(play(draw(seed, num_events=3), cluster, tmp_path / str(seed), losses))
        keep(outcomes)
    assert [outcome for outcome in outcomes if outcome.faults] == []


def keep(outcomes: list[Outcome]) -> None:
    """Write the results so far."""
    kinds = [event.kind for outcome in outcomes for event in outcome.schedule.events]
    results = {
        "soak": "nodes",
        "cpus": os.cpu_count(),
        "schedules": len(outcomes),
        "events": {kind: kinds.count(kind) for kind in ("kill", "join", "drain")},
        "failed": sum(bool(outcome.faults) for outcome in outcomes),
        "steps": sum(outcome.steps for outcome in outcomes),
        "steps_done_again": sum(outcome.repeats for outcome in outcomes),
        "largest_difference": max(outcome.largest_difference for outcome in outcomes),
        "outcomes": [outcome.as_json() for outcome in outcomes],
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
