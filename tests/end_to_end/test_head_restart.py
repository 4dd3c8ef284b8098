"""The head is killed and started again over a store that kept its tables: nodes, actors and jobs are found again."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import BIN, PROJECT, free_ports, start_cluster
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


@pytest.mark.shows("The head is killed and started again over Redis or Ray's RocksDB store: actors and jobs are kept")
@pytest.mark.parametrize("store", ["redis", "rocksdb"])
def test_nodes_actors_and_jobs_outlive_the_head(store: str, tmp_path: Path) -> None:
    if store == "redis":
        assert shutil.which("redis-server"), "install Debian's redis-server"
    environment = start_cluster(tmp_path / "cluster", free_ports(2), RAY_DS_GCS_STORE=store)
    submit = [BIN / "ray", "job", "submit", "--submission-id", "before", "--", "python", "-c", "print(1)"]
    try:
        subprocess.run(submit, env=environment, check=True, capture_output=True, timeout=90)
        assert drive(environment, "KIND = None\n" + BODY) == {"count": 1}
        for number, kind in enumerate(["gcs", "node"]):
            restart = [NODE, "restart-head", *([kind] if kind == "gcs" else [])]
            subprocess.run(restart, env=environment, check=True, capture_output=True, timeout=120)
            assert drive(environment, f"KIND = {kind!r}\n" + BODY) == {
                "counts": [2 + number],
                "addresses": ["127.0.0.2", "127.0.0.3"],
                "alive": ["127.0.0.2", "127.0.0.3", "127.0.0.4"],
                "job": "SUCCEEDED",
            }
    finally:
        subprocess.run([PROJECT / "cluster/local/down.sh"], env=environment, check=True, capture_output=True)
