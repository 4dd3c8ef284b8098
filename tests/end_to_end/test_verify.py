import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import BIN, Site

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CHECKS = ["versions", "nodes", "settings", "storage", "collectives", "data", "training", "kill", "join", "serving"]


@pytest.mark.timeout(900)
@pytest.mark.shows("`ray-ds verify` checks a cluster in minutes and says what is wrong and what to do")
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


@pytest.mark.timeout(300)
def test_a_run_directory_that_cannot_be_written_is_named_with_what_to_do(site: Site, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file where the folder should be")
    done = site.run(str(BIN / "ray-ds"), "verify", "--run_dir", str(taken), "--only", "storage", timeout_s=280)
    assert done.returncode == 1, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"cannot write in run_dir ({taken})" in done.stdout
    assert "do:    mount it writable" in done.stdout
