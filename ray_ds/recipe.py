"""The recipe: named steps in order, read from TOML."""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ds.artifacts import KINDS, open_artifact
from ray_ds.config.paths import absolute_path
from ray_ds.config.settings import decode_settings
from ray_ds.errors import ConfigError
from ray_ds.stage_table import STAGE_BY_NAME, Stage, find_stage, load_object


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a recipe: a stage with its settings, and where its inputs come from."""

    name: str
    stage: Stage
    settings: Any
    """An instance of the stage's settings class."""
    inputs: tuple["Step | str", ...]
    """For each group of kinds the stage reads: the step that makes it, or the URI of a finished artefact."""
    named: Mapping[str, "Step | str"]
    """The same for the further inputs that the step names by a key of their own, such as `init_from`."""
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
    if not isinstance(raw_steps, list) or not raw_steps or not all(isinstance(raw, dict) for raw in raw_steps):
        raise ConfigError(f"{path}: step", raw_steps, "must be one [[step]] table or more", "add the steps")
    for raw in raw_steps:
        _check_raw_step(raw, path)
    given = _apply_overrides(table, path, overrides)
    for field in ("name", "run_dir"):
        if not isinstance(table.get(field), str) or not table[field]:
            raise ConfigError(f"{path}: {field}", table.get(field), "must be a string", "add it to the recipe")
    run_dir = absolute_path(table["run_dir"], root, field=f"{path}: run_dir")
    steps: list[Step] = []
    for raw in raw_steps:
        steps.append(_decode_step(raw, path, root, steps, given))
    return Recipe(name=table["name"], run_dir=run_dir, path=path, steps=tuple(steps))


def recipe_of_one(stage: str, settings: Mapping[str, Any], *, run_dir: str) -> Recipe:
    """Return a recipe of one step that reads no artefact, for commands that need no file.

    Raises:
        ConfigError: a setting is wrong.
    """
    raw = {"stage": stage, "settings": dict(settings)}
    step = _decode_step(raw, "command line", None, [], {})
    return Recipe(name=stage, run_dir=run_dir, path="command line", steps=(step,))


def _check_raw_step(raw: Mapping[str, Any], path: str) -> None:
    """Refuse a step whose own fields are unknown, missing or mistyped."""
    where = f"{path}: {step_name(raw) or 'step'}"
    for field, kind, allowed in (
        ("name", str, "a string"),
        ("stage", str, "a string"),
        ("from", list, 'a list of step names, such as ["clean"]'),
        ("settings", dict, "a table"),
    ):
        if not isinstance(raw.get(field, kind()), kind):
            raise ConfigError(f"{where}.{field}", raw[field], f"must be {allowed}", "correct it")
    if not all(isinstance(source, str) for source in raw.get("from", [])):
        raise ConfigError(f"{where}.from", raw["from"], "must hold strings", "correct it")
    if "stage" not in raw:
        raise ConfigError(f"{where}.stage", "missing", f"must be one of {', '.join(STAGE_BY_NAME)}", "add it")
    known = ["name", "stage", "from", "settings", *(key for key, _ in find_stage(raw["stage"]).named)]
    for key in raw:
        if key not in known:
            allowed = f"must be {', '.join(known[:-1])} or {known[-1]}"
            raise ConfigError(f"{where}.{key}", "unknown", allowed, "correct or remove it")


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
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
    stage = find_stage(raw["stage"])
    if any(step.name == name for step in earlier) or not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"{where}.name", name, "must be letters, digits, - and _, used once", "choose another")
    settings = decode_settings(load_object(stage.settings), raw.get("settings", {}), where=where)
    if hasattr(settings, "with_root"):
        settings = settings.with_root(root, where=where)
    wanted = raw.get("from", ())
    inputs = tuple(_find_input(group, wanted, earlier, where, root) for group in stage.reads)
    _check_all_used(wanted, inputs, stage, where)
    named = {
        key: _find_named(raw[key], kinds, earlier, f"{where}.{key}", root) for key, kinds in stage.named if key in raw
    }
    if hasattr(settings, "check_named"):
        settings.check_named(frozenset(named), where=where)
    return Step(name=name, stage=stage, settings=settings, inputs=inputs, named=named, given=given.get(name, {}))


def _check_all_used(wanted: Sequence[str], inputs: Sequence["Step | str"], stage: Stage, where: str) -> None:
    """Refuse a source that no input of the step comes from."""
    used = {source.name for source in inputs if isinstance(source, Step)}
    for source in wanted:
        if "/" not in source and source not in used:
            kinds = ", ".join(" or ".join(group) for group in stage.reads) or "nothing"
            allowed = f"must make what stage {stage.name} reads, once each: {kinds}"
            raise ConfigError(f"{where}.from", source, allowed, "remove it, or name another step")


def _find_input(
    group: tuple[str, ...], wanted: Sequence[str], earlier: Sequence[Step], where: str, root: str | None
) -> Step | str:
    """Return the step or URI that `from` names for a group of kinds, else the latest earlier step that makes one."""
    known = {step.name: step for step in earlier}
    for source in wanted:
        if "/" in source:
            uri = absolute_path(source.rstrip("/"), root, field=f"{where}.from")
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


def _find_named(
    source: object, kinds: tuple[str, ...], earlier: Sequence[Step], field: str, root: str | None
) -> Step | str:
    """Return the earlier step or the URI that a key of a step names as an input."""
    allowed = f"must name an earlier step that makes a {' or '.join(kinds)}, or the folder of a finished one"
    if not isinstance(source, str):
        raise ConfigError(field, source, allowed, "write a string")
    if "/" in source:
        uri = absolute_path(source.rstrip("/"), root, field=field)
        kind = open_artifact(uri, list(KINDS.values())).kind
        if kind not in kinds:
            raise ConfigError(field, f"{source}, a {kind}", allowed, "correct it")
        return uri
    for step in earlier:
        if step.name == source and step.stage.writes in kinds:
            return step
    steps = ", ".join(step.name for step in earlier if step.stage.writes in kinds) or "none"
    raise ConfigError(field, source, f"{allowed}; such steps: {steps}", "correct it")


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
