import torch

from ray_ds.config.optimizer import AdamW, Muon
from ray_ds.model.decoder import Decoder
from ray_ds.train.zero.optimizer import make_optimizer
from tests.train.runs import VOCAB_SIZE, make_settings


def tiny_decoder() -> Decoder:
    return Decoder(make_settings().model.resolve(VOCAB_SIZE, 16))


def names_of(decoder: Decoder, parameters: list[torch.nn.Parameter]) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in decoder.named_parameters() if id(parameter) in wanted}


def test_adamw_decays_matrices_and_not_norms() -> None:
    decoder = tiny_decoder()
    optimizer = make_optimizer(decoder.named_parameters(), AdamW(kind="adamw", weight_decay=0.3), is_cuda=False)
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert all("norm" in name for name in names_of(decoder, vectors["params"]))
    assert not any("norm" in name for name in names_of(decoder, matrices["params"]))
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(decoder.parameters()))


def test_muon_takes_the_layers_matrices_and_stacked_experts_only() -> None:
    decoder = tiny_decoder()
    optimizer = make_optimizer(decoder.named_parameters(), Muon(kind="muon", lr=0.02, adam_lr=0.003), is_cuda=False)
    layers, tables, vectors = optimizer.param_groups
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False, False]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.003, 0.003]
    assert names_of(decoder, tables["params"]) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.mlp.gate.weight",
    }
    assert {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.self_attn.o_proj.weight"} <= names_of(
        decoder, layers["params"]
    )
    assert all(parameter.use_muon for parameter in layers["params"])
    assert vectors["weight_decay"] == 0.0 and all("norm" in name for name in names_of(decoder, vectors["params"]))
