"""The head is killed and started again over a store that kept its tables: what ran on it is found again or goes on."""

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.conftest import BIN, PROJECT, Site, free_ports, start_cluster
from tests.end_to_end.test_job_stop import wait_for_steps
from tests.end_to_end.test_local_nodes import NODE, drive

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BODY = """
from ray.job_submission import JobSubmissionClient

@ray.remote(num_cpus=1)
class Counter:
    def __init__(self):
        self.count = 0

    def up(self):
        self.count += 1
        return self.count

def job_status(seconds=60):
    end = time.monotonic() + seconds
    while True:
        try:
            return str(JobSubmissionClient(os.environ["RAY_API_SERVER_ADDRESS"]).get_job_status("before").value)
        except (Exception, SystemExit):
            if time.monotonic() > end:
                raise
            time.sleep(0.3)

if KIND is None:
    actor = Counter.options(
        name="kept", namespace="x", lifetime="detached", scheduling_strategy=on(node_id("worker-2"))
    ).remote()
    print(json.dumps(dict(count=ray.get(actor.up.remote(), timeout=60))))
else:
    actor = ray.get_actor("kept", namespace="x")
    counts = ray.get([actor.up.remote()], timeout=60)
    ids = [node_id(name) for name in ("head", "worker-1")]
    addresses = ray.get([address.options(scheduling_strategy=on(one)).remote() for one in ids], timeout=60)
    alive = sorted(one["NodeManagerAddress"] for one in ray.nodes() if one["Alive"])
    print(json.dumps(dict(counts=counts, addresses=addresses, alive=alive, job=job_status())))
"""


STEPS, CHECKPOINT_EVERY = 600, 20
"""So many steps that the workers, which live on for some seconds without a head, do not come to the end."""
TRAIN = ("submit", "train", "jobs/recipes/mini.toml", f"--train.steps={STEPS}", "--train.log_every=1")
OFTEN = f"--train.checkpoint_every={CHECKPOINT_EVERY}"


@contextmanager
def cluster_with_store(folder: Path, store: str) -> Iterator[Mapping[str, str]]:
    """Start the local cluster with a store that outlives its head; yield the environment of its clients."""
    if store == "redis":
        assert shutil.which("redis-server"), "install Debian's redis-server"
    environment = start_cluster(folder, free_ports(2), RAY_DS_GCS_STORE=store)
    try:
        yield environment
    finally:
        subprocess.run([PROJECT / "cluster/local/down.sh"], env=environment, check=True, capture_output=True)


def restart_head(environment: Mapping[str, str], *what: str) -> None:
    command = [NODE, "restart-head", *what]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)


@pytest.mark.shows("The head is killed and started again over Redis or Ray's RocksDB store: actors and jobs are kept")
@pytest.mark.parametrize("store", ["redis", "rocksdb"])
def test_nodes_actors_and_jobs_outlive_the_head(store: str, tmp_path: Path) -> None:
    submit = [BIN / "ray", "job", "submit", "--submission-id", "before", "--", "python", "-c", "print(1)"]
    with cluster_with_store(tmp_path / "cluster", store) as environment:
        subprocess.run(submit, env=environment, check=True, capture_output=True, timeout=90)
        assert drive(environment, "KIND = None\n" + BODY) == {"count": 1}
        for number, kind in enumerate(["gcs", "node"]):
            restart_head(environment, *([kind] if kind == "gcs" else []))
            assert drive(environment, f"KIND = {kind!r}\n" + BODY) == {
                "counts": [2 + number],
                "addresses": ["127.0.0.2", "127.0.0.3"],
                "alive": ["127.0.0.2", "127.0.0.3", "127.0.0.4"],
                "job": "SUCCEEDED",
            }


@pytest.mark.shows(
    "A training job whose head is killed and started again ends with status 75; submitted again it goes on"
)
@pytest.mark.timeout(900)
def test_training_goes_on_after_its_head_was_lost(
    site: Site, finished: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    before = {path.name for path in (site.folder / "runs/mini/train").iterdir()}
    log = tmp_path / "log"
    with cluster_with_store(tmp_path / "cluster", "redis") as environment:
        here = dataclasses.replace(site, environment=environment)
        with (
            log.open("w") as out,
            subprocess.Popen(
                [str(BIN / "ray-ds"), *TRAIN, OFTEN], cwd=here.folder, env=environment, stdout=out, stderr=out
            ) as job,
        ):
            try:
                folder = wait_for_steps(site.folder / "runs/mini/train", before, job, at_least=CHECKPOINT_EVERY + 5)
                restart_head(environment)
                assert job.wait(120) == 75, log.read_text()[-3000:]
            finally:
                job.kill()
        again = here.ray_ds(*TRAIN, OFTEN)
    assert again.returncode == 0, again.stdout[-3000:]
    first = int(re.findall(r"stepping .*step=(\d+)$", again.stdout, re.MULTILINE)[0])
    assert first > CHECKPOINT_EVERY and first % CHECKPOINT_EVERY == 1, "it goes on behind a checkpoint"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
