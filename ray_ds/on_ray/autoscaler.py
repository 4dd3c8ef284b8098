"""Whether a cluster may get more nodes by itself, as its node autoscaler says (Ray 2.60)."""

import json
from collections.abc import Mapping
from typing import Any

import ray
from ray._private.worker import global_worker
from ray._raylet import (  # type: ignore[attr-defined, unused-ignore]
    GCS_AUTOSCALER_STATE_NAMESPACE,
    GCS_AUTOSCALER_V2_ENABLED_KEY,
)

STATUS_KEY = b"__autoscaling_status"
READONLY_TYPE = "node_"
"""How Ray's monitor names the type of a node that it only watches: this and the node's id."""


def nodes_may_come() -> bool:
    """Tell whether a node autoscaler is at work; its second version, which Kubernetes may have, writes no status."""
    client = global_worker.gcs_client
    namespace = GCS_AUTOSCALER_STATE_NAMESPACE.encode()
    is_second = client.internal_kv_get(GCS_AUTOSCALER_V2_ENABLED_KEY.encode(), namespace=namespace) == b"1"
    return is_second or find_autoscaler(autoscaler_status()) not in ("none", "unknown")


def autoscaler_status() -> Mapping[str, Any]:
    """Return what Ray's monitor last wrote down; nothing where there is none."""
    raw = global_worker.gcs_client.internal_kv_get(STATUS_KEY, namespace=None)
    return json.loads(raw) if raw else {}


def find_autoscaler(status: Mapping[str, Any]) -> str:
    """Return `none` where Ray's monitor only watches nodes, the types that it may start, or `unknown`."""
    report = status.get("autoscaler_report")
    if not report:
        return "unknown"
    types = {str(name) for name in report.get("active_nodes") or {}}
    ids = {node["NodeID"] for node in ray.nodes()} if ray.is_initialized() else set()
    if all(name.removeprefix(READONLY_TYPE) in ids for name in types):
        return "none"
    return ", ".join(sorted(types))
