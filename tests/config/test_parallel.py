"""The table of what goes together, walked whole."""

import re
from operator import attrgetter
from typing import Any

import pytest

from ray_ds.config.model_settings import ModelSettings
from ray_ds.config.objective import Dpo, Lora
from ray_ds.config.optimizer import AdamW, Muon
from ray_ds.config.parallel import AXES, Choice, Parallel, all_choices, refusal, support_table
from ray_ds.config.train import TrainSettings
from ray_ds.errors import ConfigError

GQA = {"attention": "gqa", "num_key_value_heads": 2, "head_dim": 8}


def settings_of(choice: Choice, **changes: Any) -> TrainSettings:
    """Return settings for a cell of the table."""
    model: dict[str, Any] = {"preset": "tiny", "num_attention_heads": 4} | (GQA if choice.attention == "gqa" else {})
    if not choice.has_experts:
        model["n_routed_experts"] = 0
    kinds = {"adamw": AdamW, "muon": Muon}
    fields: dict[str, Any] = {
        "model": ModelSettings(**model),
        "seq_len": 16,
        "batch_tokens": 256,
        "micro_batch": 2,
        "steps": 200,
        "num_workers": 4,
        "zero_stage": choice.zero_stage,
        "offload": choice.offload,
        "precision": choice.precision,
        "optimizer": kinds[choice.optimizer](kind=choice.optimizer),  # type: ignore[arg-type]
        "gradient_clipping": 0.0,
        "compile": choice.is_compiled,
        "parallel": Parallel(**dict.fromkeys(choice.axes, 2)),
    }
    return TrainSettings(**{**fields, **changes})


def cell(**changes: Any) -> Choice:
    base = {"axes": (), "zero_stage": 1, "offload": "none", "precision": "bf16", "optimizer": "adamw"}
    return Choice(**{**base, "attention": "mla", "has_experts": False, **changes})


@pytest.mark.shows("Each of 2,016 combinations of ZeRO, offload, groups, types and models is taken or refused by name")
def test_settings_take_and_refuse_what_the_table_does() -> None:
    refused = 0
    for choice in all_choices():
        rule = refusal(choice)
        if rule is None:
            settings = settings_of(choice)
            assert settings.parallel.axis == (choice.axes[0] if choice.axes else None)
            continue
        refused += 1
        with pytest.raises(ConfigError) as caught:
            settings_of(choice)
        assert caught.value.field == rule.field, choice
        assert (caught.value.allowed, caught.value.action) == (rule.allowed, rule.action)
    assert 0 < refused < len(list(all_choices())) == 2016


def test_every_rule_is_the_first_to_refuse_something_and_names_a_setting() -> None:
    from ray_ds.config.parallel import RULES

    more: list[dict[str, Any]] = [{"is_compiled": True}, {"is_fp8": True}, {"objective": "dpo"}, {"has_adapters": True}]
    found = {id(refusal(choice)) for choice in (*all_choices(), *(cell(axes=("sequence",), **one) for one in more))}
    settings = settings_of(cell(), lora=Lora(rank=2))
    for rule in RULES:
        assert id(rule) in found, rule.allowed
        attrgetter(rule.field)(settings)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            cell(axes=("tensor",), zero_stage=3),
            "zero_stage (3) must be 0, 1 or 2 with parallel.tensor and parallel.expert: ZeRO 3 would gather "
            "weights that differ within a group as if they were one; use 2, or parallel.sequence.",
        ),
        (
            cell(axes=("tensor", "sequence")),
            "parallel (['tensor', 'sequence']) must have one field above 1 at most: a process is in one group; "
            "keep the one that saves the most memory.",
        ),
        (
            cell(axes=("tensor",), has_experts=True),
            "parallel.tensor (2) must be 1 in a model with experts, most of whose weights it would leave whole; "
            "use parallel.expert.",
        ),
        (
            cell(axes=("expert",)),
            "parallel.expert (2) has no effect in a dense model; remove it, or use parallel.tensor.",
        ),
        (
            cell(offload="all", zero_stage=2),
            "offload (all) must be none or optimizer below ZeRO 3, where every process computes with all of its "
            "weights; use optimizer, or zero_stage 3.",
        ),
        (
            cell(offload="optimizer", zero_stage=0),
            "offload (optimizer) has no effect in ZeRO 0; remove it, or use zero_stage 1, 2 or 3.",
        ),
        (
            cell(axes=("sequence",), is_compiled=True),
            "compile (True) must be off in groups: the exchanges between processes break the graph in every "
            "layer; remove it.",
        ),
    ],
)
def test_refusals_say_what_to_do(choice: Choice, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        settings_of(choice)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parallel": Parallel(tensor=3), "num_workers": 3},
            "parallel.tensor (3) must divide num_attention_heads (4); correct one of them.",
        ),
        (
            {
                "parallel": Parallel(tensor=4),
                "model": ModelSettings(preset="tiny", n_routed_experts=0, num_attention_heads=4, **GQA),
            },
            "parallel.tensor (4) must divide num_key_value_heads (2); correct one of them.",
        ),
        (
            {"parallel": Parallel(sequence=4), "seq_len": 18, "batch_tokens": 288},
            "parallel.sequence (4) must divide seq_len (18); correct one of them.",
        ),
        (
            {"parallel": Parallel(sequence=2), "num_workers": 3},
            "num_workers (3) must be whole groups of 2, the product of parallel; correct it.",
        ),
        (
            {"parallel": Parallel(sequence=2), "num_workers": (2, 8), "allowed_workers": (2, 5)},
            "allowed_workers ([2, 5]) must be whole groups of 2, the product of parallel; correct it.",
        ),
        (
            {"parallel": Parallel(sequence=2), "num_workers": (2, 8), "scaling": "stock"},
            "scaling (stock) must be graceful in groups: Ray Train's own policy knows no whole groups; remove it.",
        ),
        (
            {"parallel": Parallel(sequence=2), "objective": Dpo(kind="dpo")},
            "objective.kind (dpo) must be next_token in groups: a second model or whole rows' logits would have "
            "to be divided too; remove parallel.",
        ),
        (
            {"parallel": Parallel(tensor=2), "lora": Lora(rank=2)},
            "lora.rank (2) must be absent in groups: adapters beside divided weights would have to be divided "
            "too; remove parallel, or lora.",
        ),
        (
            {"parallel": Parallel(tensor=2), "num_workers": 18},
            "num_workers (18) must be at most 16, the micro-batches of a step (batch_tokens / 32) times 2; ask "
            "for fewer workers or larger batches.",
        ),
    ],
)
def test_sizes_that_leave_a_remainder_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        settings_of(cell(), **changes)


def test_only_whole_groups_may_join() -> None:
    assert settings_of(cell(), num_workers=(2, 8)).worker_sizes is None
    assert settings_of(cell(), parallel=Parallel(tensor=2), num_workers=(2, 8)).worker_sizes == (2, 4, 6, 8)
    chosen = settings_of(cell(), parallel=Parallel(tensor=2), num_workers=(2, 8), allowed_workers=(4, 8))
    assert chosen.worker_sizes == (4, 8)


def test_groups_share_rows_weights_or_neither() -> None:
    shares = {axis: (Parallel(**{axis: 4}).rows_shared_by, Parallel(**{axis: 4}).held_by) for axis in AXES}
    assert shares == {"tensor": (4, 4), "expert": (1, 4), "sequence": (4, 1)}


def test_table_for_the_readme() -> None:
    head, _, *rows = ([part.strip() for part in line.split("|")[1:-1]] for line in support_table().splitlines())
    assert head == ["divided over processes", "ZeRO", "offload", "precision", "optimizer", "model", "elastic"]
    offloads = {3: "optimizer (ZeRO 1, 2, 3); all (ZeRO 3)", 2: "optimizer (ZeRO 1, 2)"}
    both, types, all_types = "dense, experts; MLA, GQA", "fp32, bf16", "fp32, bf16, fp16"
    assert rows == [
        ["rows alone (data)", "0, 1, 2, 3", offloads[3], all_types, "adamw, muon", both, "number of workers"],
        ["tensor", "0, 1, 2", offloads[2], types, "adamw", "dense; MLA, GQA", "number of groups"],
        ["expert", "0, 1, 2", offloads[2], types, "adamw", "experts; MLA, GQA", "number of groups"],
        ["sequence", "0, 1, 2, 3", offloads[3], types, "adamw, muon", both, "number of groups"],
    ]
