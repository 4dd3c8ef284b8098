"""What `ray-ds quantized` does with a QuantizedModel: look into it, check it, write it in floats."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ray_ds import storage
from ray_ds.artifacts import QuantizedModel
from ray_ds.config.import_hf import MAX_SHARD_BYTES
from ray_ds.errors import ConfigError
from ray_ds.model.checkpoint_folder import CONFIG_FILE, read_tensors
from ray_ds.model.local_folder import local_model_folder
from ray_ds.quantize.convert import dequantize_folder
from ray_ds.quantize.kernels import self_test
from ray_ds.quantize.layout import FORMATS, read_scheme
from ray_ds.quantize.loading import load_quantized, matrix_shapes

_KINDS = (
    ("embeddings", re.compile(r"embed_tokens\.weight|lm_head\.weight|shared_head\.head\.weight")),
    ("routed experts", re.compile(r"\.mlp\.experts\.")),
    ("shared experts", re.compile(r"\.mlp\.shared_experts\.")),
    ("routers", re.compile(r"\.mlp\.gate\.")),
    ("dense MLPs", re.compile(r"\.mlp\.")),
    ("norms", re.compile(r"norm\.weight")),
    ("attention", re.compile(r"\.self_attn\.")),
    ("others", re.compile("")),
)
"""Kinds of tensors, by the first pattern that a name on disk holds."""

MEASURES = ("smoothing", "perplexity", "perplexity_ratio", "kl", "top1_agreement", "tokens", "size_ratio")
"""Facts of the manifest that are shown; an artefact of an earlier version has some of them."""


def inspect_lines(artifact: QuantizedModel) -> list[str]:
    """Return what a model is made of: its scheme, sizes by kind of tensor, what the gates found, the worst weights."""
    with _folder(artifact) as folder:
        scheme = read_scheme(folder / CONFIG_FILE)
        sizes: dict[tuple[str, str], list[int]] = {}
        for name, tensor in read_tensors(folder).items():
            kind = next(kind for kind, pattern in _KINDS if pattern.search(name))
            sizes.setdefault((kind, str(tensor.dtype).removeprefix("torch.")), []).append(tensor.nbytes)
    total = sum(map(sum, sizes.values()))
    facts = artifact.manifest.facts
    lines = [f"scheme {scheme} ({FORMATS[scheme]})", "", "kind, type: tensors, bytes"]
    for (kind, dtype), parts in sorted(sizes.items(), key=lambda item: -sum(item[1])):
        lines.append(f"  {kind}, {dtype}: {len(parts):,}, {sum(parts):,} ({sum(parts) / total:.1%})")
    lines += [f"  all: {sum(map(len, sizes.values())):,}, {total:,}", "", "against the checkpoint"]
    lines += [f"  {name}: {facts[name]:.6g}" for name in MEASURES if name in facts]
    errors: Mapping[str, float] = facts.get("weight_errors", {})  # type: ignore[assignment]
    lines += ["", "largest relative errors of weights"] if errors else []
    return lines + [f"  {name}: {error:.4f}" for name, error in errors.items()]


def verify_lines(artifact: QuantizedModel) -> list[str]:
    """Check a model's files, layout and shapes, and this machine's kernels for its shapes; return what was found.

    Raises:
        ArtifactError: a file differs from its manifest; a tensor is missing, surplus, or has another shape or type.
    """
    artifact.verify_files()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _folder(artifact) as folder:
        scheme = read_scheme(folder / CONFIG_FILE)
        decoder = load_quantized(folder, device)
        kernels = self_test(device, matrix_shapes(decoder.config), scheme)
    lines = [
        f"files: {len(artifact.manifest.files)} have the sha256 of the manifest",
        f"layout: {FORMATS[scheme]}, every tensor of config.json in its shape and type",
        f"kernels: {kernels.road} is right for all shapes on {kernels.device}",
    ]
    return lines + [f"  {road} is not: {reason}" for road, reason in kernels.rejected.items()]


def dequantize(artifact: QuantizedModel, target: str, *, dtype: str) -> None:
    """Write the float checkpoint that a model stands for as a folder for transformers, experts included.

    Raises:
        ArtifactError: the model is damaged.
        ConfigError: the target is taken, or on an object store.
    """
    if storage.is_remote(target):
        raise ConfigError("--output", target, "must be a local folder", "copy it to its place afterwards")
    if storage.list_files(target):
        raise ConfigError("--output", target, "must be empty or absent", "choose another folder")
    artifact.verify_files()
    with _folder(artifact) as folder:
        dequantize_folder(folder, Path(target), dtype=getattr(torch, dtype), max_shard_bytes=MAX_SHARD_BYTES)


@contextmanager
def _folder(artifact: QuantizedModel) -> Iterator[Path]:
    """Give the artefact's `model/` on this machine."""
    with tempfile.TemporaryDirectory(prefix="ray_ds-quantized-") as scratch:
        yield local_model_folder(artifact, Path(scratch))
