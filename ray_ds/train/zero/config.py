"""The settings in DeepSpeed's words."""

from typing import Any

from ray_ds.config.train import TrainSettings

FP16_INITIAL_SCALE_POWER = 16
"""fp16 starts with its loss multiplied by 2 ** 16, DeepSpeed's default; the scale finds its level within some steps."""


def deepspeed_config(settings: TrainSettings, world_size: int, *, is_cuda: bool = False) -> dict[str, Any]:
    """Return the whole of DeepSpeed's configuration.

    The optimizer is not in it: `train.zero.optimizer` builds that, so that the router and the norms get the rates meant
    for them and no op has to be compiled in a worker. Each default named here is one that would surprise: clipping is
    1.0 unless said otherwise, and Muon in ZeRO-3 needs whole gradients (stage3.py: "Muon and reduce scatter cannot be
    used together").

    Args:
        world_size: processes, in whole groups.
        is_cuda: whether the model is on a GPU.
    """
    parallel = settings.parallel
    num_readers = world_size // parallel.rows_shared_by
    num_copies = world_size // parallel.held_by
    micro_batches = -(-settings.num_micro_batches // num_readers)  # of each worker, some of them without targets
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage:
        zero["overlap_comm"] = False
        zero["reduce_scatter"] = not (settings.zero_stage == 3 and settings.optimizer.kind == "muon")
    if settings.zero_stage == 3:
        # Parameters below this many elements stay whole on every worker: norms, and small models' projections.
        zero["stage3_param_persistence_threshold"] = 10_000
    if settings.offload != "none":
        # On a CPU there is no memory to pin, and nothing is copied.
        place = {"device": "cpu", "pin_memory": is_cuda}
        zero["offload_optimizer"] = place
        if settings.offload == "all":
            zero["offload_param"] = place
    config: dict[str, Any] = {
        "train_batch_size": settings.micro_batch * micro_batches * num_copies,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": settings.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed would have its own AdamW for offloading, which is compiled at first use, for minutes; torch's fused
        # one does the same work.
        **({"zero_force_ds_cpu_optimizer": False} if settings.offload != "none" else {}),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # It would wait for the device before each pass and after each step (utils/timer.py), to log what we measure.
        "timers": {"throughput": {"enabled": False}},
    }
    if settings.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if settings.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": FP16_INITIAL_SCALE_POWER}
    return config
