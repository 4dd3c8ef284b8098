"""What training starts from: a decoder with its first weights, inside the objective."""

import tempfile
from pathlib import Path

import torch

from ray_ds import storage
from ray_ds.artifacts import Checkpoint, TeacherLogits, open_artifact
from ray_ds.config.objective import Distill, Dpo
from ray_ds.errors import ConfigError
from ray_ds.model.balance import reset_expert_load
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.model.decoder import Decoder, LossWeights
from ray_ds.model.fp8 import to_fp8
from ray_ds.model.initial import init_weights
from ray_ds.model.local_folder import MODEL_FOLDER, local_model_folder
from ray_ds.train.distillation import DistillObjective
from ray_ds.train.lora import add_adapters
from ray_ds.train.objective import NextTokenObjective, Objective
from ray_ds.train.preference import DpoObjective, StoredDpoObjective
from ray_ds.train.stored_distillation import StoredDistillObjective
from ray_ds.train.task import TrainTask

FP8_CAPABILITY = (8, 9)
"""Compute capability from which on tensor cores multiply FP8: Ada and Hopper."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_objective(task: TrainTask, device: torch.device) -> Objective:
    """Return what the task minimises, the same on every process, its decoder in fp32 on the device.

    What is trained has no values yet, which a state to go on from, or `first_weights`, gives it; weights that adapters
    stand beside, and adapters, have.

    Raises:
        ArtifactError: a checkpoint that is started from, or asked, is damaged.
        ConfigError: an adapter's pattern names no layer.
    """
    settings = task.settings
    decoder = empty_decoder(task, device)
    if settings.lora is not None:
        decoder.load_state_dict(first_weights(task).state_dict())
    if settings.fp8:
        _check_fp8(device)
        to_fp8(decoder.model.layers, device)
    if settings.lora is not None:
        add_adapters(decoder, settings.lora, settings.seed)
    match settings.objective:
        case Dpo() as dpo:
            if task.reference_log_probs is not None:
                return StoredDpoObjective(decoder, dpo)
            assert task.init_from is not None, "the recipe was checked"
            return DpoObjective(decoder, dpo, _load_frozen(task.init_from, task, device))
        case Distill() as distill:
            if task.teacher_logits is not None:
                stored = open_artifact(task.teacher_logits, [TeacherLogits])
                return StoredDistillObjective(decoder, distill, stored.fact("vocab_size"))
            assert task.teacher is not None, "the recipe was checked"
            return DistillObjective(decoder, distill, _load_frozen(task.teacher, task, device))
        case _:
            return NextTokenObjective(decoder)


def empty_decoder(task: TrainTask, device: torch.device) -> Decoder:
    """Return the task's model in fp32, no value of its parameters set: torch's own first ones take seconds to draw."""
    settings = task.settings
    weights = LossWeights(prediction=settings.prediction_weight or 0.0, balance=settings.balance_weight or 0.0)
    with torch.device("meta"):
        decoder = Decoder(
            task.config,
            recompute_activations=settings.recompute_activations,
            kernels=settings.kernels,
            weights=weights,
        )
    decoder.to_empty(device=device)
    decoder.tie_embeddings()
    reset_expert_load(decoder)
    return decoder


def first_weights(task: TrainTask) -> Decoder:
    """Return a model with the weights that training starts from, in fp32 on the CPU, the same on every process.

    Raises:
        ArtifactError: the checkpoint that is started from is damaged.
    """
    if task.init_from is not None:
        return load_checkpoint(task.init_from, torch.float32, torch.device("cpu"))
    decoder = empty_decoder(task, torch.device("cpu"))
    init_weights(decoder, task.settings.seed)
    return decoder


def _check_fp8(device: torch.device) -> None:
    """Refuse a GPU without products in FP8."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        value = f"on a {torch.cuda.get_device_name(device)} of compute capability {capability[0]}.{capability[1]}"
        raise ConfigError("fp8", value, "must be on 8.9 or later", "remove it")


def _load_frozen(checkpoint: str, task: TrainTask, device: torch.device) -> Decoder:
    """Return a model that is only asked, in the type that training computes in."""
    decoder = load_checkpoint(checkpoint, DTYPES[task.settings.precision], device)
    return decoder.requires_grad_(False)


def load_checkpoint(checkpoint: str, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Return the model of a Checkpoint in evaluation mode."""
    if not storage.is_remote(checkpoint):
        folder = storage.local_path(storage.join(checkpoint, MODEL_FOLDER))
        return load_checkpoint_folder(folder, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory(prefix="ray_ds-start-") as cache:
        folder = local_model_folder(open_artifact(checkpoint, [Checkpoint]), Path(cache))
        return load_checkpoint_folder(folder, dtype=dtype, device=device)
