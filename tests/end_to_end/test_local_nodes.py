"""`cluster/local/node.sh`: nodes of the local cluster are added, killed, stalled, drained and cut off."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.end_to_end.conftest import PROJECT, free_ports, start_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NODE = str(PROJECT / "cluster/local/node.sh")

DRIVER = """
import json, os, signal, subprocess, sys, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

def node(*arguments):
    return subprocess.run([sys.argv[1], *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout

def node_id(name):
    return {line.split()[0]: line.split()[3] for line in node("list").splitlines()}[name]

def facts(name_or_id):
    return next(one for one in ray.nodes() if one["NodeID"] == name_or_id)

def seconds_until_dead(one, limit_s=60):
    begun = time.monotonic()
    while facts(one)["Alive"] and time.monotonic() - begun < limit_s:
        time.sleep(0.05)
    return time.monotonic() - begun

def process_ids(name):
    return [int(pid) for pid in node("pids", name).split()]

def on(one):
    return NodeAffinitySchedulingStrategy(one, soft=False)

@ray.remote(num_cpus=1)
def address():
    return ray.util.get_node_ip_address()

@ray.remote(num_cpus=1)
class Child:
    def __init__(self):
        self.child = subprocess.Popen(["sleep", "600"], start_new_session=True).pid

    def pid(self):
        return self.child

def is_running(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False

ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
"""


def drive(environment: Mapping[str, str], body: str, *place: str) -> dict[str, object]:
    """Run a driver that prints a JSON object on a line, among what Ray prints; give the object."""
    command = [*place, sys.executable, "-c", DRIVER + body, NODE]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=150, cwd=PROJECT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, object] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def call(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([NODE, *arguments], env=dict(environment), capture_output=True, text=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    environment = start_cluster(tmp_path_factory.mktemp("nodes") / "cluster", free_ports(2))
    yield environment
    subprocess.run([PROJECT / "cluster/local/down.sh"], env=environment, check=True, capture_output=True)


@pytest.mark.shows("A node whose processes are killed is found dead in about 2 s; one that stalls for 3 s is not")
def test_a_killed_node_is_found_dead_soon_and_a_stalled_one_is_not(cluster: dict[str, str]) -> None:
    found = drive(
        cluster,
        """
first = node_id("worker-2")
actor = Child.options(scheduling_strategy=on(first)).remote()  # kept, for Ray ends one that nobody refers to
child = ray.get(actor.pid.remote())
pids = process_ids("worker-2")
for signum in (signal.SIGSTOP, signal.SIGCONT):
    for pid in pids:
        os.kill(pid, signum)
    time.sleep(3.0)
stalled_alive = facts(first)["Alive"]
node("kill", "worker-2")
left = [pid for pid in [child, *pids] if is_running(pid)]
killed_s = seconds_until_dead(first)
node("start", "worker-2")
second = node_id("worker-2")
again = ray.get(address.options(scheduling_strategy=on(second)).remote(), timeout=30)
raylet = next(pid for pid in process_ids("worker-2") if open(f"/proc/{pid}/comm").read() == "raylet\\n")
os.kill(raylet, signal.SIGKILL)
raylet_s = seconds_until_dead(second)
node("kill", "worker-2")
print(json.dumps(dict(
    stalled_alive=stalled_alive, had_child=child in pids, left=left, killed_s=killed_s, raylet_s=raylet_s, again=again,
)))
""",
    )
    assert found["stalled_alive"] is True
    assert found["had_child"] is True and found["left"] == []
    assert found["again"] == "127.0.0.4"
    for name in ("killed_s", "raylet_s"):
        assert isinstance(found[name], float) and found[name] < 8, found


def test_up_names_the_nodes_that_are_down(cluster: dict[str, str]) -> None:
    assert call(cluster, "kill", "worker-2").returncode == 0
    up = subprocess.run([PROJECT / "cluster/local/up.sh"], env=cluster, capture_output=True, text=True, check=True)
    (line,) = [line for line in up.stdout.splitlines() if "down" in line]
    assert line == f"its node worker-2 is down; start it again with: {NODE} start worker-2"


def test_a_node_is_added_and_a_drained_one_takes_nothing_new_and_ends(cluster: dict[str, str]) -> None:
    found = drive(
        cluster,
        """
name = node("add").strip()
one = node_id(name)
before = ray.get(address.options(scheduling_strategy=on(one)).remote(), timeout=30)
actor = Child.options(scheduling_strategy=on(one)).remote()
ray.get(actor.pid.remote())
node("drain", name, "8")
try:
    drained = ray.get(address.options(scheduling_strategy=on(one)).remote(), timeout=3)
except Exception as error:
    drained = type(error).__name__
pid = ray.get(actor.pid.remote(), timeout=5)
seconds_until_dead(one)
while " down " not in next(line for line in node("list").splitlines() if line.startswith(name)):
    time.sleep(0.1)
print(json.dumps(dict(name=name, before=before, drained=drained, left=is_running(pid))))
""",
    )
    assert found["name"] == "worker-3" and found["before"] == "127.0.0.5"
    assert found["drained"] != "127.0.0.5"
    assert found["left"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kill", "worker-9"), "the node worker-9 must be one of head worker-1"),
        (
            ("start", "worker-1"),
            r"the node worker-1 (up) must be down to be started; kill it with: node.sh kill worker-1",
        ),
        (("add", "worker-1"), "the node worker-1 (known) must have a new name"),
        (("cut", "worker-1"), "RAY_DS_LOCAL_FLAVOUR (loopback) must be netns"),
        (("restart-head",), "RAY_DS_GCS_STORE (memory) must be redis or rocksdb"),
        (("dance",), "node.sh add [NAME]"),
    ],
)
def test_what_cannot_be_done_is_refused(cluster: dict[str, str], arguments: tuple[str, ...], message: str) -> None:
    refused = call(cluster, *arguments)
    assert refused.returncode == 2 and message in refused.stderr


def test_without_a_cluster_there_are_no_nodes(tmp_path: Path) -> None:
    refused = call({**os.environ, "RAY_DS_CLUSTER_DIR": str(tmp_path)}, "list")
    assert refused.returncode == 2 and "must be that of a running cluster" in refused.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RAY_DS_LOCAL_FLAVOUR", "RAY_DS_LOCAL_FLAVOUR (cloud) must be loopback or netns"),
        ("RAY_DS_GCS_STORE", "RAY_DS_GCS_STORE (cloud) must be memory, redis or rocksdb"),
    ],
)
def test_an_unknown_kind_of_cluster_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        start_cluster(tmp_path / "cluster", free_ports(2), **{name: "cloud"})
    assert error.value.returncode == 2 and message in error.value.stderr
    assert not (tmp_path / "cluster/processes").exists()


def networks() -> list[str]:
    """Return the names of network namespaces and of links on this host that are the local cluster's."""
    links = [name for name in os.listdir("/sys/class/net") if name.startswith("rds")]
    spaces = Path("/run/netns")
    return sorted([*links, *(path.name for path in spaces.glob("ray-ds-*"))])


def may_make_networks() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(may_make_networks(), reason="this user may make network namespaces")
def test_network_namespaces_are_refused_to_those_who_may_make_none(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        start_cluster(tmp_path / "cluster", free_ports(2), RAY_DS_LOCAL_FLAVOUR="netns")
    assert "needs root that may make network namespaces" in error.value.stderr


@pytest.mark.shows(
    "A node that is cut off, as by a power loss, is found dead in about 14 s; 3 s without network are no death"
)
@pytest.mark.skipif(not may_make_networks(), reason="needs root that may make network namespaces")
def test_nodes_in_network_namespaces_have_addresses_of_their_own_and_are_cut_off(tmp_path: Path) -> None:
    before = networks()
    environment = start_cluster(tmp_path / "cluster", free_ports(2), RAY_DS_LOCAL_FLAVOUR="netns")
    try:
        found = drive(
            environment,
            """
ids = [node_id(name) for name in ("head", "worker-1", "worker-2")]
addresses = ray.get([address.options(scheduling_strategy=on(one)).remote() for one in ids], timeout=60)
node("cut", "worker-2")
time.sleep(3.0)
node("heal", "worker-2")
time.sleep(1.0)
shortly = facts(ids[2])["Alive"]
node("cut", "worker-2")
cut_s = seconds_until_dead(ids[2])
node("heal", "worker-2")
node("kill", "worker-2")
node("start", "worker-2")
again = ray.get(address.options(scheduling_strategy=on(node_id("worker-2"))).remote(), timeout=60)
print(json.dumps(dict(addresses=addresses, shortly=shortly, cut_s=cut_s, again=again)))
""",
            *(NODE, "exec", "head"),
        )
    finally:
        subprocess.run([PROJECT / "cluster/local/down.sh"], env=environment, check=True, capture_output=True)
    addresses = found["addresses"]
    assert isinstance(addresses, list)
    subnet = addresses[0].rpartition(".")[0]
    assert subnet.startswith("10.77.") and addresses == [f"{subnet}.{number}" for number in (2, 3, 4)]
    assert found["shortly"] is True, "three seconds without a network are no death"
    assert isinstance(found["cut_s"], float) and 5 < found["cut_s"] < 25
    assert found["again"] == addresses[2]
    assert networks() == before
