from typing import Any

import pytest

from ray_ds.config.settings import as_json, decode_settings, digest_settings
from ray_ds.config.train import TrainSettings
from ray_ds.errors import ConfigError
from tests.config.train_settings import decode


def test_unknown_optimizer_and_unknown_rate_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"pretrain\.optimizer .* must be .*'adamw', 'muon'"):
        decode(optimizer={"kind": "lion"})
    with pytest.raises(ConfigError, match=r"momentum .* must be one of the known settings"):
        decode(optimizer={"kind": "adamw", "momentum": 0.9})


def test_token_budget_is_rounded_up_to_steps() -> None:
    settings = decode(steps=None, tokens=10**6 + 1, schedule={"warmup_steps": 5})
    assert settings.num_steps == 62
    assert (settings.num_micro_batches, settings.batch_rows) == (2, 8)


def test_settings_that_depend_on_others_have_values_where_they_have_an_effect() -> None:
    experts, dense = decode(validate_every=5), decode(model={"preset": "demo_dense"})
    assert (experts.router_bias_speed, experts.validation_tokens) == (0.001, 65536)
    assert (dense.router_bias_speed, dense.validation_tokens) == (None, None)
    assert decode(router_bias_speed=0.0).router_bias_speed == 0.0
    assert digest_settings(decode(router_bias_speed=0.001)) == digest_settings(decode())
    for settings in (experts, dense):
        assert decode_settings(TrainSettings, as_json(settings), where="task") == settings


def test_workers_are_a_number_or_a_range() -> None:
    fixed, elastic = decode(num_workers=2), decode(num_workers=[1, 2], allowed_workers=[2])
    assert (fixed.worker_range, fixed.min_workers, fixed.max_workers, fixed.is_elastic) == ((2, 2), 2, 2, False)
    assert (elastic.worker_range, elastic.min_workers, elastic.max_workers, elastic.is_elastic) == ((1, 2), 1, 2, True)
    assert (fixed.scaling, fixed.grow_pause_s) == ("graceful", None)
    assert (elastic.scaling, elastic.grow_pause_s) == ("graceful", 30.0)
    assert decode_settings(TrainSettings, as_json(elastic), where="task") == elastic
    with pytest.raises(ConfigError, match=r"num_workers .* must be at most 2, the micro-batches of a step"):
        decode(num_workers=[1, 3])


@pytest.mark.parametrize("num_workers", [2, [1, 2]])
def test_any_number_of_workers_may_be_left_to_ray_trains_own_policy(num_workers: Any) -> None:
    stock = decode(num_workers=num_workers, scaling="stock")
    assert (stock.scaling, stock.grow_pause_s) == ("stock", None)
    assert digest_settings(stock) == digest_settings(decode())


def test_a_fixed_number_of_groups_may_be_left_to_ray_train() -> None:
    assert decode(num_workers=2, parallel={"expert": 2}, scaling="stock").scaling == "stock"


def test_bad_steps_are_counted_where_they_are_not_fatal() -> None:
    assert decode().max_bad_steps is None
    assert [decode(bad_loss=way).max_bad_steps for way in ("skip", "roll_back")] == [10, 10]
    assert decode(bad_loss="skip", max_bad_steps=0, loss_spike=2.0).max_bad_steps == 0


@pytest.mark.parametrize("value", [0, 7, "auto"])
def test_snapshots_come_every_so_many_steps_or_as_they_cost(value: Any) -> None:
    assert decode(snapshot_every=value).snapshot_every == value


def test_only_what_changes_the_model_is_in_the_digest() -> None:
    plain = digest_settings(decode())
    for name, value in [
        ("num_workers", 2),
        ("num_workers", [1, 2]),
        ("checkpoint_every", 7),
        ("snapshot_every", 0),
        ("compile", True),
        ("max_failures", 0),
        ("hang_timeout_s", 60),
        ("profile_steps", [2, 5]),
        ("trackers", ["tensorboard"]),
    ]:
        assert digest_settings(decode(**{name: value})) == plain, name
    for name, value in [
        ("seed", 1),
        ("zero_stage", 2),
        ("precision", "fp32"),
        ("optimizer", {"kind": "adamw", "lr": 1e-4}),
        ("bad_loss", "skip"),
        ("loss_spike", 3.0),
    ]:
        assert digest_settings(decode(**{name: value})) != plain, name


@pytest.mark.shows("How often checkpoints are written is no part of a model's digest, but where a roll back goes to is")
def test_where_a_roll_back_goes_to_is_in_the_digest() -> None:
    often, seldom = (decode(bad_loss="roll_back", checkpoint_every=every) for every in (100, 500))
    assert digest_settings(often) != digest_settings(seldom)
    for bad_loss in ("fail", "skip"):
        often, seldom = (decode(bad_loss=bad_loss, checkpoint_every=every) for every in (100, 500))
        assert digest_settings(often) == digest_settings(seldom)
        assert "checkpoint_every" not in digest_settings(often)  # type: ignore[operator]


@pytest.mark.shows("With `keep_best` a model's digest covers what it is chosen from and by; without, it does not")
def test_what_the_best_model_depends_on_is_in_the_digest() -> None:
    changes: list[dict[str, Any]] = [{"checkpoint_every": 200}, {"validation_tokens": 1000}]
    best = {"keep_best": True, "validate_every": 100, "checkpoint_every": 100}
    assert digest_settings(decode(**best)) != digest_settings(decode())
    for change in changes:
        assert digest_settings(decode(**{**best, **change})) != digest_settings(decode(**best))
        assert digest_settings(decode(validate_every=100, **change)) == digest_settings(decode())
    assert digest_settings(decode(**{**best, "keep_checkpoints": 5, "validate_every": 50})) == digest_settings(
        decode(**best)
    )


def test_extra_losses_have_the_weights_that_deepseek_gives_them() -> None:
    v3, dense = decode(model={"preset": "tiny", "num_nextn_predict_layers": 1}), decode(model={"preset": "demo_dense"})
    assert (v3.balance_weight, v3.prediction_weight, v3.router_bias_speed) == (1e-4, 0.3, 1e-3)
    assert (dense.balance_weight, dense.prediction_weight, dense.router_bias_speed) == (None, None, None)
    v2 = decode(model={"preset": "tiny", "topk_method": "greedy", "scoring_func": "softmax"})
    assert (v2.balance_weight, v2.router_bias_speed) == (1e-3, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"preset": "demo_dense"}, "balance_weight": 0.1},
            r"balance_weight \(0.1\) has no effect in a dense model",
        ),
        ({"prediction_weight": 0.1}, r"prediction_weight \(0.1\) has no effect while num_nextn_predict_layers is 0"),
        (
            {"model": {"preset": "tiny", "topk_method": "greedy"}, "router_bias_speed": 0.1},
            r"router_bias_speed \(0.1\) has no effect where routers have no bias",
        ),
    ],
)
def test_weights_of_losses_that_the_model_has_not_are_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(**changes)
