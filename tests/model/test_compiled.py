"""The compiler's cache, on which the time of a restart hangs."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from ray_ds.config.presets import PRESETS
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.on_ray.trainer import COMPILE_ENV


@pytest.mark.slow
def test_a_second_process_takes_the_whole_pass_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert COMPILE_ENV == {"TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD": "1"}  # read when torch is imported
    monkeypatch.setattr(torch._functorch.config, "autograd_cache_allow_custom_autograd_functions", True)
    config = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1, n_routed_experts=0, first_k_dense_replace=1)
    decoder = Decoder(config)
    init_weights(decoder, 0)
    tokens = torch.randint(config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    gradients = []
    for _ in range(2):  # the second as a new process finds it: only files are left
        torch._dynamo.reset()
        counters.clear()
        loss = torch.compile(decoder)(tokens, tokens)
        gradients.append(torch.autograd.grad(loss, list(decoder.parameters())))
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1, dict(counters["aot_autograd"])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)
