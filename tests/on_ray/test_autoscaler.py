"""Who adds nodes to a cluster, from what Ray writes down about it."""

import json
import os
from types import SimpleNamespace

os.environ["RAY_AUTH_MODE"] = "disabled"

import pytest

from ray_ds.on_ray import autoscaler
from ray_ds.on_ray.autoscaler import find_autoscaler, nodes_may_come

NODE_ID = "a" * 56
WATCHED = {"autoscaler_report": {"active_nodes": {f"node_{NODE_ID}": 1}}}
SCALED = {"autoscaler_report": {"active_nodes": {"cpu-worker": 2, "head": 1}}}


@pytest.fixture(autouse=True)
def nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": NODE_ID}])


@pytest.mark.parametrize(("status", "found"), [({}, "unknown"), (WATCHED, "none"), (SCALED, "cpu-worker, head")])
def test_who_adds_nodes_is_told(status: dict[str, object], found: str) -> None:
    assert find_autoscaler(status) == found


@pytest.mark.parametrize(
    ("status", "second", "may_come"),
    [(None, None, False), (WATCHED, b"0", False), (SCALED, None, True), (None, b"1", True)],
    ids=["no monitor", "nodes are only watched", "first version", "second version"],
)
def test_nodes_may_come_where_an_autoscaler_is_at_work(
    status: dict[str, object] | None, second: bytes | None, may_come: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {autoscaler.STATUS_KEY: status and json.dumps(status).encode(), b"__autoscaler_v2_enabled": second}
    client = SimpleNamespace(internal_kv_get=lambda key, namespace: kept[key])
    monkeypatch.setattr(autoscaler, "global_worker", SimpleNamespace(gcs_client=client))
    assert nodes_may_come() is may_come
