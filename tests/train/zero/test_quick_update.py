"""The quick look at the gradient: the same norms, and bad gradients still stop a step."""

import inspect
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.processes import spawn
from tests.train.runs import VOCAB_SIZE, make_settings
from tests.train.zero.worlds import forward_backward, gather, grid, new_engine, run_step, run_world


def test_deepspeed_still_looks_at_the_norm() -> None:
    """The contract: names, and that an invalid norm counts as overflow where gradients are not scanned."""
    import deepspeed
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    source = inspect.getsource(DeepSpeedZeroOptimizer.step)
    version = f"DeepSpeed {deepspeed.__version__}"
    assert "self.check_overflow(partition_gradients=" in source, version
    assert "is_invalid_grad_norm(scaled_global_grad_norm)" in source and "self.overflow = True" in source, version
    guard = "self.dtype != torch.bfloat16\n                    or self.check_grad_overflow) and is_invalid_grad_norm"
    assert guard in source, version
    clip = inspect.getsource(DeepSpeedZeroOptimizer.unscale_and_clip_grads)
    assert "clip = ((clip_norm / self.loss_scale) + 1e-6) / self.clip_grad" in clip, version
    parameters = list(inspect.signature(DeepSpeedZeroOptimizer.get_grad_norm_direct).parameters)
    assert parameters == ["self", "gradients", "params", "norm_type"], version


def test_deepspeed_still_tells_of_a_bad_norm_among_the_groups() -> None:
    """With offload a bad norm arrives as -1, and ours as it is; the norm over all groups must show either."""
    from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    offloaded = inspect.getsource(DeepSpeedZeroOptimizer.complete_grad_norm_calculation_for_cpu_offload)
    assert "total_norm = -1.0" in offloaded
    assert "combine_grad_norm_groups(norm_groups" in inspect.getsource(DeepSpeedZeroOptimizer.scaled_global_norm)
    for bad in (-1.0, math.inf, math.nan):
        assert is_invalid_grad_norm(combine_grad_norm_groups([torch.tensor(3.0), torch.tensor(bad)])), bad
    assert combine_grad_norm_groups([torch.tensor(3.0), torch.tensor(4.0)]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_norms_are_deepspeeds_and_a_gradient_that_is_no_number_changes_nothing(
    tmp_path: Path, stage: int, precision: str
) -> None:
    spawn(compare, (str(tmp_path / "store"), stage, precision, "skip"), count=2)


@pytest.mark.slow
def test_where_a_bad_step_is_the_last_the_norm_alone_tells(tmp_path: Path) -> None:
    spawn(compare, (str(tmp_path / "store"), 1, "bf16", "fail"), count=2)


@pytest.mark.parametrize("norm", [0.5, 2.0, 1e4])
def test_gradients_are_clipped_as_deepspeed_does(norm: float) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from ray_ds.train.zero.quick_update import use_quick_update

    stock, quick = (object.__new__(DeepSpeedZeroOptimizer) for _ in range(2))
    for optimizer in (stock, quick):
        optimizer.clip_grad, optimizer.dtype, optimizer.loss_scaler = 1.0, torch.bfloat16, None
        optimizer.external_loss_scale, optimizer.custom_loss_scaler = 1.0, True
    assert use_quick_update(quick, waits=False)
    gradients = [torch.randn(100, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    stock.unscale_and_clip_grads([gradients[0]], torch.tensor(norm))
    quick.unscale_and_clip_grads([gradients[1]], torch.tensor(norm))
    assert torch.equal(*gradients)


BAD_STEP_CASES = [
    {"zero_stage": 1, "offload": "optimizer"},
    {"zero_stage": 2, "offload": "optimizer", "precision": "bf16"},
    {"zero_stage": 1, "optimizer": {"kind": "muon"}, "gradient_clipping": 0.0},
    {"zero_stage": 2, "optimizer": {"kind": "muon"}, "gradient_clipping": 0.0, "precision": "bf16"},
]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_infinite_gradient_changes_nothing_with_offload_or_muon(tmp_path: Path) -> None:
    run_world(2, meet_infinite_gradients, tmp_path)


def meet_infinite_gradients(rank: int, world_size: int, folder: Path) -> None:
    """Meet one in a matrix, which Muon trains, and one in a vector; only the process that owns it sees it."""
    for case in BAD_STEP_CASES:
        engine = new_engine(make_settings(bad_loss="skip", **case), 0, world_size)
        run_step(engine, grid(0), rank, world_size)
        for name in ("model.layers.0.self_attn.o_proj.weight", "model.norm.weight"):
            before = gather(engine.state())
            spoilt = engine.decoder.get_parameter(name).register_hook(lambda g: torch.full_like(g, math.inf))
            forward_backward(engine, grid(1), rank, world_size)
            spoilt.remove()
            result = engine.step(1.0)
            assert result.is_skipped and not math.isfinite(result.grad_norm), (case, name)
            after = gather(engine.state())
            assert after.facts == before.facts, (case, name)
            assert all(torch.equal(value, before.tensors[key]) for key, value in after.tensors.items()), (case, name)
        _, norm = run_step(engine, grid(1), rank, world_size)
        assert math.isfinite(norm), case


def compare(rank: int, store: str, stage: int, precision: str, bad_loss: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from ray_ds.model.decoder import Decoder
    from ray_ds.model.initial import init_weights
    from ray_ds.train.objective import NextTokenObjective
    from ray_ds.train.zero.engine import Engine
    from tests.train.zero.worlds import micro_batch

    settings = make_settings(zero_stage=stage, precision=precision, bad_loss=bad_loss)
    decoder = Decoder(settings.model.resolve(VOCAB_SIZE, settings.seq_len))
    init_weights(decoder, 0)
    engine = Engine(NextTokenObjective(decoder), settings, device=torch.device("cpu"), world_size=2)
    optimizer: Any = engine._engine.optimizer
    rows = torch.randint(VOCAB_SIZE, (4, 17), generator=torch.Generator().manual_seed(rank))

    def run(factor: float) -> Any:
        for _ in range(2):
            engine.forward_backward(micro_batch(rows), terms=256)
        if factor != 1.0:
            for gradients in optimizer.averaged_gradients.values():
                if gradients and rank == 1:  # one process's gradient is enough
                    gradients[0].mul_(factor)
        slow = [
            type(optimizer).get_grad_norm_direct(optimizer, gradients, optimizer.params_in_partition[group])
            for group, gradients in optimizer.averaged_gradients.items()
        ]
        return torch.stack(slow).norm(), engine.step(1.0)

    expected, result = run(1.0)
    torch.testing.assert_close(torch.tensor(result.grad_norm), expected, rtol=1e-5, atol=0)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    _, result = run(float("nan"))
    assert result.is_skipped == (bad_loss == "skip") and not math.isfinite(result.grad_norm)
    if bad_loss == "fail":
        return
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    assert not run(1.0)[1].is_skipped
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
