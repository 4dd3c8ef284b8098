"""Nodes die, join and drain by drawn schedules, and no loss tells."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.on_ray.kill_join_schedules import draw, play, undisturbed_losses
from tests.on_ray.two_nodes import start_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

NUM_STEPS = 1200


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return undisturbed_losses(tmp_path_factory.mktemp("quiet"), NUM_STEPS)


@pytest.mark.shows("Nodes die, join and drain in any order and no step's loss tells: schedules by seed on real raylets")
@pytest.mark.parametrize("seed", range(5))
def test_no_loss_tells_what_happened_to_nodes(cluster: Cluster, losses: list[float], tmp_path: Path, seed: int) -> None:
    outcome = play(draw(seed, num_events=2), cluster, tmp_path, losses)
    assert outcome.faults == [], outcome
