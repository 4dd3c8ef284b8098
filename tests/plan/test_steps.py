"""Which model a train step of a recipe trains."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ray_ds.config.parallel import Parallel
from ray_ds.config.presets import PRESETS
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.model.hugging_face import to_hf_config
from ray_ds.plan.steps import step_case, step_model
from ray_ds.recipe import Recipe, load_recipe

TRAIN = """
[step.settings]
seq_len = 64
batch_tokens = 512
micro_batch = 4
steps = 10
schedule = { warmup_steps = 2 }
"""


def write_recipe(folder: Path, start: str) -> Recipe:
    """Return a recipe with a train step that starts from `start` and one that starts from the first."""
    text = f"""
name = "tune"
run_dir = "{folder}/runs"
[[step]]
stage = "import_hf"
settings.path = "{folder}/model"
[[step]]
stage = "clean"
settings.inputs = [{{ glob = "text/*.jsonl", source = "test", licence = "CC0-1.0" }}]
[[step]]
stage = "tokenizer"
settings.vocab_size = 512
[[step]]
stage = "tokenize"
from = ["clean", "tokenizer"]
[[step]]
name = "first"
stage = "train"
init_from = "{start}"
{TRAIN}
[[step]]
name = "second"
stage = "train"
init_from = "first"
{TRAIN}
"""
    path = folder / "recipe.toml"
    path.write_text(text)
    return load_recipe(str(path), root=str(folder))


def write_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(PRESETS["tiny"])))


def test_a_step_that_starts_from_a_checkpoint_has_its_model(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, "import_hf")
    assert step_model(recipe.step("first")) == PRESETS["tiny"]
    assert step_model(recipe.step("second")) == PRESETS["tiny"]
    assert step_case(recipe.step("second"), 1).config == PRESETS["tiny"]


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model/config\.json \(missing\) must be there"):
        step_model(write_recipe(tmp_path, "import_hf").step("first"))


def test_a_checkpoints_model_must_go_with_the_settings(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, "import_hf")
    step = recipe.step("first")
    divided = replace(step.settings, parallel=Parallel(tensor=2), num_workers=2)
    with pytest.raises(ConfigError, match=r"parallel\.tensor \(.*\) must be 1 in a model with experts"):
        step_case(replace(step, settings=divided), 2)
