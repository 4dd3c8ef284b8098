"""What a person sees of a recipe: status, settings, the chain behind an artefact, and the summary of a run."""

import json
import os
from collections.abc import Iterator
from typing import Any, get_type_hints

from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import (
    KINDS,
    Artifact,
    Checkpoint,
    Corpus,
    Endpoint,
    EvalReport,
    QuantizedModel,
    ReferenceLogProbs,
    TeacherLogits,
    TokenShards,
    check_input,
    open_artifact,
)
from ray_ds.config.settings import digest_settings, field_docs
from ray_ds.errors import UserError
from ray_ds.logs import table_lines
from ray_ds.recipe import Recipe, Step, field_names
from ray_ds.stage_table import load_object
from ray_ds.steps import find_finished, step_uri

SUMMARY = "summary.json"
ANSWER_TOKENS = 48
ANSWER_TEMPERATURE = 0.7
"""A small model asked for its likeliest words repeats itself."""


def status_lines(recipe: Recipe) -> list[str]:
    """Return a table of the recipe's steps: whether each is finished, how long it took and where it is."""
    rows = [("step", "stage", "state", "seconds", "artefact")]
    for step in recipe.steps:
        state, seconds, uri = _step_state(recipe, step)
        rows.append((step.name, step.stage.name, state, seconds, uri))
    return table_lines(rows)


def _step_state(recipe: Recipe, step: Step) -> tuple[str, str, str]:
    try:
        uri = step_uri(recipe, step)
        finished = find_finished(recipe, step)
    except UserError as error:
        return "error", "-", str(error)
    if finished is not None:
        return "finished", f"{finished.manifest.seconds:.1f}", uri
    return ("begun" if storage.exists(uri) else "to do"), "-", uri


def settings_lines(recipe: Recipe) -> list[str]:
    """Return every field of every step with its value, where that came from, and the field's docstring."""
    lines = [f"recipe {recipe.name} ({recipe.path}), run_dir {recipe.run_dir}"]
    for step in recipe.steps:
        reads = " + ".join(" or ".join(group) for group in step.stage.reads) or "raw files"
        lines += ["", f"[{step.name}]  stage {step.stage.name}: {reads} -> {step.stage.writes}"]
        docs = dict(_nested_docs(step.settings))
        for name, value in field_names(step.settings):
            origins = (where for given, where in step.given.items() if f"{name}.".startswith(f"{given}."))
            lines.append(
                f"  {name} = {json.dumps(digest_settings(value), ensure_ascii=False)}  ({next(origins, 'default')})"
            )
            lines.append(f"      {docs.get(name, '')}")
    return lines


def _nested_docs(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted field, docstring) of nested settings."""
    hints = get_type_hints(type(settings))
    for name, doc in field_docs(type(settings)).items():
        yield f"{prefix}{name}", doc
        value = getattr(settings, name)
        if name in hints and hasattr(value, "__dataclass_fields__"):
            yield from _nested_docs(value, f"{prefix}{name}.")


def trace_lines(uri: str) -> list[str]:
    """Return the chain from an artefact back to the raw files it was made from, as an indented tree.

    An artefact that several others were made from is followed where it comes first.

    Raises:
        ArtifactError: an artefact of the chain is missing, damaged or was made anew from something else.
    """
    return list(_trace(open_artifact(uri.rstrip("/"), list(KINDS.values())), 0, set()))


def _trace(artifact: Artifact, depth: int, seen: set[str]) -> Iterator[str]:
    indent = "  " * depth
    manifest = artifact.manifest
    made_by = f"step {manifest.step}, ray_ds {manifest.package_version}"
    if artifact.uri in seen:
        yield f"{indent}{manifest.kind} {manifest.digest}  (above)"
        return
    seen.add(artifact.uri)
    yield f"{indent}{manifest.kind} {manifest.digest}  {made_by}  {artifact.uri}"
    for ref in manifest.inputs:
        found = open_artifact(ref.uri, [KINDS[ref.kind]])
        check_input(artifact.uri, ref, found)
        yield from _trace(found, depth + 1, seen)
    for source in manifest.sources:
        origin = f"sha256 {source.sha256[:16]}  {source.source}; {source.licence}"
        yield f"{indent}  file {source.uri}  {source.bytes} bytes  {origin}"


def write_summary(recipe: Recipe) -> dict[str, JsonValue]:
    """Gather the figures of a finished recipe, ask its endpoint a question, and write `summary.json`."""
    finished = [artifact for step in recipe.steps if (artifact := find_finished(recipe, step)) is not None]
    summary: dict[str, JsonValue] = {"recipe": recipe.name, "ray_ds": finished[-1].manifest.package_version}
    for artifact in finished:
        summary.update(_facts(artifact))
    summary["step_seconds"] = {artifact.manifest.step: artifact.manifest.seconds for artifact in finished}
    summary["artefacts"] = {artifact.manifest.step: artifact.uri for artifact in finished}
    serving = [step for step in recipe.steps if step.stage.writes == Endpoint.kind and find_finished(recipe, step)]
    if serving:
        summary["question"] = serving[-1].settings.question
        summary["answer"] = _ask(str(summary["endpoint"]), serving[-1].settings)
    data = json.dumps(summary, indent=1, ensure_ascii=False).encode() + b"\n"
    storage.write_bytes(storage.join(recipe.run_dir, SUMMARY), data)
    return summary


def _ask(url: str, settings: Any) -> str:
    """Return the endpoint's answer to the recipe's question."""
    api_key = os.environ.get(settings.api_key_env) if settings.api_key_env else None
    answer: str = load_object("ray_ds.serve.client:ask")(
        url, settings.question, max_tokens=ANSWER_TOKENS, temperature=ANSWER_TEMPERATURE, seed=0, api_key=api_key
    )
    return answer


def _facts(artifact: Artifact) -> dict[str, JsonValue]:
    """Return what one artefact adds to the summary."""
    facts: dict[str, Any] = dict(artifact.manifest.facts)
    match artifact:
        case Corpus():
            documents = facts["documents"]
            return {"documents": {**documents, "dropped": sum(documents["dropped"].values())}}
        case TokenShards():
            return {"tokens": facts["tokens"]}
        case Checkpoint():
            is_best = facts.get("model_step", facts.get("step")) != facts.get("step")
            shown = {name: facts[key] for name, key in _CHECKPOINT_FACTS.items() if key in facts}
            return shown | ({"best_step": facts["model_step"]} if is_best else {})
        case TeacherLogits():
            return {"teacher_logits_bytes": facts["bytes"]}
        case ReferenceLogProbs():
            return {"reference_log_probs_bytes": facts["bytes"]}
        case EvalReport() if facts["model_kind"] == Checkpoint.kind:
            scores = {"validation_bits_per_byte": facts["bits_per_byte"]}
            return scores | {name: facts[name] for name in _BASELINES if name in facts} | _task_scores(facts, "")
        case EvalReport():
            return {"int8_validation_bits_per_byte": facts["bits_per_byte"], **_task_scores(facts, "int8_")}
        case QuantizedModel():
            return {"int8_perplexity_ratio": facts["perplexity_ratio"], "int8_size_ratio": facts["size_ratio"]}
        case Endpoint():
            return {"endpoint": facts["url"]}
    return {}


def _task_scores(facts: dict[str, Any], prefix: str) -> dict[str, JsonValue]:
    """Return the scores of a report's tasks, as `capitals_accuracy`."""
    return {
        f"{prefix}{task}_{metric}": own["score"]
        for task, found in facts.get("tasks", {}).items()
        for metric, own in found["scores"].items()
    }


_BASELINES = ("xz_bits_per_byte", "unigram_bits_per_byte", "bigram_bits_per_byte")
_CHECKPOINT_FACTS = {"parameters": "parameters", "steps": "step", "tokens_per_s": "tokens_per_s"}


def summary_lines(recipe: Recipe, summary: dict[str, JsonValue]) -> list[str]:
    """Return the summary as a table for people."""
    rows = []
    for key, value in summary.items():
        if key in ("artefacts", "recipe", "ray_ds"):
            continue
        if isinstance(value, dict):
            text = ", ".join(f"{name} {_figure(item)}" for name, item in value.items())
        else:
            text = _figure(value)
        rows.append((key.replace("_", " "), text))
    if "bigram_bits_per_byte" in summary:
        rows.append(
            ("against the bigram", _distance(summary["validation_bits_per_byte"], summary["bigram_bits_per_byte"]))
        )
    rows.append(("summary", storage.join(recipe.run_dir, SUMMARY)))
    return ["", *table_lines(rows), ""]


def _distance(model: Any, bigram: Any) -> str:
    return f"{abs(model / bigram - 1):.1%} {'fewer' if model < bigram else 'more'} bits per byte than the bigram"


def _figure(value: JsonValue) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else " ".join(str(value).split())
