"""Heads and inner widths divided over a group (Megatron, arXiv 1909.08053, section 3).

What goes into the divided weights is the same on all processes, and so is what comes out, a sum over the group; the
gradients of all other weights are whole on each process, but for norms that work on divided heads.
"""

from typing import Any

from torch import Tensor, nn

from ray_ds.model.block import Block
from ray_ds.model.decoder import Decoder
from ray_ds.model.grouped_attention import GroupedAttention
from ray_ds.model.latent_attention import LatentAttention
from ray_ds.model.layers import MLP
from ray_ds.train.parallel.cuts import Cut, cut
from ray_ds.train.parallel.exchange import collect, spread, summed
from ray_ds.train.parallel.mesh import Mesh


def divide_tensors(decoder: Decoder, mesh: Mesh) -> dict[str, Cut]:
    """Reduce each layer's weights to this process's part; return which are cut how, by name."""
    cuts: dict[str, Cut] = {}
    for name, block in decoder.named_modules():
        if isinstance(block, Block):
            assert isinstance(block.mlp, MLP), "settings refuse experts here"
            attention: Any = block.self_attn
            divide = _divide_latent if isinstance(attention, LatentAttention) else _divide_grouped
            found = {f"self_attn.{key}": value for key, value in divide(attention, mesh).items()}
            found |= {f"mlp.{key}": value for key, value in _divide_mlp(block.mlp, mesh).items()}
            cuts |= {f"{name}.{key}": value for key, value in found.items()}
    return cuts


def _divide_grouped(attention: GroupedAttention, mesh: Mesh) -> dict[str, Cut]:
    _spread_input(attention, mesh)
    if attention.norms_heads:
        for norm in (attention.q_norm, attention.k_norm):
            sum_gradient(norm.weight, mesh)
    return _cut_linears(attention, ("q_proj", "k_proj", "v_proj"), "o_proj", mesh)


def _divide_latent(attention: LatentAttention, mesh: Mesh) -> dict[str, Cut]:
    """Divide the heads; the latents are made whole on each process, and its heads give a part of their gradient."""
    query = "q_b_proj" if attention.compresses_query else "q_proj"
    _spread_input(getattr(attention, query), mesh)
    # Its output holds the key's turned part too, which goes to the heads beside `kv_b_proj`.
    attention.kv_a_proj_with_mqa.register_forward_hook(lambda module, args, out: spread(out, mesh))
    sum_gradient(attention.kv_a_layernorm.weight, mesh)
    attention.num_heads //= mesh.size
    return _cut_linears(attention, (query, "kv_b_proj"), "o_proj", mesh)


def _divide_mlp(mlp: MLP, mesh: Mesh) -> dict[str, Cut]:
    _spread_input(mlp, mesh)
    return _cut_linears(mlp, ("gate_proj", "up_proj"), "down_proj", mesh)


def _cut_linears(module: nn.Module, by_output: tuple[str, ...], by_input: str, mesh: Mesh) -> dict[str, Cut]:
    """Cut the projections to divided heads or widths by their outputs, and the one back by its inputs."""
    cuts: dict[str, Cut] = {}
    for name in by_output:
        for kind, parameter in module.get_submodule(name).named_parameters():
            cuts[f"{name}.{kind}"] = cut(parameter, 0, mesh)
    back = module.get_submodule(by_input)
    cuts[f"{by_input}.weight"] = cut(back.get_parameter("weight"), 1, mesh)
    back.register_forward_hook(lambda module, args, out: collect(out, mesh))
    return cuts


def _spread_input(module: nn.Module, mesh: Mesh) -> None:
    """Sum the gradient of a module's first argument over the group."""

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (spread(args[0], mesh), *args[1:])

    module.register_forward_pre_hook(enter)


def sum_gradient(parameter: nn.Parameter, mesh: Mesh) -> None:
    """Sum the gradient of a parameter that all processes of the group hold whole and use for different things."""

    def total(grad: Tensor) -> Tensor:
        return summed(grad, mesh)

    parameter.register_hook(total)  # type: ignore[no-untyped-call]
