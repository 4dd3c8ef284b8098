"""The recipe: named steps in order, read from TOML, and the one table of stages everything else follows from."""

import dataclasses
import importlib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import (
    KINDS,
    Artifact,
    Endpoint,
    SourceFile,
    StageRun,
    find_artifact,
    make_digest,
    open_artifact,
)
from ray_ds.config.paths import absolute_path
from ray_ds.config.settings import as_json, decode_settings, digest_settings
from ray_ds.errors import ArtifactError, ConfigError


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
        name="tokenizer",
        job="train_tokenizer",
        function="ray_ds.stages.tokenizer:train_tokenizer",
        settings="ray_ds.config.tokenizer:TokenizerSettings",
        reads=(("Corpus",),),
        writes="Tokenizer",
        version=1,
        resources="one task",
    ),
    Stage(
        name="tokenize",
        job="tokenize_text",
        function="ray_ds.stages.tokenize:tokenize",
        settings="ray_ds.config.tokenize:TokenizeSettings",
        reads=(("Corpus",), ("Tokenizer",)),
        writes="TokenShards",
        version=1,
        resources="Ray Data, all CPUs",
    ),
    Stage(
        name="train",
        job="train_model",
        function="ray_ds.stages.train:train",
        settings="ray_ds.config.train:TrainSettings",
        reads=(("TokenShards",),),
        writes="Checkpoint",
        version=1,
        resources="Ray Train, `num_workers` CPUs or GPUs",
    ),
    Stage(
        name="evaluate",
        job="evaluate_model",
        function="ray_ds.stages.evaluate:evaluate",
        settings="ray_ds.config.evaluate:EvaluateSettings",
        reads=(("Checkpoint", "QuantizedModel"), ("TokenShards",)),
        writes="EvalReport",
        version=1,
        resources="Ray tasks, `num_workers` CPUs or GPUs",
    ),
    Stage(
        name="quantize",
        job="quantize_model",
        function="ray_ds.stages.quantize:quantize",
        settings="ray_ds.config.quantize:QuantizeSettings",
        reads=(("Checkpoint",), ("TokenShards",)),
        writes="QuantizedModel",
        version=1,
        resources="one Ray task, 1 CPU or GPU",
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

_STAGE_BY_NAME: Mapping[str, Stage] = {stage.name: stage for stage in STAGES}


def find_stage(name: str) -> Stage:
    """Return a row of the table.

    Raises:
        ConfigError: there is no such stage.
    """
    if name not in _STAGE_BY_NAME:
        raise ConfigError("stage", name, f"must be one of {', '.join(_STAGE_BY_NAME)}", "correct it")
    return _STAGE_BY_NAME[name]


def load_object(spec: str) -> Any:
    """Return what a `module:name` string of the table names."""
    module, name = spec.split(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a recipe: a stage with its settings, and where its inputs come from."""

    name: str
    stage: Stage
    settings: Any
    """An instance of the stage's settings class."""
    inputs: tuple["Step | str", ...]
    """For each group of kinds the stage reads: the step that makes it, or the URI of a finished artefact."""
    given: Mapping[str, str]
    """Where each dotted setting that is not a default was given: `demo.toml` or `command line`."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A decoded recipe."""

    name: str
    run_dir: str
    path: str
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        """Return the step of that name.

        Raises:
            ConfigError: there is none.
        """
        for step in self.steps:
            if step.name == name:
                return step
        known = ", ".join(step.name for step in self.steps)
        raise ConfigError("step", name, f"must be one of the steps of {self.path}: {known}", "correct it")

    def step_of_stage(self, stage: str) -> Step:
        """Return the only step that runs a stage.

        Raises:
            ConfigError: the recipe has none, or several.
        """
        steps = [step for step in self.steps if step.stage.name == stage]
        if len(steps) == 1:
            return steps[0]
        names = ", ".join(step.name for step in steps) or "none"
        action = "name one with --step" if steps else "add the step to the recipe"
        raise ConfigError(f"{self.path}: steps of stage {stage}", names, "must be exactly one", action)


def load_recipe(path: str, *, overrides: Sequence[str] = (), root: str | None = None) -> Recipe:
    """Return the recipe in a TOML file.

    Args:
        overrides: `--step.field=value` and `--run_dir=value`, which win over the file.
        root: absolute folder that a relative `run_dir`, input or artefact is below; without it they are refused.
    Raises:
        ConfigError: the file or an override is wrong; the message names file, step, field, value and what is allowed.
    """
    table = _read_toml(path)
    unknown = set(table) - {"name", "run_dir", "step"}
    if unknown:
        raise ConfigError(f"{path}: {sorted(unknown)[0]}", "unknown", "must be name, run_dir or [[step]]", "remove it")
    raw_steps = table.get("step")
    if not isinstance(raw_steps, list) or not raw_steps:
        raise ConfigError(f"{path}: step", raw_steps, "must be one [[step]] table or more", "add the steps")
    given = _apply_overrides(table, path, overrides)
    for field in ("name", "run_dir"):
        if not isinstance(table.get(field), str) or not table[field]:
            raise ConfigError(f"{path}: {field}", table.get(field), "must be a string", "add it to the recipe")
    run_dir = absolute_path(table["run_dir"], root, field=f"{path}: run_dir")
    steps: list[Step] = []
    for raw in raw_steps:
        steps.append(_decode_step(raw, path, root, steps, given))
    return Recipe(name=table["name"], run_dir=run_dir, path=path, steps=tuple(steps))


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError("recipe", path, "must be a TOML file", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("recipe", path, f"must be valid TOML ({error})", "correct the file") from error


def step_name(raw: Mapping[str, Any]) -> str:
    """Return a step's name, which defaults to its stage."""
    return str(raw.get("name", raw.get("stage", "")))


def _apply_overrides(table: dict[str, Any], path: str, overrides: Sequence[str]) -> dict[str, dict[str, str]]:
    """Write overrides into the raw table; return step -> dotted field -> where it was given."""
    given = {
        step_name(raw): dict.fromkeys(_dotted(raw.get("settings", {})), Path(path).name)
        for raw in table["step"]
        if isinstance(raw, dict)
    }
    for override in overrides:
        name, separator, text = override.removeprefix("--").partition("=")
        if not separator or not override.startswith("--"):
            raise ConfigError("override", override, "must look like --step.field=value", "correct it")
        value = _parse_value(text)
        if name in ("run_dir", "run-dir"):
            table["run_dir"] = value
            continue
        step, _, field = name.partition(".")
        raw = next((raw for raw in table["step"] if step_name(raw) == step), None)
        if raw is None or not field:
            known = ", ".join(f"--{step_name(raw)}.FIELD=VALUE" for raw in table["step"])
            raise ConfigError("override", override, f"must start with a step's name: {known}", "correct it")
        _set_dotted(raw.setdefault("settings", {}), field, value, override)
        given[step][field] = "command line"
    return given


def _parse_value(text: str) -> Any:
    """Return a TOML value; text that is none stands for itself, so that strings need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set_dotted(table: dict[str, Any], field: str, value: Any, override: str) -> None:
    *parents, last = field.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError("override", override, f"must not go below {parent}, which is a plain value", "correct it")
    table[last] = value


def _dotted(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of all values of nested tables."""
    names: list[str] = []
    for key, value in table.items():
        nested = isinstance(value, dict)
        names += _dotted(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return names


def _decode_step(
    raw: Any, path: str, root: str | None, earlier: Sequence[Step], given: Mapping[str, Mapping[str, str]]
) -> Step:
    name = step_name(raw)
    where = f"{path}: {name or 'step'}"
    unknown = set(raw) - {"name", "stage", "from", "settings"}
    if unknown:
        field = f"{where}.{sorted(unknown)[0]}"
        raise ConfigError(field, "unknown", "must be name, stage, from or settings", "correct or remove it")
    if "stage" not in raw:
        raise ConfigError(f"{where}.stage", "missing", f"must be one of {', '.join(_STAGE_BY_NAME)}", "add it")
    stage = find_stage(raw["stage"])
    if any(step.name == name for step in earlier) or not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"{where}.name", name, "must be letters, digits, - and _, used once", "choose another")
    settings = decode_settings(load_object(stage.settings), raw.get("settings", {}), where=where)
    if hasattr(settings, "with_root"):
        settings = settings.with_root(root, where=where)
    inputs = tuple(_find_input(group, raw.get("from", ()), earlier, where, root) for group in stage.reads)
    return Step(name=name, stage=stage, settings=settings, inputs=inputs, given=given.get(name, {}))


def _find_input(
    group: tuple[str, ...], wanted: Sequence[str], earlier: Sequence[Step], where: str, root: str | None
) -> Step | str:
    """Return the step or URI that `from` names for a group of kinds, else the latest earlier step that makes one."""
    known = {step.name: step for step in earlier}
    for source in wanted:
        if "/" in source:
            uri = absolute_path(source, root, field=f"{where}.from")
            if open_artifact(uri, list(KINDS.values())).kind in group:
                return uri
        elif source not in known:
            names = ", ".join(known) or "none"
            raise ConfigError(f"{where}.from", source, f"must name earlier steps ({names}) or a folder", "correct it")
        elif known[source].stage.writes in group:
            return known[source]
    for step in reversed(earlier):
        if step.stage.writes in group:
            return step
    kinds = " or ".join(group)
    raise ConfigError(f"{where}.from", list(wanted), f"must name what makes a {kinds}", "add a step that makes one")


def step_digest(step: Step) -> str:
    """Return the digest that a step's artefact has, without running anything.

    Raises:
        InputError: raw input is missing or empty.
    """
    inputs = [step_digest(source) if isinstance(source, Step) else source.rsplit("/", 1)[-1] for source in step.inputs]
    content: dict[str, JsonValue] = {
        "stage": step.stage.name,
        "version": step.stage.version,
        "settings": digest_settings(step.settings),
        "inputs": list(inputs),
    }
    if step.stage.sources:
        find_sources: Callable[[Any], Sequence[SourceFile]] = load_object(step.stage.sources)
        content["sources"] = [[source.uri.rsplit("/", 1)[-1], source.sha256] for source in find_sources(step.settings)]
    return make_digest(content)


def step_uri(recipe: Recipe, step: Step) -> str:
    """Return the folder of a step's artefact, `<run_dir>/<step>/<digest>`."""
    return storage.join(recipe.run_dir, step.name, step_digest(step))


def find_finished(recipe: Recipe, step: Step) -> Artifact | None:
    """Return a step's finished artefact, or None; an Endpoint is finished only while it answers with its digest."""
    found = find_artifact(step_uri(recipe, step))
    if isinstance(found, Endpoint) and not load_object("ray_ds.serve.client:is_endpoint_alive")(found.manifest.facts):
        return None
    return found


def prepare_run(recipe: Recipe, step: Step) -> StageRun:
    """Return what a stage needs to run a step.

    Raises:
        ArtifactError: an input is unfinished or damaged.
    """
    inputs: list[Artifact] = []
    for source, group in zip(step.inputs, step.stage.reads, strict=True):
        kinds = [KINDS[kind] for kind in group]
        try:
            inputs.append(open_artifact(source if isinstance(source, str) else step_uri(recipe, source), kinds))
        except ArtifactError as error:
            if error.value == "no manifest" and isinstance(source, Step):
                raise _with_action(error, f"run step {source.name} first") from error
            raise
    digest = step_digest(step)
    return StageRun(
        step=step.name,
        stage=step.stage.name,
        stage_version=step.stage.version,
        kind=step.stage.writes,
        uri=storage.join(recipe.run_dir, step.name, digest),
        digest=digest,
        settings=as_json(step.settings),
        inputs=tuple(inputs),
    )


def _with_action(error: ArtifactError, action: str) -> ArtifactError:
    """Return the same error with another advice."""
    return ArtifactError(error.field, error.value, error.allowed, action)


def field_names(settings: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted name, value) of every field of nested settings, in order of declaration."""
    rows: list[tuple[str, Any]] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            rows += field_names(value, f"{prefix}{field.name}.")
        else:
            rows.append((f"{prefix}{field.name}", value))
    return rows
