"""`ray-ds verify` on a local cluster that is sound, and on one with faults planted in it."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import BIN, PROJECT, Site

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CHECKS = ["versions", "nodes", "settings", "storage", "collectives", "data", "training", "kill", "join", "serving"]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_sound_cluster_is_verified_and_nothing_but_the_report_stays(site: Site, tmp_path: Path) -> None:
    done = site.run(str(BIN / "ray-ds"), "verify", "--run_dir", str(tmp_path), timeout_s=880)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (report,) = tmp_path.rglob("report.json")
    content = json.loads(report.read_text())
    findings = {finding["name"]: finding for finding in content["findings"]}
    assert list(findings) == CHECKS
    assert {name for name, finding in findings.items() if finding["outcome"] != "passed"} == set()
    assert content["seconds"] < 600 and len(content["nodes"]) == 3
    assert findings["training"]["figures"]["workers"][:2] == [1, 2]  # more where other tests' replicas leave room
    assert findings["training"]["figures"]["largest_loss_difference"] < 1e-5
    assert findings["kill"]["figures"]["kill_to_step_s"] > 0 and findings["join"]["figures"]["join_to_used_s"] > 0
    assert findings["serving"]["figures"]["one_to_two_replicas_s"] > 0
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"report.json", "report.md"}


@pytest.fixture
def odd_node(site: Site, tmp_path: Path) -> Iterator[Path]:
    """One more node, with another source file in its ray_ds and a build lock that nobody holds; the lock."""
    shutil.copytree(PROJECT / "ray_ds", tmp_path / "odd/ray_ds")
    with (tmp_path / "odd/ray_ds/logs.py").open("a") as file:
        file.write("ODD = 1\n")
    lock = tmp_path / "extensions/op/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    planted = {"PYTHONPATH": str(tmp_path / "odd"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    added = site.run(str(PROJECT / "cluster/local/node.sh"), "add", "odd", **planted)
    assert added.returncode == 0, added.stderr
    yield lock
    assert site.run(str(PROJECT / "cluster/local/node.sh"), "kill", "odd").returncode == 0


@pytest.mark.timeout(300)
@pytest.mark.shows("`ray-ds verify` names what is wrong with a cluster, on which node, and what to do")
def test_what_is_planted_is_found_on_the_node_where_it_is(site: Site, odd_node: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file where the folder should be")
    arguments = ("--run_dir", str(taken), "--only", "versions,nodes,storage")
    done = site.run(str(BIN / "ray-ds"), "verify", *arguments, timeout_s=280)
    assert done.returncode == 1, done.stdout[-6000:] + done.stderr[-2000:]
    wrong = [line for line in done.stdout.splitlines() if line.startswith("        wrong: ")]
    (other_source,) = (line for line in wrong if "other source files" in line)
    (stale_lock,) = (line for line in wrong if f"the build lock {odd_node} on node" in line)
    assert other_source.split("on node ")[1].split()[0] == stale_lock.split("on node ")[1].split()[0] != "127.0.0.2"
    assert f"        do:    delete {odd_node}" in done.stdout.splitlines()
    assert sum(f"cannot write in run_dir ({taken})" in line for line in wrong) == 4
    assert "do:    mount it writable" in done.stdout
    assert "something is wrong: versions, nodes, storage failed" in done.stdout
