import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ray_ds import report
from ray_ds.artifacts import Artifact, Checkpoint, Corpus, SourceFile
from ray_ds.errors import ArtifactError
from ray_ds.recipe import load_recipe
from ray_ds.report import settings_lines, status_lines, summary_lines, trace_lines
from ray_ds.stage_run import StageRun
from ray_ds.steps import find_finished, prepare_run

TEXT = """
name = "t"
run_dir = "FOLDER/runs"
[[step]]
stage = "clean"
settings.inputs = [{ glob = "FOLDER/*.jsonl", source = "mine", licence = "CC0-1.0" }]
[[step]]
stage = "tokenizer"
settings.vocab_size = 300
"""


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "hello"}) + "\n")
    path = tmp_path / "t.toml"
    path.write_text(TEXT.replace("FOLDER", str(tmp_path)))
    return path


def finish(recipe_path: Path, step: str) -> Artifact:
    """Commit an artefact of a step without running it."""
    recipe = load_recipe(str(recipe_path))
    run: StageRun = prepare_run(recipe, recipe.step(step))
    source = SourceFile(uri=f"{recipe_path.parent}/a.jsonl", bytes=18, sha256="ab" * 32, source="mine", licence="CC0")
    return run.commit({}, seconds=2.0, sources=[source] if run.kind == Corpus.kind else [])


def test_status_tells_finished_begun_and_to_do(recipe_path: Path) -> None:
    recipe = load_recipe(str(recipe_path))
    assert [line.split()[2] for line in status_lines(recipe)] == ["state", "to", "to"]
    finish(recipe_path, "clean")
    rows = [line.split() for line in status_lines(recipe)]
    assert rows[1][:4] == ["clean", "clean", "finished", "2.0"]


def test_status_shows_errors_instead_of_failing(recipe_path: Path) -> None:
    (recipe_path.parent / "a.jsonl").unlink()
    assert "must" in status_lines(load_recipe(str(recipe_path)))[1]


def test_show_gives_value_origin_and_docstring(recipe_path: Path) -> None:
    recipe = load_recipe(str(recipe_path), overrides=["--clean.mask_pii=false"])
    lines = settings_lines(recipe)
    assert "  mask_pii = false  (command line)" in lines
    assert "  vocab_size = 300  (t.toml)" in lines
    assert "  exact_duplicates = true  (default)" in lines
    assert all(lines[i + 1].strip() for i, line in enumerate(lines) if line.startswith("  ") and " = " in line)


def test_trace_leads_to_the_input_files(recipe_path: Path) -> None:
    finish(recipe_path, "clean")
    made = finish(recipe_path, "tokenizer")
    lines = trace_lines(made.uri)
    assert [line.split()[0] for line in lines] == ["Tokenizer", "Corpus", "file"]
    assert "a.jsonl" in lines[2] and "mine; CC0" in lines[2]


def remake(corpus: Artifact, data: bytes) -> None:
    """Make an artefact anew with another file in it."""
    shutil.rmtree(corpus.uri)
    Path(corpus.uri).mkdir()
    Path(corpus.path("documents-0.parquet")).write_bytes(data)


def test_a_descendant_of_an_artefact_made_anew_is_refused(recipe_path: Path) -> None:
    corpus = finish(recipe_path, "clean")
    made = finish(recipe_path, "tokenizer")
    remake(corpus, b"other")
    finish(recipe_path, "clean")
    recipe = load_recipe(str(recipe_path))
    message = r"must have content \w{12}, which this was made from; the input was made anew since; delete .*tokenizer/"
    with pytest.raises(ArtifactError, match=message):
        trace_lines(made.uri)
    with pytest.raises(ArtifactError, match=message):
        find_finished(recipe, recipe.step("tokenizer"))


def test_a_descendant_of_an_artefact_made_anew_to_the_same_bytes_stays_finished(recipe_path: Path) -> None:
    corpus = finish(recipe_path, "clean")
    finish(recipe_path, "tokenizer")
    shutil.rmtree(corpus.uri)
    finish(recipe_path, "clean")
    recipe = load_recipe(str(recipe_path))
    assert find_finished(recipe, recipe.step("tokenizer")) is not None


@pytest.mark.parametrize(("model_step", "named"), [(40, {}), (30, {"best_step": 30})])
def test_the_summary_names_the_step_of_a_model_that_is_not_the_last(
    recipe_path: Path, model_step: int, named: dict[str, int]
) -> None:
    manifest = replace(finish(recipe_path, "clean").manifest, facts={"step": 40, "model_step": model_step})
    assert report._facts(Checkpoint(uri="runs/train/0", manifest=manifest)) == {"steps": 40, **named}


def test_the_summary_is_a_table(recipe_path: Path) -> None:
    recipe = load_recipe(str(recipe_path))
    figures = {"documents": {"in": 1200, "kept": 3}, "xz_bits_per_byte": 1.88123}
    scores = {"validation_bits_per_byte": 1.5, "bigram_bits_per_byte": 2.0}
    lines = summary_lines(recipe, {**figures, **scores})
    assert "against the bigram 25.0% fewer bits per byte than the bigram" in [" ".join(line.split()) for line in lines]
    assert [" ".join(line.split()) for line in lines[1:3]] == ["documents in 1,200, kept 3", "xz bits per byte 1.881"]
