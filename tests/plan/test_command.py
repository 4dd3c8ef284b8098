"""`ray-ds plan`, as it is called."""

import subprocess
import sys
from pathlib import Path

import pytest

from ray_ds.cli import main
from ray_ds.errors import ConfigError
from ray_ds.plan.report import duration
from ray_ds.plan.steps import step_case, train_steps
from ray_ds.recipe import load_recipe

GPU_RECIPE = "jobs/recipes/gpu_350m.toml"
TWO_STEPS = "jobs/recipes/demo_elastic.toml"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return exit status, standard output and standard error of `ray-ds plan`."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.shows("`ray-ds plan` tells memory by ZeRO stage, speed, days and cost, and settings that are faster")
def test_plan_of_named_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, GPU_RECIPE, "--gpu", "h200", "--gpus", "8", "--gpu-hour-price", "2.5")
    assert status == 0
    assert out.startswith("step train: 370,7") and "8 x h200: 140.4 GiB" in out
    rows = [line.split()[0] for line in out.splitlines() if line.strip()[:1].isdigit() and "x h200" not in line]
    assert rows[:8] == ["0", "1", "1", "2", "2", "3", "3", "3"]
    assert "as the recipe says: fits" in out and "GPU hours at 2.5: " in out
    assert "fastest that fits: --train.zero_stage=" in out


def test_no_price_no_cost(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, GPU_RECIPE, "--gpu", "h200")
    assert "GPU hours" not in out and "tokens/s" in out


@pytest.mark.shows("`ray-ds plan` refuses what cannot fit, with an exit status of 2 and what to set instead")
def test_what_cannot_fit(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, GPU_RECIPE, "--gpu", "rtx4090")
    assert status == 2
    assert "DOES NOT FIT" in out
    assert err.startswith("error: train.micro_batch (16) must be at most ")


def test_overrides_count(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, GPU_RECIPE, "--gpu", "h200", "--train.zero_stage=3", "--train.recompute_activations=true")
    assert "activations recomputed" in out


def test_all_train_steps_or_one(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, TWO_STEPS, "--gpu", "l40s")
    assert "step quiet: " in out and "step elastic: " in out
    _, out, _ = run(capsys, TWO_STEPS, "--gpu", "l40s", "--step", "quiet")
    assert "step quiet: " in out and "step elastic: " not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "v100"], "--gpu (v100) must name one of h200"),
        (["--gpu", "h200", "--gpus", "64"], "--gpus (64) must be at most 16, the micro-batches of a step of train"),
        (["--gpu", "h200", "--gpus", "0"], "--gpus (0) must be positive"),
        (["--gpu", "h200", "--gpu-hour-price", "-1"], "--gpu-hour-price (-1.0) must be positive"),
        (["--gpu", "h200", "--step", "serve"], "--step (serve) must be a step that trains"),
    ],
)
def test_wrong_options(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    status, _, err = run(capsys, GPU_RECIPE, *arguments)
    assert status == 2 and err.startswith(f"error: {message}")


def test_vocabulary_comes_from_the_tokenizer_step() -> None:
    recipe = load_recipe(GPU_RECIPE, root="/tmp")
    (step,) = train_steps(recipe, None)
    assert step_case(step, None).config.vocab_size == 32768


def test_recipe_that_trains_nothing(tmp_path: Path) -> None:
    path = tmp_path / "clean.toml"
    path.write_text(
        'name = "a"\nrun_dir = "a"\n[[step]]\nstage = "clean"\n[[step.settings.inputs]]\nglob = "a.txt"\n'
        'source = "a"\nlicence = "b"\n'
    )
    with pytest.raises(ConfigError, match=r"steps that train \(none\) must be one or more"):
        train_steps(load_recipe(str(path), root="/tmp"), None)


def test_planning_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, ray_ds.cli as c\n"
        f"try: c.main(['plan', {GPU_RECIPE!r}, '--gpu', 'h200'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'deepspeed') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize(
    ("seconds", "text"), [(30, "30 seconds"), (600, "10.0 minutes"), (7200, "2.0 hours"), (864000, "10.0 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


GROUPS = ("--train.num_workers=8", "--train.parallel.tensor=4", "--train.compile=false")


@pytest.mark.shows("`ray-ds plan` plans groups and offload as the recipe has them, and says what cannot go with them")
def test_groups_and_offload_are_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, GPU_RECIPE, "--gpu", "h200", *GROUPS, "--train.offload=optimizer")
    assert status == 0
    assert "optimizer on the host, groups of 4 (tensor)" in out
    assert "GiB to its group and" in out and "GiB in the host's memory for each worker" in out
    assert "left out, ZeRO 3, 3 optimizer, 3 all: zero_stage must be 0, 1 or 2 with parallel.tensor" in out
    (best,) = [line for line in out.splitlines() if line.startswith("fastest that fits: ")]
    assert "zero_stage=1" in best or "zero_stage=2" in best


def test_workers_are_whole_groups(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, GPU_RECIPE, "--gpu", "h200", "--gpus", "6", *GROUPS)
    assert status == 2
    assert err.startswith("error: --gpus (6) must be whole groups of 4, the product of train.parallel; try 8")


def test_groups_share_micro_batches(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, GPU_RECIPE, "--gpu", "h200", "--gpus", "128", *GROUPS)
    assert status == 2
    assert err.startswith("error: --gpus (128) must be at most 64, the micro-batches of a step of train times 4")


def test_what_training_refuses_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, GPU_RECIPE, "--gpu", "h200", *GROUPS, "--train.zero_stage=3")
    assert status == 2
    assert "train.zero_stage (3) must be 0, 1 or 2 with parallel.tensor and parallel.expert" in err
