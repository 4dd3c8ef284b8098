from typing import Any

import pytest

from ray_ds.config.optimizer import Muon
from ray_ds.errors import ConfigError
from tests.config.train_settings import decode


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_tokens": 500000},
            "batch_tokens (500000) must be a multiple of micro_batch * seq_len (4 * 2048 = 8192); try 507904.",
        ),
        (
            {"num_workers": 3},
            "num_workers (3) must be at most 2, the micro-batches of a step (batch_tokens / 8192); ask for fewer "
            "workers or larger batches.",
        ),
        ({"num_workers": [2, 1]}, "num_workers ([2, 1]) must be [min, max]; swap them."),
        ({"fp8": True, "precision": "fp32"}, "fp8 (True) must be off with precision fp32; use bf16, or remove it."),
        ({"num_workers": 0}, "num_workers (0) must be 1 or more, a number or [min, max]; raise it."),
        ({"num_workers": [0, 2]}, "num_workers ([0, 2]) must be 1 or more, a number or [min, max]; raise it."),
        (
            {"num_workers": [1, 2], "allowed_workers": []},
            "allowed_workers ([]) must name a number of workers; add one, or remove the setting.",
        ),
        (
            {"num_workers": 2, "allowed_workers": [1, 2]},
            "allowed_workers ([1, 2]) has no effect with a fixed number of workers; remove it.",
        ),
        (
            {"num_workers": [1, 2], "allowed_workers": [1, 3]},
            "allowed_workers ([1, 3]) must lie within num_workers, 1 to 2; correct one of them.",
        ),
        (
            {"num_workers": [1, 2], "allowed_workers": [1, 2], "scaling": "stock"},
            "allowed_workers ([1, 2]) has no effect with stock scaling: Ray Train takes any number within num_workers; "
            "remove one of them.",
        ),
        (
            {"num_workers": [1, 2], "grow_pause_s": 5.0, "scaling": "stock"},
            "grow_pause_s (5.0) has no effect with stock scaling, which grows as Ray Train does; remove it.",
        ),
        (
            {"scaling": "mine", "num_workers": [1, 2]},
            "scaling (mine) must be 'graceful' or 'stock'; correct it in the recipe or on the command line.",
        ),
        (
            {"grow_pause_s": 5.0},
            "grow_pause_s (5.0) has no effect with a fixed number of workers; remove it.",
        ),
        (
            {"max_bad_steps": 5},
            "max_bad_steps (5) has no effect where bad_loss is fail; remove it.",
        ),
        (
            {"loss_spike": 1.0},
            "loss_spike (1.0) must be greater than 1; correct it in the recipe or on the command line.",
        ),
        (
            {"bad_loss": "ignore"},
            "bad_loss (ignore) must be 'fail', 'skip' or 'roll_back'; correct it in the recipe or on the command line.",
        ),
        (
            {"keep_best": True},
            "keep_best (True) has no effect while validate_every is 0; remove it, or validate.",
        ),
        (
            {"keep_best": True, "validate_every": 300},
            "checkpoint_every (500) must be a multiple of validate_every (300) with keep_best, or checkpoints have no "
            "validation loss to compare; try 600.",
        ),
        (
            {"hang_timeout_s": 0},
            "hang_timeout_s (0) must be greater than 0; correct it in the recipe or on the command line.",
        ),
        (
            {"trackers": ["neptune"]},
            "trackers.0 (neptune) must be 'tensorboard', 'wandb' or 'mlflow'; correct it in the recipe or on the "
            "command line.",
        ),
        ({"steps": None}, "steps or tokens (neither) must be given, exactly one of them; give one."),
        ({"tokens": 10**6}, "steps or tokens (1000 and 1000000) must be given, exactly one of them; give one."),
        (
            {"steps": 100},
            "schedule.warmup_steps (100) must be below the number of steps (100); lower it.",
        ),
        (
            {"optimizer": {"kind": "muon"}},
            "gradient_clipping (1.0) must be 0 with Muon in ZeRO 1-3, where DeepSpeed clips the orthogonalized update; "
            "set it to 0 (Muon's update does not grow with the gradient), or set zero_stage to 0.",
        ),
        (
            {"precision": "fp16", "zero_stage": 0},
            "zero_stage (0) must be 1, 2 or 3 with fp16: DeepSpeed does not scale the loss in ZeRO 0; use 1, or "
            "precision bf16.",
        ),
        (
            {"model": {"preset": "demo_dense"}, "router_bias_speed": 0.001},
            "router_bias_speed (0.001) has no effect in a dense model; remove it.",
        ),
        (
            {"validation_tokens": 65536},
            "validation_tokens (65536) has no effect while validate_every is 0; remove it.",
        ),
        (
            {"micro_batch": 0},
            "micro_batch (0) must be greater than 0; correct it in the recipe or on the command line.",
        ),
        (
            {"zero_stage": 4},
            "zero_stage (4) must be 0, 1, 2 or 3; correct it in the recipe or on the command line.",
        ),
        (
            {"precision": "int8"},
            "precision (int8) must be 'fp32', 'bf16' or 'fp16'; correct it in the recipe or on the command line.",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistake_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        decode(**changes)
    assert str(error.value) == f"demo.toml: pretrain.{message}"


def test_muon_may_be_clipped_where_deepspeed_clips_the_gradient() -> None:
    settings = decode(optimizer={"kind": "muon", "lr": 0.01}, zero_stage=0, gradient_clipping=0.5)
    assert settings.optimizer == Muon(kind="muon", lr=0.01)


def test_workers_need_not_divide_the_batch() -> None:
    assert decode(batch_tokens=5 * 8192, num_workers=[2, 4]).num_micro_batches == 5
