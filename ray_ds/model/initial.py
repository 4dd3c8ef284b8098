"""The values a new model starts from."""

import torch

from ray_ds.model.decoder import Decoder

INITIAL_STD = 0.02
"""Of every matrix, as in GPT-2 and Hugging Face; what writes to the residual stream gets less."""

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "down_proj")


@torch.no_grad()
def init_weights(decoder: Decoder, seed: int) -> None:
    """Give every parameter its first value, the same for a seed on any device and in any type.

    Matrices are normal; those that write to the residual stream are smaller by the root of the number of writes
    (GPT-2, section 2.3), so that its size does not grow with depth. Norms are 1 and biases 0.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = INITIAL_STD / (2 * decoder.config.num_hidden_layers) ** 0.5
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        std = residual_std if name.endswith(RESIDUAL_OUTPUTS) else INITIAL_STD
        parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))
    for name, buffer in decoder.named_buffers():
        assert name.endswith(("e_score_correction_bias", "expert_load")), name
        buffer.zero_()
