import json
from pathlib import Path

import pytest

from ray_ds.artifacts import Corpus, find_artifact
from tests.bare_runs import DIGEST, make_run


def test_the_manifest_names_inputs_and_finished_files(tmp_path: Path) -> None:
    corpus = make_run(tmp_path / "clean", "Corpus").commit({}, seconds=0.0)
    run = make_run(tmp_path / "tokenizer", "Tokenizer", (corpus,))
    for path in (run.path("tokenizer.json"), run.work_path("piece")):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("{}")
    made = run.commit({}, seconds=0.0)
    manifest = json.loads(Path(made.path("manifest.json")).read_text())
    assert manifest["inputs"] == [
        {"kind": "Corpus", "uri": corpus.uri, "digest": DIGEST, "content_sha256": corpus.content_sha256}
    ]
    assert [info["path"] for info in manifest["files"]] == ["tokenizer.json"]
    assert made.input_digest("Corpus") == DIGEST and run.input(Corpus) == corpus


def test_a_run_that_another_job_has_taken_over_commits_nothing(tmp_path: Path) -> None:
    def taken_over() -> None:
        raise RuntimeError("another job runs")

    run = make_run(tmp_path, "Corpus", check_alone=taken_over)
    with pytest.raises(RuntimeError, match="another job runs"):
        run.commit({}, seconds=0.0)
    assert find_artifact(run.uri) is None
