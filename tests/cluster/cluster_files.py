"""Reading what lies in cluster/: the shared settings, YAML and Docker's instructions."""

import re
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parent.parent.parent
CLUSTER = PROJECT / "cluster"
DOCKERFILE = CLUSTER / "image" / "Dockerfile"


def shared_settings() -> dict[str, str]:
    """Return the settings of cluster/settings.env."""
    lines = (CLUSTER / "settings.env").read_text().splitlines()
    pairs = [line.split("=", 1) for line in lines if line and not line.startswith("#")]
    return {name: value for name, value in pairs}


def resources(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def pod_templates(resource: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a resource's cluster and the pod templates in it, the head's first."""
    spec = resource["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return cluster, [group["template"] for group in groups]


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, such as `("COPY", "jobs /opt/ray_ds/jobs")`, with lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]
