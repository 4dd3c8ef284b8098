"""The quick checks on real nodes: a sound cluster passes, and what was planted is found on the node where it is."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from ray_ds.verify import versions
from ray_ds.verify.collectives import check_collectives
from ray_ds.verify.context import Context, living_nodes
from ray_ds.verify.node_health import check_nodes
from ray_ds.verify.node_settings import check_settings
from ray_ds.verify.on_nodes import Answers, ask_nodes
from ray_ds.verify.shared_storage import check_storage
from tests.on_ray.two_nodes import start_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the nodes' workers build torch's extensions."""
    folder = tmp_path_factory.mktemp("extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def cluster(extensions: Path) -> Iterator[Cluster]:
    with start_cluster() as cluster:
        yield cluster


@pytest.fixture
def context(cluster: Cluster, tmp_path: Path) -> Iterator[Context]:
    folder = str(tmp_path / "verify" / "one")
    made = Context(run_dir=str(tmp_path), folder=folder, nodes=living_nodes(), gpus=0, ends_at=time.monotonic() + 300)
    yield made
    assert made.clean_up.close() == []


def test_the_head_is_the_first_node(context: Context) -> None:
    assert [node.is_head for node in context.nodes] == [True, False, False]


def test_versions_of_a_sound_cluster_pass(context: Context) -> None:
    finding = versions.check_versions(context)
    assert finding.outcome == "passed", finding.problems
    assert finding.figures["nodes"] == 3 and finding.figures["ray"] == "2.60.0"


def test_another_version_on_one_node_is_found(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = versions.ask_probes

    def ask_and_alter(nodes: object) -> Answers[dict[str, object]]:
        answers = ask(context.nodes)
        other = answers.values[context.nodes[2]]
        values = {**answers.values, context.nodes[2]: {**other, "packages": {**other["packages"], "torch": "1.0"}}}
        return replace(answers, values=values)

    monkeypatch.setattr(versions, "ask_probes", ask_and_alter)
    finding = versions.check_versions(context)
    assert [problem.wrong.split(",")[0] for problem in finding.problems] == [
        f"torch on node {context.nodes[2].name} is 1.0"
    ]


def test_a_stale_lock_on_the_nodes_is_found_and_named(context: Context, extensions: Path) -> None:
    assert check_nodes(context).outcome == "passed"
    lock = extensions / "py311_cpu" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 60, time.time() - 60))
    finding = check_nodes(context)
    lock.unlink()
    assert [problem.action for problem in finding.problems] == [f"delete {lock}"]


def test_storage_passes_and_an_unwritable_run_directory_is_found_on_every_node(context: Context) -> None:
    finding = check_storage(context)
    assert finding.outcome == "passed", finding.problems
    assert finding.figures["slowest_write_mb_s"] > 0 and len(finding.figures["by_node"]) == 3
    taken = Path(context.run_dir) / "taken"
    taken.touch()
    failed = check_storage(replace(context, run_dir=str(taken), folder=str(taken / "verify")))
    assert len(failed.problems) == 3 and all("cannot write in run_dir" in problem.wrong for problem in failed.problems)


def test_collectives_of_a_sound_cluster_pass(context: Context) -> None:
    finding = check_collectives(context)
    assert finding.outcome == "passed", finding.problems
    assert finding.figures["gloo_ranks"] == 2 and finding.figures["gloo_bus_mb_s"] > 0


def test_settings_are_read_from_the_head(context: Context) -> None:
    finding = check_settings(context)
    assert finding.figures["dead_node_found_s"] == 1.5, "what the tests' cluster was started with"
    assert finding.figures["authentication"] == "disabled" and finding.figures["node_autoscaler"] == "unknown"


def test_a_node_that_fails_or_hangs_is_named_and_the_others_answer(context: Context) -> None:
    bad = context.nodes[1].node_id

    def fail(node_id: str) -> str:
        if node_id == bad:
            raise ModuleNotFoundError("No module named 'ray_ds'")
        return "fine"

    def hang(node_id: str) -> str:
        if node_id == bad:
            time.sleep(60)
        return "fine"

    failed = ask_nodes(context.nodes, fail, lambda node: (node.node_id,))
    assert len(failed.values) == 2
    assert failed.problems("x")[0].wrong == (
        f"node {context.nodes[1].name} did not say x: ModuleNotFoundError: No module named 'ray_ds'"
    )
    hung = ask_nodes(context.nodes, hang, lambda node: (node.node_id,), timeout_s=10.0)
    assert len(hung.values) == 2 and hung.silent[context.nodes[1]] == "no answer within 10 s"
