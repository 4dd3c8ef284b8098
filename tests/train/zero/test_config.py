from ray_ds.train.zero.config import deepspeed_config
from tests.train.runs import make_settings


def test_bf16_adamw_in_zero_1() -> None:
    settings = make_settings(precision="bf16", gradient_clipping=0.5)
    assert deepspeed_config(settings, 2) == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_scatter": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"enabled": True},
    }


def test_fp16_muon_in_zero_3() -> None:
    settings = make_settings(
        precision="fp16", zero_stage=3, device="cuda", optimizer={"kind": "muon"}, gradient_clipping=0.0
    )
    assert deepspeed_config(settings, 1) == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "reduce_scatter": False,
            "stage3_param_persistence_threshold": 10_000,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
    }


def test_uneven_shares_are_filled_up() -> None:
    config = deepspeed_config(make_settings(num_workers=3), 3)
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 2 * 3 * 4


def test_fp32_in_zero_0_names_neither_type_nor_partition() -> None:
    config = deepspeed_config(make_settings(zero_stage=0), 4)
    assert config["zero_optimization"] == {"stage": 0}
    assert config["gradient_accumulation_steps"] == 1
    assert not {"bf16", "fp16", "optimizer", "scheduler"} & set(config)


def test_groups_have_rows_or_weights_in_common() -> None:
    dense = {"preset": "tiny", "n_routed_experts": 0}
    tensor = deepspeed_config(make_settings(num_workers=4, model=dense, parallel={"tensor": 2}), 4)
    assert (tensor["gradient_accumulation_steps"], tensor["train_batch_size"]) == (2, 4 * 2 * 2)
    expert = deepspeed_config(make_settings(num_workers=4, parallel={"expert": 2}), 4)
    assert (expert["gradient_accumulation_steps"], expert["train_batch_size"]) == (1, 4 * 1 * 2)
    sequence = deepspeed_config(make_settings(num_workers=4, parallel={"sequence": 2}), 4)
    assert (sequence["gradient_accumulation_steps"], sequence["train_batch_size"]) == (2, 4 * 2 * 4)


def test_offloading_goes_to_pinned_memory_with_torchs_adamw() -> None:
    config = deepspeed_config(make_settings(zero_stage=3, offload="all"), 1, is_cuda=True)
    place = {"device": "cpu", "pin_memory": True}
    assert config["zero_optimization"]["offload_optimizer"] == config["zero_optimization"]["offload_param"] == place
    assert config["zero_force_ds_cpu_optimizer"] is False
    optimizer = deepspeed_config(make_settings(offload="optimizer"), 1)["zero_optimization"]
    assert optimizer["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert "offload_param" not in optimizer


def test_deepspeed_accepts_every_kind_of_configuration() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16", "fp16") if stage else ("fp32", "bf16"):
            config = DeepSpeedConfig(deepspeed_config(make_settings(precision=precision, zero_stage=stage), 1))
            assert config.gradient_clipping == 1.0 and config.zero_optimization_stage == stage
