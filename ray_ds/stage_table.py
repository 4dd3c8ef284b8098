"""The one table of stages, from which jobs, subcommands, order, skipping and the README's table all follow."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A row of the table of stages. Code is named by strings, so that reading the table loads none of it."""

    name: str
    job: str
    """The module in `jobs/` that runs it."""
    function: str
    """`module:function`, called with (settings, StageRun)."""
    settings: str
    """`module:class` of its settings."""
    reads: tuple[tuple[str, ...], ...]
    """The kinds it reads; of each group, one."""
    writes: str
    version: int
    """Raised when a change of the code changes what it writes."""
    resources: str
    """What it uses, for people."""
    named: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Further inputs, read only where a step names them: the step's key for one, such as `init_from`, and its kinds."""
    sources: str = ""
    """`module:function` from settings to the raw files it reads, for stages that read raw files."""


STAGES: tuple[Stage, ...] = (
    Stage(
        name="clean",
        job="clean_text",
        function="ray_ds.stages.clean:clean",
        settings="ray_ds.config.clean:CleanSettings",
        reads=(),
        writes="Corpus",
        version=1,
        resources="Ray Data, all CPUs",
        sources="ray_ds.data.units:fingerprint_inputs",
    ),
    Stage(
        name="import_hf",
        job="import_model",
        function="ray_ds.stages.import_hf:import_hf",
        settings="ray_ds.config.import_hf:ImportSettings",
        reads=(),
        writes="Checkpoint",
        version=1,
        resources="one process",
        sources="ray_ds.exchange.sources:fingerprint",
    ),
    Stage(
        name="tokenizer",
        job="train_tokenizer",
        function="ray_ds.stages.tokenizer:train_tokenizer",
        settings="ray_ds.config.tokenizer:TokenizerSettings",
        reads=(("Corpus",),),
        writes="Tokenizer",
        version=2,
        resources="one task",
    ),
    Stage(
        name="tokenize",
        job="tokenize_text",
        function="ray_ds.stages.tokenize:tokenize",
        settings="ray_ds.config.tokenize:TokenizeSettings",
        reads=(("Corpus",), ("Tokenizer", "Checkpoint")),
        writes="TokenShards",
        version=2,
        resources="Ray Data, all CPUs",
    ),
    Stage(
        name="tokenize_chat",
        job="tokenize_chat",
        function="ray_ds.stages.tokenize_chat:tokenize_chat",
        settings="ray_ds.config.tokenize_chat:TokenizeChatSettings",
        reads=(("Tokenizer",),),
        writes="TokenShards",
        version=1,
        resources="Ray Data, all CPUs",
        sources="ray_ds.data.conversations:find_sources",
    ),
    Stage(
        name="teacher_logits",
        job="store_teacher_logits",
        function="ray_ds.stages.teacher_logits:store_teacher_logits",
        settings="ray_ds.config.teacher_logits:TeacherLogitsSettings",
        reads=(("Checkpoint",), ("TokenShards",)),
        writes="TeacherLogits",
        version=1,
        resources="Ray Data, all CPUs or GPUs",
    ),
    Stage(
        name="reference_log_probs",
        job="store_reference_log_probs",
        function="ray_ds.stages.reference_log_probs:store_reference_log_probs",
        settings="ray_ds.config.reference_log_probs:ReferenceLogProbsSettings",
        reads=(("Checkpoint",), ("TokenShards",)),
        writes="ReferenceLogProbs",
        version=1,
        resources="Ray Data, all CPUs or GPUs",
    ),
    Stage(
        name="train",
        job="train_model",
        function="ray_ds.stages.train:train",
        settings="ray_ds.config.train:TrainSettings",
        reads=(("TokenShards",),),
        named=(
            ("init_from", ("Checkpoint",)),
            ("teacher", ("Checkpoint", "TeacherLogits")),
            ("reference", ("ReferenceLogProbs",)),
        ),
        writes="Checkpoint",
        version=2,
        resources="Ray Train, `num_workers` CPUs or GPUs",
    ),
    Stage(
        name="evaluate",
        job="evaluate_model",
        function="ray_ds.stages.evaluate:evaluate",
        settings="ray_ds.config.evaluate:EvaluateSettings",
        reads=(("Checkpoint", "QuantizedModel"), ("TokenShards",)),
        writes="EvalReport",
        version=3,
        resources="Ray tasks, `num_workers` CPUs or GPUs",
        sources="ray_ds.evaluate.task_files:fingerprint_tasks",
    ),
    Stage(
        name="quantize",
        job="quantize_model",
        function="ray_ds.stages.quantize:quantize",
        settings="ray_ds.config.quantize:QuantizeSettings",
        reads=(("Checkpoint",), ("TokenShards",)),
        writes="QuantizedModel",
        version=2,
        resources="Ray tasks, `num_workers` CPUs or GPUs",
    ),
    Stage(
        name="serve",
        job="serve_model",
        function="ray_ds.stages.serve:serve",
        settings="ray_ds.config.serve:ServeSettings",
        reads=(("QuantizedModel", "Checkpoint"),),
        writes="Endpoint",
        version=1,
        resources="Ray Serve, 1 CPU or GPU a replica",
    ),
)

STAGE_BY_NAME: Mapping[str, Stage] = {stage.name: stage for stage in STAGES}


def find_stage(name: str) -> Stage:
    """Return a row of the table.

    Raises:
        ConfigError: there is no such stage.
    """
    if name not in STAGE_BY_NAME:
        raise ConfigError("stage", name, f"must be one of {', '.join(STAGE_BY_NAME)}", "correct it")
    return STAGE_BY_NAME[name]


def load_object(spec: str) -> Any:
    """Return what a `module:name` string of the table names."""
    module, name = spec.split(":")
    return getattr(importlib.import_module(module), name)
