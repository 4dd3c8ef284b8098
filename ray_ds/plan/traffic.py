"""What a worker sends and fetches in a step: gradients and weights, what groups exchange, and what lies on the host."""

from ray_ds.plan.case import Case
from ray_ds.plan.devices import Fleet

WIRE_FRACTION = 0.8
"""Assumed of a link's bandwidth that NCCL's rings reach."""
HOST_LINK_BYTES_PER_S = 25e9
"""Assumed between a GPU and its host with offload: PCIe 4.0 x16 in practice."""


def sending_s(case: Case, fleet: Fleet) -> float:
    """Return a step's seconds of sending between workers; a group's are neighbours."""
    copies = data_bytes(case) / fleet.wire_bandwidth(case.world_size)
    group = group_bytes(case) / fleet.wire_bandwidth(case.parallel.group_size)
    return (copies + group) / WIRE_FRACTION


def data_bytes(case: Case) -> float:
    """Return what a worker sends in a step to those with the same weights, in rings.

    ZeRO 0 and 1 reduce once a step, 2 in each micro-batch, all to every worker (`use_multi_rank_bucket_allreduce`);
    ZeRO 1 and 2 gather the weights once; 3 gathers them twice and scatters gradients in each micro-batch.
    """
    times = {
        0: 2,
        1: 2 + 1,
        2: 2 * case.micro_batches + 1,
        3: 3 * case.micro_batches,
    }[case.zero_stage]
    return times * _others(case.num_copies) * case.dtype_bytes * case.num_held_parameters


def group_bytes(case: Case) -> float:
    """Return what a worker sends in a step to its group, as `train.parallel` does; without the routers' scores.

    The forward pass runs twice where activations are recomputed, but for a layer's last sum: torch's checkpoint stops
    when it has what was not kept.
    """
    passes = 3 if case.recompute else 2
    tokens = case.micro_tokens * case.micro_batches
    match case.parallel.axis:
        case "tensor":  # sums over the group, in a ring
            sent = 2 * tokens * _summed_numbers(case)
        case "expert":  # rows to their experts and back, and the sums of all other weights' gradients
            rows = 2 * case.config.num_moe_layers * case.config.num_experts_per_tok * case.config.hidden_size
            shared = case.num_held_parameters - case.num_held_expert_parameters
            sent = tokens * rows * passes + 2 * case.micro_batches * shared
        case "sequence":  # queries, keys, values and what was gathered
            config = case.config
            queries = config.num_attention_heads * (config.qk_head_dim + config.value_head_dim)
            heads = config.num_key_value_heads if config.attention == "gqa" else config.num_attention_heads
            keys = heads * (config.qk_head_dim + config.value_head_dim)
            sent = tokens * _num_layers(case) * (queries + keys) * passes
        case None:
            return 0.0
    return sent * _others(case.parallel.group_size) * case.dtype_bytes


def host_bytes(case: Case) -> float:
    """Return what goes between a worker's device and its host in a step, both ways.

    Gradients in fp32 and weights once. ZeRO 2 adds up micro-batches on the host, through the device (DeepSpeed 0.19.8,
    stage_1_and_2.py `async_accumulate_grad_in_cpu_via_gpu`); offloaded weights are fetched for each pass.
    """
    if case.offload == "none":
        return 0.0
    share = case.num_held_parameters / case.num_copies
    times = 4.0 + case.dtype_bytes
    if case.zero_stage == 2 and case.micro_batches > 1:
        times += case.dtype_bytes * (2 * case.micro_batches - 1)
    if case.offload == "all":
        times += 2 * case.dtype_bytes * case.micro_batches
    return times * share


def _summed_numbers(case: Case) -> int:
    """Return the numbers of a token that are summed over a tensor group: in each layer, forth, back and again."""
    config = case.config
    into_attention = config.hidden_size
    if config.attention == "mla":
        into_attention = (config.q_lora_rank or config.hidden_size) + config.kv_lora_rank + config.qk_rope_head_dim
    forth, back = 2 * config.hidden_size, config.hidden_size + into_attention
    again = config.hidden_size if case.recompute else 0
    return _num_layers(case) * (forth + back + again)


def _num_layers(case: Case) -> int:
    return case.config.num_hidden_layers + case.config.num_nextn_predict_layers


def _others(size: int) -> float:
    """Return the part of the data that does not stay where it is, among `size` workers."""
    return (size - 1) / size
