"""Adapters on routed experts, against merged weights, and as peft would read them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ray_ds.config.objective import Lora
from ray_ds.config.presets import PRESETS
from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.errors import ConfigError
from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.experts import Experts
from ray_ds.train.adapter import write_adapter
from ray_ds.train.lora import add_adapters, merge_adapters
from ray_ds.train.lora_experts import LoraExperts
from tests.train.chats import tuned_settings
from tests.train.runs import SMALL, VOCAB_SIZE, make_settings
from tests.train.test_objectives import new_decoder, packed_rows

LORA = Lora(rank=8, alpha=16.0, modules=("*.q_proj",), routed_experts=True)


def adapted_decoder() -> Decoder:
    """Return a decoder whose adapters all do something."""
    decoder = new_decoder(1)
    add_adapters(decoder, LORA, seed=0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    return decoder


def factors_of(decoder: Decoder) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}


def test_every_expert_has_factors_of_its_own_that_do_nothing_at_first() -> None:
    tokens, *_ = packed_rows()
    decoder = new_decoder(1)
    plain = decoder(tokens)
    add_adapters(decoder, LORA, seed=0)
    torch.testing.assert_close(decoder(tokens), plain, rtol=0, atol=1e-5)
    config, experts = decoder.config, "model.layers.1.mlp.experts"
    width, inner, count = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    assert {name: tuple(f.shape) for name, f in factors_of(decoder).items() if name.startswith(experts)} == {
        f"{experts}.gate_up_proj_lora_A": (count, 8, width),
        f"{experts}.gate_up_proj_lora_B": (count, 2 * inner, 8),
        f"{experts}.down_proj_lora_A": (count, 8, inner),
        f"{experts}.down_proj_lora_B": (count, width, 8),
    }
    assert {name.split(".")[-2] for name in factors_of(decoder)} == {"experts", "q_proj"}


@pytest.mark.shows("Adapters on routed experts merge into the model that they are, with the gradient of merged weights")
@pytest.mark.parametrize("kernels", ["plain", "fast"])
def test_merged_experts_are_the_unmerged_ones(kernels: str) -> None:
    tokens, targets, segments, _ = packed_rows()
    decoder = adapted_decoder()
    for module in decoder.modules():
        if isinstance(module, Experts):
            module.kernels = kernels  # type: ignore[assignment]
    merged, adapters = merge_adapters(decoder.state_dict(), LORA)
    assert adapters.keys() == factors_of(decoder).keys()
    other = Decoder(decoder.config)
    other.load_state_dict(merged)
    with torch.no_grad():
        assert (decoder(tokens) - new_decoder(1)(tokens)).abs().max() > 0.1
        torch.testing.assert_close(decoder(tokens), other(tokens), rtol=1e-4, atol=1e-4)
    # Of a merged weight W + s B A with gradient G, A has s B^T G and B has s G A^T.
    decoder(tokens, targets, segments=segments).backward()
    other(tokens, targets, segments=segments).backward()
    for name, weight in other.named_parameters():
        if name + "_lora_A" in adapters:
            assert weight.grad is not None
            down, up = adapters[f"{name}_lora_A"], adapters[f"{name}_lora_B"]
            found = factors_of(decoder)
            expected = {"A": 2 * up.mT @ weight.grad, "B": 2 * weight.grad @ down.mT}
            for kind, gradient in expected.items():
                torch.testing.assert_close(found[f"{name}_lora_{kind}"].grad, gradient, rtol=1e-4, atol=1e-4)


def read_as_peft(folder: Path) -> dict[str, Tensor]:
    """Return what an adapter adds to each parameter of a model in transformers 5, by peft's rules since 0.19.1.

    Source: huggingface/peft, tuners_utils.py `_inject_parameters` (which wrapper of a module is whose) and
    lora/layer.py `ParamWrapper.get_delta_weight` (shapes).
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    deltas: dict[str, Tensor] = {}
    for name in config["target_modules"]:
        down, up = (tensors.pop(f"base_model.model.{name}.lora_{kind}.weight") for kind in "AB")
        deltas[f"{name}.weight"] = up @ down * scale
    for name in config["target_parameters"]:
        module, kind = name.rsplit(".", 1)
        wrapper = f"base_model.model.{module}" + (".base_layer" if kind == "gate_up_proj" else "")
        down, up = (tensors.pop(f"{wrapper}.lora_{kind}.weight") for kind in "AB")
        num_experts = len(down) // config["r"]
        down = down.reshape(num_experts, -1, down.shape[-1])
        up = up.reshape(up.shape[0], -1, num_experts)
        deltas[name] = torch.einsum("o r e, e r i -> e o i", up, down) * scale
    assert not tensors
    return deltas


@pytest.mark.shows("An adapter's files give transformers' model, read by peft's rules, the merged model's logits")
def test_the_files_are_pefts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens, *_ = packed_rows()
    decoder = adapted_decoder()
    merged, adapters = merge_adapters(decoder.state_dict(), LORA)
    base = {name: tensor for name, tensor in decoder.state_dict().items() if name not in adapters}
    save_checkpoint_folder(base, decoder.config, tmp_path / "model", dtype=torch.float32, max_shard_bytes=1 << 30)
    write_adapter(adapters, LORA, str(tmp_path / "adapter"), base_model=str(tmp_path / "model"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    other = Decoder(decoder.config)
    other.load_state_dict(merged)
    with torch.no_grad():
        for name, delta in read_as_peft(tmp_path / "adapter").items():
            theirs.get_parameter(name).add_(delta)
        torch.testing.assert_close(theirs(tokens).logits, other(tokens), rtol=1e-4, atol=1e-4)


def test_what_has_no_effect_or_no_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.rank \(4\) must be a multiple of 8 with routed_experts, for grouped"):
        tuned_settings(lora={"rank": 4, "routed_experts": True})
    dense = dataclasses.replace(PRESETS["tiny"], n_routed_experts=0, first_k_dense_replace=2)
    raw = {name: value for name, value in SMALL.items() if name != "model"}
    settings = decode_settings(TrainSettings, {**raw, "lora": {"rank": 8, "routed_experts": True}}, where="train")
    with pytest.raises(ConfigError, match=r"lora.routed_experts \(True\) has no effect in a dense model; remove it"):
        settings.for_model(dense)


@pytest.mark.gpu
def test_grouped_products_on_a_gpu_are_those_of_one_expert_after_the_other() -> None:
    config = make_settings().new_model(VOCAB_SIZE)
    generator = torch.Generator().manual_seed(0)
    adapted = LoraExperts(Experts(config), rank=8, scale=0.5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    adapted.to("cuda", torch.bfloat16)
    rows = torch.randn(70, config.hidden_size, generator=generator).to("cuda", torch.bfloat16)
    ends = torch.linspace(0, 70, config.n_routed_experts + 1).long()[1:].cuda()
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [adapted._run, adapted._run_grouped]
    outs = [way(rows, ends) for way in ways]
    torch.testing.assert_close(outs[0], outs[1], rtol=2e-2, atol=2e-2)
    grads = [torch.autograd.grad(out.float().square().sum(), list(adapted.parameters())) for out in outs]
    for one, grouped in zip(*grads, strict=True):
        torch.testing.assert_close(one, grouped, rtol=5e-2, atol=5e-2 * float(one.abs().max()))
