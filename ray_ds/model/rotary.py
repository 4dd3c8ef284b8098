"""Rotary positions (arXiv 2104.09864): pairs of a vector's numbers turned by angles that grow with the position."""

import math

import torch
from torch import Tensor

from ray_ds.config.model import ModelConfig
from ray_ds.config.rope import LinearRope, Llama3Rope, Yarn

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of the angles at some positions, (B, T, 1, rope_dim) each, as `rotate` wants them, in fp32."""


def rotary_tables(positions: Tensor, config: ModelConfig) -> Rotary:
    """Return the tables of `positions`, (B, T) or (1, T) whole numbers, in fp32 whatever the model's type.

    Each pair's value is given twice, the sine's first of a pair negated. Pairs are neighbours in latent attention
    (DeepSeek) and the halves' numbers of the same place in grouped-query attention (GPT-NeoX, Llama).
    """
    make = _opaque_tables if torch.compiler.is_compiling() else _tables
    are_neighbours = config.attention == "mla"
    return make(positions, frequencies(config, positions.device), vector_factor(config), are_neighbours)


def _tables(positions: Tensor, frequencies: Tensor, factor: float, are_neighbours: bool) -> Rotary:
    """Return the tables, from how far each pair turns a position and the factor on turned vectors."""
    angles = positions[..., None].float() * frequencies  # (B, T, rope_dim / 2)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if are_neighbours:
        cos = torch.stack((cos, cos), dim=-1).flatten(-2)  # (B, T, rope_dim)
        sin = torch.stack((-sin, sin), dim=-1).flatten(-2)  # (B, T, rope_dim)
    else:
        cos = torch.cat((cos, cos), dim=-1)  # (B, T, rope_dim)
        sin = torch.cat((-sin, sin), dim=-1)  # (B, T, rope_dim)
    return cos[:, :, None], sin[:, :, None]  # (B, T, 1, rope_dim)


@torch.library.custom_op("ray_ds::rotary_tables", mutates_args=())
def _opaque_tables(positions: Tensor, frequencies: Tensor, factor: float, are_neighbours: bool) -> Rotary:
    """Do what `_tables` does, out of the compiler's sight.

    It would fuse cosine and sine into whatever turns vectors by them and work them out for every head of every layer
    anew, which takes twice the time of reading them (141 against 70 us a layer of 16 x 2048 tokens on an H200).
    """
    return _tables(positions, frequencies, factor, are_neighbours)


@_opaque_tables.register_fake
def _(positions: Tensor, frequencies: Tensor, factor: float, are_neighbours: bool) -> Rotary:
    table = frequencies.new_empty((*positions.shape, 1, 2 * len(frequencies)))
    return table, table.clone()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Return `x` (B, T, H, rope_dim) with its neighbouring pairs (x0, x1), (x2, x3), ... turned by position."""
    return _turn(x, torch.unflatten(x, -1, (-1, 2)).flip(-1).flatten(-2), rotary)


def rotate_halves(x: Tensor, rotary: Rotary) -> Tensor:
    """Return `x` (B, T, H, rope_dim) with the pairs (x0, x_half), (x1, x_half+1), ... turned by position."""
    return _turn(x, torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1), rotary)


def _turn(x: Tensor, swapped: Tensor, rotary: Rotary) -> Tensor:
    """Return `x` turned, given it with every pair swapped."""
    cos, sin = rotary
    turned: Tensor = x * cos + swapped * sin
    return turned.to(x.dtype)


def frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Return how far each pair turns a position, in radians: (rope_dim / 2,), fp32."""
    exponents = torch.arange(0, config.rope_dim, 2, device=device, dtype=torch.float32)
    plain = 1.0 / config.rope_theta ** (exponents / config.rope_dim)
    match config.rope_scaling:
        case LinearRope(factor=factor):
            return plain / factor
        case Llama3Rope() as llama:
            turns = llama.original_max_position_embeddings * plain / (2 * math.pi)  # within the original length
            kept = (turns - llama.low_freq_factor) / (llama.high_freq_factor - llama.low_freq_factor)
            return _blend(plain, llama.factor, kept)
        case Yarn() as yarn:
            fast, slow = _yarn_range(yarn, config)
            pairs = torch.arange(len(plain), device=device, dtype=torch.float32)
            return _blend(plain, yarn.factor, 1 - (pairs - fast) / (slow - fast))
    return plain


def _blend(plain: Tensor, factor: float, kept: Tensor) -> Tensor:
    """Return frequencies of which the part `kept`, cut to 0 to 1, stays and the rest is divided by `factor`."""
    kept = kept.clamp(0, 1)
    return plain * kept + plain / factor * (1 - kept)


def _yarn_range(yarn: Yarn, config: ModelConfig) -> tuple[float, float]:
    """Return the pairs between which frequencies are blended, from the fast ones to the slow."""

    def pair_that_turns(times: float) -> float:
        per_turn = yarn.original_max_position_embeddings / (2 * math.pi * times)
        return config.rope_dim * math.log(per_turn) / (2 * math.log(config.rope_theta))

    fast = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    slow = min(math.ceil(pair_that_turns(yarn.beta_slow)), config.rope_dim - 1)
    return fast, slow if slow != fast else fast + 0.001  # as the original code does against a division by zero


def vector_factor(config: ModelConfig) -> float:
    """Return the factor on turned queries and keys: YaRN's, otherwise 1.

    Source: YaRN, section 3.4; with `mscale` DeepSeek's `DeepseekV2YarnRotaryEmbedding`.
    """
    yarn = config.rope_scaling
    if not isinstance(yarn, Yarn):
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def score_scale(config: ModelConfig) -> float:
    """Return the factor on a query's products with keys: 1 / sqrt(head), times DeepSeek's `mscale_all_dim` squared."""
    scale: float = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if config.attention == "mla" and isinstance(yarn, Yarn) and yarn.mscale_all_dim:
        scale *= _mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, weight: float) -> float:
    """Return what keeps the entropy of attention over a text `factor` times longer."""
    return 0.1 * weight * math.log(factor) + 1.0
