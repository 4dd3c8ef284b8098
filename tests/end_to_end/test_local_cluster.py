"""`make up` and `make down`: three nodes, and exactly what was started is ended."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import PROJECT, free_ports, start_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def processes(state: Path) -> list[int]:
    """Return the ids of the processes that a cluster's state names."""
    return [int(line.split()[0]) for line in (state / "processes").read_text().splitlines()]


def members(groups: list[int]) -> list[str]:
    """Return the command names of living processes in some process groups."""
    listing = subprocess.run(["ps", "-eo", "pgid=,stat=,comm="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    return [row[2] for row in rows if int(row[0]) in groups and not row[1].startswith("Z")]


@pytest.mark.shows("`make up` starts three nodes, once; `make down` ends exactly the processes it started")
def test_up_twice_is_one_cluster_and_down_ends_it(tmp_path: Path) -> None:
    state = tmp_path / "cluster"
    environment = start_cluster(state, free_ports(2))
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        groups = processes(state)
        assert len(groups) == 3 and len(members(groups)) > 6
        assert (state / "token").stat().st_mode & 0o077 == 0
        again = subprocess.run(
            [PROJECT / "cluster/local/up.sh"], env=environment, capture_output=True, text=True, check=True
        )
        assert "is up" in again.stdout and processes(state) == groups
        settings = dict(line.split("=", 1) for line in (state / "settings").read_text().splitlines())
        temporary = Path(settings["temp"])
        assert temporary.exists()
        subprocess.run([PROJECT / "cluster/local/down.sh"], env=environment, check=True, capture_output=True)
        assert members(groups) == []
        assert stranger.poll() is None
        assert not temporary.exists() and list(state.glob("env")) == []
    finally:
        stranger.kill()
        subprocess.run([PROJECT / "cluster/local/down.sh"], env=environment, check=True, capture_output=True)


def test_down_without_a_cluster_does_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_DS_CLUSTER_DIR": str(tmp_path / "absent")}
    subprocess.run([PROJECT / "cluster/local/down.sh"], env=environment, check=True)


def test_down_spares_a_process_that_took_over_an_id(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as stranger:
        (tmp_path / "processes").write_text(f"{stranger.pid} 1 head\n")
        environment = {**os.environ, "RAY_DS_CLUSTER_DIR": str(tmp_path)}
        subprocess.run([PROJECT / "cluster/local/down.sh"], env=environment, check=True, capture_output=True)
        assert stranger.poll() is None
        stranger.kill()


def test_a_port_in_use_is_a_clear_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(subprocess.CalledProcessError) as error:
            start_cluster(tmp_path / "cluster", [port, free_ports(1)[0]])
    assert error.value.returncode == 2
    assert f"port {port} (in use) must be free; stop what listens there" in error.value.stderr
