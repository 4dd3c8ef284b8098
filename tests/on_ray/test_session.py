import subprocess
import sys

import pytest

from ray_ds.errors import ClusterError
from ray_ds.on_ray.session import connect


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError, match=r"^RAY_ADDRESS \(127.0.0.1:1\) must be a running Ray cluster .*; start one"):
        connect()


def test_without_any_cluster_the_user_is_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    code = "from ray_ds.on_ray.session import connect\nconnect()"
    environment = {"RAY_TMPDIR": str(tmp_path_factory.mktemp("empty")), "RAY_ADDRESS": "127.0.0.1:2", "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "ClusterError" in result.stderr and "start one with `make up`" in result.stderr


LATE_CALL = """
import sys
from ray_ds.job import exit_status

def act():
    import ray
    try:
        ray.put(1)
    except Exception as error:
        print(type(error).__name__)
    print(ray.is_initialized())
    return 0

sys.exit(exit_status(act))
"""


@pytest.mark.shows("A late call of Ray in a process that is not connected fails, and starts no cluster")
def test_a_call_without_a_connection_starts_no_cluster() -> None:
    result = subprocess.run([sys.executable, "-c", LATE_CALL], capture_output=True, text=True, timeout=60)
    assert result.stdout.split()[-1] == "False" and len(result.stdout.split()) == 2, result
