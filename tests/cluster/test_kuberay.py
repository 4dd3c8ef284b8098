"""The files for KubeRay against its fields, of which we hold a copy, and what they must hold besides."""

import json
import re
import shlex
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from jobs import run_recipe
from ray_ds.config.serve import ServeSettings
from ray_ds.config.settings import decode_settings
from ray_ds.recipe import load_recipe
from tests.cluster.cluster_files import CLUSTER, PROJECT, pod_templates, resources
from tests.cluster.kuberay_schema import complaints

FOLDER = CLUSTER / "kuberay"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
RAY_FILES = ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"]


def load(name: str) -> dict[str, Any]:
    """Return the one resource of a file."""
    (resource,) = resources(FOLDER / name)
    return resource


def test_nothing_is_missing() -> None:
    assert FILES == ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml", "redis.yaml"]


@pytest.mark.shows(
    "The files for KubeRay fit Kubernetes' schema and our copy of KubeRay's fields; a misspelt one is found"
)
@pytest.mark.parametrize("name", FILES)
def test_files_fit_the_schema(name: str) -> None:
    for resource in resources(FOLDER / name):
        assert complaints(resource) == []


@pytest.mark.parametrize(
    ("path", "key", "value", "complaint"),
    [
        ("spec", "enableInTreeAutoscalling", True, r"'enableInTreeAutoscalling' was unexpected"),
        ("spec.autoscalerOptions", "idleTimeoutSeconds", "300", r"'300' is not of type 'integer'"),
        ("spec.autoscalerOptions", "upscalingMode", "Fast", r"'Fast' is not one of"),
        ("spec.authOptions", "mode", "tokens", r"'tokens' is not one of"),
        ("spec.workerGroupSpecs.0", "minReplica", 1, r"'minReplica' was unexpected"),
        ("spec.workerGroupSpecs.1.rayStartParams", "num-gpus", 4, r"4 is not of type 'string'"),
        ("spec.headGroupSpec.template.spec", "terminationGracePeriod", 1, r"'terminationGracePeriod' was unexpected"),
        ("spec.headGroupSpec.template.spec.containers.0.resources.limits", "memory", "16GiB", r"does not match"),
        ("spec.headGroupSpec.template.spec.containers.0", "env", None, r"None is not of type 'array'"),
        ("spec.headGroupSpec.template.spec.containers.0.env.0", "value", 60, r"60 is not of type 'string'"),
        ("spec.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef", "kee", "x", r"'kee' was unexpected"),
    ],
)
def test_a_mistake_is_found(path: str, key: str, value: object, complaint: str) -> None:
    resource = json.loads(json.dumps(load("raycluster.yaml")))  # undoes the file's anchors
    place: Any = resource
    for part in path.split("."):
        place = place[int(part)] if part.isdigit() else place[part]
    place[key] = value
    found = complaints(resource)
    assert len(found) == 1 and re.search(complaint, found[0]), found


@pytest.mark.parametrize("missing", ["headGroupSpec", "workerGroupSpecs.0.groupName", "workerGroupSpecs.1.template"])
def test_a_missing_field_is_found(missing: str) -> None:
    resource = json.loads(json.dumps(load("raycluster.yaml")))
    *parents, last = missing.split(".")
    place: Any = resource["spec"]
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    del place[last]
    assert [line for line in complaints(resource) if f"'{last}' is a required property" in line]


@pytest.mark.parametrize("name", RAY_FILES)
def test_clusters_have_gpus_autoscaling_and_a_head_that_may_die(name: str) -> None:
    cluster, templates = pod_templates(load(name))
    assert cluster["rayVersion"] == "2.60.0"
    assert f"ray=={cluster['rayVersion']}\n" in (PROJECT / "requirements.lock").read_text()
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "ray-ds-redis"
    assert all(group["minReplicas"] < group["maxReplicas"] for group in cluster["workerGroupSpecs"])
    limits = [template["spec"]["containers"][0]["resources"]["limits"] for template in templates[1:]]
    assert any("nvidia.com/gpu" in limit for limit in limits)
    for template, limit in zip(templates[1:], limits, strict=True):
        image = template["spec"]["containers"][0]["image"]
        assert image.endswith("-cuda" if "nvidia.com/gpu" in limit else "-cpu")


@pytest.mark.parametrize("name", RAY_FILES)
def test_pods_take_storage_from_a_secret_and_run_as_the_image_user(name: str) -> None:
    for template in pod_templates(load(name))[1]:
        spec = template["spec"]
        assert {"secretRef": {"name": "ray-ds-storage"}} in spec["containers"][0]["envFrom"]
        assert spec["securityContext"]["runAsUser"] == 1000 and spec["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("name", FILES)
def test_no_secret_is_written_down(name: str) -> None:
    for resource in resources(FOLDER / name):
        assert resource["kind"] != "Secret"
    assert "password: " not in (FOLDER / name).read_text().replace("key: password", "")


def test_redis_answers_where_the_head_looks() -> None:
    service, store = resources(FOLDER / "redis.yaml")
    address = load("raycluster.yaml")["spec"]["gcsFaultToleranceOptions"]["redisAddress"]
    assert address == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["selector"] == store["spec"]["template"]["metadata"]["labels"]


def test_the_job_runs_the_recipe_and_is_tried_again() -> None:
    spec = load("rayjob.yaml")["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:4] == ["ray-ds-until-final", "5", "python", "-m"]
    assert words[4] == run_recipe.__name__
    assert spec["shutdownAfterJobFinishes"] is True and spec["backoffLimit"] > 0
    head = pod_templates(load("rayjob.yaml"))[1][0]["spec"]
    (mount,) = [mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "recipe"]
    assert words[words.index("--recipe") + 1].startswith(mount["mountPath"] + "/")


def test_the_job_s_overrides_fit_the_recipe_that_its_comment_names() -> None:
    words = shlex.split(load("rayjob.yaml")["spec"]["entrypoint"])
    overrides = [word for word in words if word.startswith("--") and "=" in word]
    path = PROJECT / "jobs" / "recipes" / "gpu_350m.toml"
    assert str(path.relative_to(PROJECT)) in (FOLDER / "rayjob.yaml").read_text()
    recipe = load_recipe(str(path), overrides=overrides, root="/home/ray")
    assert recipe.run_dir == "s3://your-bucket/runs/350m"


def test_the_service_is_one_that_serve_takes() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(load("rayservice.yaml")["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "ray_ds.on_ray.served_model:application"
    settings = decode_settings(ServeSettings, application.args["settings"], where="args.settings")
    assert settings.host == config.http_options.host and settings.port == config.http_options.port
    for template in pod_templates(load("rayservice.yaml"))[1]:
        (container,) = template["spec"]["containers"]
        assert {"name": "serve", "containerPort": settings.port} in container["ports"]
        assert {"secretRef": {"name": "ray-ds-api-key"}} in container["envFrom"]
