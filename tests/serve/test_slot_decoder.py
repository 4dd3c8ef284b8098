import pytest
import torch

from ray_ds.config.model import ModelConfig
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.serve.slot_decoder import SlotDecoder

SIZES = {
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "intermediate_size": 64,
}
DENSE = ModelConfig(**SIZES, first_k_dense_replace=3)
SPARSE = ModelConfig(
    **SIZES,
    first_k_dense_replace=1,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
@torch.inference_mode()
def test_cached_logits_are_those_of_the_whole_sequence(config: ModelConfig) -> None:
    decoder = Decoder(config)
    init_weights(decoder, seed=1)
    decoder.eval()
    slots = SlotDecoder(decoder, num_slots=3, max_len=40)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(97, (3, 30), generator=generator)
    whole = decoder(tokens)  # (3, 30, V)
    lengths = [5, 17, 1]
    order = [2, 0, 1]
    for row, slot in enumerate(order):
        torch.testing.assert_close(
            slots.prefill(slot, tokens[row, :3].tolist()[: lengths[row]]), whole[row, min(3, lengths[row]) - 1]
        )
        if lengths[row] > 3:
            rest = tokens[row, 3 : lengths[row]].tolist()
            torch.testing.assert_close(slots.prefill(slot, rest), whole[row, lengths[row] - 1])
    for step in range(10):
        fed = [int(tokens[row, lengths[row] + step]) for row in range(3)]
        logits = slots.decode(order, fed)
        for row in range(3):
            torch.testing.assert_close(logits[row], whole[row, lengths[row] + step])
    slots.clear(order[0])
    torch.testing.assert_close(slots.prefill(order[0], tokens[1, :9].tolist()), whole[1, 8])
