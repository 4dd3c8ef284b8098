"""People's ratings in the evaluate stage: those of the model that is evaluated are in its report."""

from pathlib import Path

import pytest

from ray_ds.artifacts import Artifact
from ray_ds.config.evaluate import EvaluateSettings
from ray_ds.errors import InputError
from ray_ds.evaluate.tables import report_rows
from ray_ds.stages.evaluate import score_ratings
from tests.evaluate.rated import answer, rating, write_ratings
from tests.stages.small_artifacts import stage_run
from tests.stages.test_evaluate import make_shards
from tests.stages.test_evaluate_tasks import make_checkpoint, run_evaluate, settings


def rate(folder: Path, model: Artifact) -> str:
    rated = answer("a", model_digest=model.digest, fluency=5)
    first = rating(left=rated, right=answer("b"))
    second = rating(rater="bert", left=answer("b"), right=rated, preferred="right")
    return write_ratings(folder / "ratings.jsonl", first, second)


def test_ratings_are_found_by_the_models_digest(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    own = EvaluateSettings(seq_len=8, ratings=rate(tmp_path, checkpoint))
    found = score_ratings(own, checkpoint, "evaluate")
    assert found is not None and found["scores"]["fluency"]["score"] == 5.0
    assert score_ratings(EvaluateSettings(seq_len=8), checkpoint, "evaluate") is None
    other = stage_run(tmp_path, "Checkpoint", name="other").commit({}, seconds=0.0)
    with pytest.raises(
        InputError, match=rf"evaluate\.ratings .* of the model that is evaluated, digest {other.digest}"
    ):
        score_ratings(own, other, "evaluate")


@pytest.mark.ray
@pytest.mark.slow
def test_ratings_are_part_of_the_report(tmp_path: Path, local_ray: str) -> None:
    checkpoint, shards = make_checkpoint(tmp_path), make_shards(tmp_path)
    own = settings((), ratings=rate(tmp_path, checkpoint))
    report = run_evaluate(tmp_path, checkpoint, shards, own, "rated")
    assert report.fact("ratings") == score_ratings(own, checkpoint, "evaluate")
    assert [source.source for source in report.manifest.sources] == ["ratings"]
    assert "ratings against team/b" in {row[0] for row in report_rows(report.manifest.facts)}
