import pytest

from ray_ds.plan import states
from tests.plan.engines import BUCKET_NUMEL


@pytest.fixture
def small_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "BUCKET_NUMEL", BUCKET_NUMEL)
