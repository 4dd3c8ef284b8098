import json
from pathlib import Path

import pytest

from ray_ds.config.settings import digest_settings
from ray_ds.errors import ConfigError, InputError
from ray_ds.recipe import load_recipe
from ray_ds.stage_table import STAGES, find_stage, load_object
from ray_ds.steps import find_finished, prepare_run, step_digest, step_uri

RECIPES = Path(__file__).parent.parent / "jobs" / "recipes"
TEXT = """
name = "t"
run_dir = "/runs/t"
[[step]]
stage = "clean"
settings.inputs = [{ glob = "/text/*.jsonl", source = "s", licence = "l" }]
[[step]]
stage = "tokenizer"
settings.vocab_size = 300
[[step]]
name = "big"
stage = "tokenizer"
settings.vocab_size = 400
[[step]]
stage = "tokenize"
from = ["tokenizer"]
"""


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "hello"}) + "\n")
    path = tmp_path / "t.toml"
    path.write_text(TEXT.replace("/text", str(tmp_path)).replace("/runs", str(tmp_path)))
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_parse(path: Path) -> None:
    recipe = load_recipe(str(path), root="/anywhere")
    assert recipe.name == path.stem
    folder = "demo" if path.stem in ("chat", "tasks") else path.stem  # these go on from the demo's steps
    assert recipe.run_dir == f"/anywhere/runs/{folder}"
    for step in recipe.steps:
        digest_settings(step.settings)


@pytest.mark.parametrize("name", ["chat", "tasks"])
def test_recipes_that_go_on_from_the_demos_steps_have_the_same_steps(name: str) -> None:
    demo, own = (load_recipe(str(RECIPES / f"{stem}.toml"), root="/anywhere") for stem in ("demo", name))
    for step in ("clean", "tokenizer", "tokenize", "pretrain"):
        assert own.step(step).settings == demo.step(step).settings


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_table_of_stages_names_what_exists(stage: object) -> None:
    from ray_ds.stage_table import Stage

    assert isinstance(stage, Stage)
    assert callable(load_object(stage.function))
    assert isinstance(load_object(stage.settings), type)
    job = Path(__file__).parent.parent / "jobs" / f"{stage.job}.py"
    assert f'run_stage("{stage.name}")' in job.read_text()
    assert len(job.read_text().splitlines()) <= 25


def test_from_defaults_to_the_latest_step_and_can_name_another(recipe_path: Path) -> None:
    recipe = load_recipe(str(recipe_path))
    tokenize = recipe.step("tokenize")
    assert [source.name for source in tokenize.inputs if not isinstance(source, str)] == ["clean", "tokenizer"]
    recipe_path.write_text(recipe_path.read_text().replace('from = ["tokenizer"]', ""))
    tokenize = load_recipe(str(recipe_path)).step("tokenize")
    assert [source.name for source in tokenize.inputs if not isinstance(source, str)] == ["clean", "big"]


def test_overrides_win_and_are_marked(recipe_path: Path) -> None:
    recipe = load_recipe(str(recipe_path), overrides=["--big.vocab_size=500", "--run_dir=/elsewhere"])
    assert recipe.step("big").settings.vocab_size == 500
    assert recipe.step("big").given == {"vocab_size": "command line"}
    assert recipe.step("tokenizer").given == {"vocab_size": "t.toml"}
    assert recipe.run_dir == "/elsewhere"


@pytest.mark.shows("A changed setting reruns only the steps it reaches")
def test_a_changed_setting_reaches_only_what_follows(recipe_path: Path) -> None:
    plain = load_recipe(str(recipe_path))
    changed = load_recipe(str(recipe_path), overrides=["--tokenizer.vocab_size=301"])
    same = {step.name for step in plain.steps if step_digest(step) == step_digest(changed.step(step.name))}
    assert same == {"clean", "big"}


def test_another_licence_of_the_same_files_is_another_corpus(recipe_path: Path) -> None:
    plain = load_recipe(str(recipe_path))
    recipe_path.write_text(recipe_path.read_text().replace('licence = "l"', 'licence = "m"'))
    assert step_digest(plain.steps[0]) != step_digest(load_recipe(str(recipe_path)).steps[0])


def test_which_files_have_which_licence_is_in_the_digest(recipe_path: Path) -> None:
    folder = recipe_path.parent
    (folder / "b.jsonl").write_text('{"text": "other"}\n')
    (folder / "c.jsonl").write_text('{"text": "third"}\n')
    inputs = '--clean.inputs=[{{glob = "{0}/{1}.jsonl", source = "s", licence = "l"}}, '
    inputs += '{{glob = "{0}/{2}.jsonl", source = "t", licence = "m"}}]'
    digests = {
        step_digest(load_recipe(str(recipe_path), overrides=[inputs.format(folder, *globs)]).steps[0])
        for globs in (("a", "[bc]"), ("[ab]", "c"))
    }
    assert len(digests) == 2


def test_changed_input_changes_every_digest(recipe_path: Path) -> None:
    recipe = load_recipe(str(recipe_path))
    before = [step_digest(step) for step in recipe.steps]
    (recipe_path.parent / "a.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    after = [step_digest(step) for step in recipe.steps]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert step_uri(recipe, recipe.steps[0]).endswith(f"/t/clean/{after[0]}")


def test_missing_input_is_an_error(recipe_path: Path) -> None:
    (recipe_path.parent / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"must"):
        step_digest(load_recipe(str(recipe_path)).steps[0])


def test_an_unfinished_input_names_the_step_to_run(recipe_path: Path) -> None:
    recipe = load_recipe(str(recipe_path))
    with pytest.raises(Exception, match=r"\(no manifest\) must be a finished Corpus; run step clean first"):
        prepare_run(recipe, recipe.step("tokenizer"))


def test_relative_paths_need_a_root(recipe_path: Path) -> None:
    recipe_path.write_text(recipe_path.read_text().replace(f'run_dir = "{recipe_path.parent}/t"', 'run_dir = "runs/t"'))
    with pytest.raises(ConfigError, match=r"run_dir \(runs/t\) must be absolute, because .*; write an absolute path"):
        load_recipe(str(recipe_path))
    assert load_recipe(str(recipe_path), root="/r").run_dir == "/r/runs/t"


def test_a_relative_input_needs_a_root(recipe_path: Path) -> None:
    text = recipe_path.read_text().replace(f'glob = "{recipe_path.parent}/*.jsonl"', 'glob = "text/*.jsonl"')
    recipe_path.write_text(text)
    with pytest.raises(ConfigError, match=r"clean.inputs.0.glob \(text/\*.jsonl\) must be absolute"):
        load_recipe(str(recipe_path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "t"', 'nam = "t"', r"t.toml: nam \(unknown\) must be name, run_dir or \[\[step\]\]; remove it"),
        ('name = "t"', "name = 3", r"t.toml: name \(3\) must be a string; add it"),
        ('name = "t"', 'name = "t', r"recipe \(.*t.toml\) must be valid TOML \(.*\); correct the file"),
        (
            'stage = "clean"',
            'stage = "wash"',
            r"stage \(wash\) must be one of clean, import_hf, tokenizer, tokenize, tokenize_chat, te",
        ),
        (
            'stage = "clean"',
            'stage = "clean"\nfoo = 1',
            r"t.toml: clean.foo \(unknown\) must be name, stage, from or se",
        ),
        ('name = "big"', 'name = "tokenizer"', r"t.toml: tokenizer.name \(tokenizer\) must be letters.* used once"),
        (
            'from = ["tokenizer"]',
            'from = ["tok"]',
            r"t.toml: tokenize.from \(tok\) must name earlier steps \(clean, to",
        ),
        (
            'from = ["tokenizer"]',
            'from = "tokenizer"',
            r"t.toml: tokenize.from \(tokenizer\) must be a list of step names",
        ),
        ('from = ["tokenizer"]', "from = [3]", r"t.toml: tokenize.from \(\[3\]\) must hold strings"),
        (
            'from = ["tokenizer"]',
            'from = ["tokenizer", "big"]',
            r"tokenize.from \(big\) must make what stage tokenize rea",
        ),
        ("settings.vocab_size = 400", "settings = 3", r"t.toml: big.settings \(3\) must be a table; correct it"),
        ('stage = "clean"', 'stage = ["clean"]', r"stage \(\['clean'\]\) must be a string"),
        ("vocab_size = 400", "vocab_sise = 400", r"t.toml: big.vocab_sise \(400\) must be one of the known settings"),
        ("vocab_size = 400", 'vocab_size = "4"', r"t.toml: big.vocab_size \(4\) must be a valid integer"),
        ("vocab_size = 400", "vocab_size = 4", r"t.toml: big.vocab_size \(4\) must be from 263"),
    ],
)
def test_bad_recipes_are_refused(recipe_path: Path, old: str, new: str, message: str) -> None:
    assert old in recipe_path.read_text()
    recipe_path.write_text(recipe_path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(recipe_path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("big.vocab_size=5", r"override \(big.vocab_size=5\) must look like --step.field=value"),
        ("--bog.vocab_size=5", r"override \(--bog.vocab_size=5\) must start with a step's name: --clean.FIELD=VALUE"),
        ("--big.vocab_size.x=5", r"must not go below vocab_size, which is a plain value"),
        ("--big.vocab=5", r"big.vocab \(5\) must be one of the known settings"),
        ("--big.vocab_size=1e-4", r"big.vocab_size \(0.0001\) must be a valid integer"),
    ],
)
def test_bad_overrides_are_refused(recipe_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(recipe_path), overrides=[override])


def test_a_recipe_needs_the_steps_it_reads_from(recipe_path: Path) -> None:
    recipe_path.write_text('name = "t"\nrun_dir = "/r"\n[[step]]\nstage = "tokenizer"\n')
    with pytest.raises(ConfigError, match=r"tokenizer.from \(\[\]\) must name what makes a Corpus; add a step"):
        load_recipe(str(recipe_path))


def test_a_missing_recipe_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"recipe \(/absent.toml\) must be a TOML file; check the path"):
        load_recipe("/absent.toml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a TOML file; check the path"):
        load_recipe(str(tmp_path))


def test_an_artefact_by_its_folder_with_and_without_a_slash(recipe_path: Path) -> None:
    recipe = load_recipe(str(recipe_path))
    made = prepare_run(recipe, recipe.step("clean")).commit({}, seconds=0.0)
    digests = set()
    for source in (made.uri, made.uri + "/", "clean"):
        text = recipe_path.read_text().replace('from = ["tokenizer"]', f'from = ["tokenizer", "{source}"]')
        path = recipe_path.with_name("other.toml")
        path.write_text(text)
        digests.add(step_digest(load_recipe(str(path)).step("tokenize")))
    assert digests == {step_digest(recipe.step("tokenize"))}
    assert find_finished(recipe, recipe.step("clean")) == made


def test_an_unknown_stage_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"stage \(washing\) must be one of"):
        find_stage("washing")


TUNING = """
name = "t"
run_dir = "/runs"
[[step]]
stage = "clean"
settings.inputs = [{ glob = "/text/*.jsonl", source = "s", licence = "l" }]
[[step]]
stage = "tokenizer"
[[step]]
stage = "tokenize"
[[step]]
name = "base"
stage = "train"
settings = { model = { preset = "tiny" }, seq_len = 16, batch_tokens = 64, micro_batch = 4, steps = 200 }
[[step]]
name = "tuned"
stage = "train"
init_from = "base"
settings = { seq_len = 16, batch_tokens = 64, micro_batch = 4, steps = 200, lora = { rank = 4 } }
"""


@pytest.mark.shows("A train step starts from the checkpoint that its `init_from` names")
def test_a_step_names_further_inputs(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(TUNING)
    recipe = load_recipe(str(path))
    start = recipe.step("tuned").named["init_from"]
    assert not isinstance(start, str) and start.name == "base" and not recipe.step("base").named


def test_a_teacher_is_a_checkpoint_or_its_stored_logits(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    asked = '[[step]]\nstage = "teacher_logits"\nsettings.seq_len = 16\n[[step]]\nname = "tuned"'
    for name in ("base", "teacher_logits"):
        text = TUNING.replace('[[step]]\nname = "tuned"', asked)
        text = text.replace('init_from = "base"', f'init_from = "base"\nteacher = "{name}"')
        path.write_text(text.replace("lora = { rank = 4 }", 'objective = { kind = "distill" }'))
        recipe = load_recipe(str(path))
        teacher = recipe.step("tuned").named["teacher"]
        assert not isinstance(teacher, str) and teacher.name == name
    assert [source.name for source in recipe.step("teacher_logits").inputs if not isinstance(source, str)] == [
        "base",
        "tokenize",
    ]


def test_dpo_names_the_log_probabilities_of_its_reference(tmp_path: Path) -> None:
    stored = '[[step]]\nstage = "reference_log_probs"\nsettings.seq_len = 16\n[[step]]\nname = "tuned"'
    text = TUNING.replace('[[step]]\nname = "tuned"', stored)
    text = text.replace('init_from = "base"', 'init_from = "base"\nreference = "reference_log_probs"')
    path = tmp_path / "t.toml"
    path.write_text(text.replace("lora = { rank = 4 }", 'objective = { kind = "dpo" }'))
    reference = load_recipe(str(path)).step("tuned").named["reference"]
    assert not isinstance(reference, str) and reference.name == "reference_log_probs"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"tuned.reference \(given\) has no effect unless objective.kind = .dpo."):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'init_from = "base"',
            'init_from = "tokenize"',
            r"tuned.init_from \(tokenize\) must name an earlier step that",
        ),
        ('init_from = "base"', 'init_from = "tuned"', r"such steps: base; correct it"),
        ('init_from = "base"', "init_from = 3", r"tuned.init_from \(3\) must name an earlier step that makes a Check"),
        ('init_from = "base"', "", r"tuned.model \(missing\) must be given, or else init_from"),
        ('stage = "clean"', 'stage = "clean"\ninit_from = "base"', r"clean.init_from \(unknown\) must be name, stage"),
        (
            "lora = { rank = 4 }",
            'model = { preset = "tiny" }',
            r"tuned.model \(tiny\) must not be given beside in",
        ),
        (
            "steps = 200, lora",
            'steps = 200, objective = { kind = "distill" }, lora',
            r"teacher \(missing\) must be",
        ),
        (
            'init_from = "base"',
            'init_from = "base"\nteacher = "base"',
            r"teacher \(given\) must be named with obj",
        ),
        (
            "steps = 200 }",
            'steps = 200, objective = { kind = "dpo" } }',
            r"objective.kind \(dpo\) needs a checkpoint",
        ),
        (
            "steps = 200 }",
            "steps = 200, lora = {} }",
            r"base.lora.rank \(16\) needs a checkpoint to start from",
        ),
        ("rank = 4 }", 'rank = 4 }, optimizer = { kind = "muon" }', r"kind \(muon\) must be adamw with lora"),
        ("rank = 4", "modules = []", r"tuned.lora.modules \(empty\) must hold a pattern of names or more"),
        ("rank = 4 }", "rank = 4 }, balance_weight = 0.1", None),
    ],
)
def test_bad_tuning_steps_are_refused(tmp_path: Path, old: str, new: str, message: str | None) -> None:
    path = tmp_path / "t.toml"
    assert old in TUNING
    path.write_text(TUNING.replace(old, new, 1))
    if message is None:
        load_recipe(str(path))  # whether it has an effect is known once the checkpoint is there
        return
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path))
