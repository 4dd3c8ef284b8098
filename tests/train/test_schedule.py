import itertools
import math

import pytest

from ray_ds.config.optimizer import Schedule
from ray_ds.train.schedule import lr_factor


def test_rate_rises_linearly_to_the_peak_then_falls_as_a_cosine_to_its_floor() -> None:
    schedule = Schedule(warmup_steps=4, final_lr_fraction=0.2)
    factors = [lr_factor(step, 14, schedule) for step in range(14)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[-1] == pytest.approx(0.2)
    assert factors[8] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[3:]))


def test_without_warm_up_the_first_step_is_near_the_peak() -> None:
    schedule = Schedule(warmup_steps=0, final_lr_fraction=0.0)
    assert lr_factor(0, 1000, schedule) == pytest.approx(1.0, abs=1e-4)
    assert lr_factor(999, 1000, schedule) == 0.0
