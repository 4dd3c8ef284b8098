"""The command `ray-ds`, and `run_stage`, which every job in `jobs/` calls."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from ray_ds import __version__
from ray_ds.artifacts import KINDS, open_artifact
from ray_ds.config.arguments import ArgumentParser
from ray_ds.config.import_hf import MAX_SHARD_BYTES
from ray_ds.config.paths import absolute_path
from ray_ds.errors import (
    RETRYABLE_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    ConfigError,
    RayDsError,
    RetryableError,
    UserError,
)
from ray_ds.logs import log_event, setup_logging
from ray_ds.on_ray import NO_AUTO_CONNECT
from ray_ds.plan.command import add_options as add_plan_options
from ray_ds.plan.command import run_plan
from ray_ds.plan.devices import Fleet
from ray_ds.recipe import Recipe, Step, load_recipe
from ray_ds.stage_table import STAGES, load_object
from ray_ds.steps import find_finished, prepare_run
from ray_ds.verify.options import add_options


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `ray-ds` and exit: 0 done, 1 failed, 2 a user's mistake, 75 broken off: submit again to go on."""
    sys.exit(_guard(lambda: _dispatch(sys.argv[1:] if arguments is None else arguments)))


def run_stage(stage: str) -> NoReturn:
    """Run the job of a stage with the process's arguments and exit like `main`."""
    sys.exit(_guard(lambda: _run_stage(stage, sys.argv[1:], root=None)))


def run_all() -> NoReturn:
    """Run every unfinished step of a recipe in one job, in order, and exit like `main`."""
    sys.exit(_guard(_run_all))


def run_verify() -> NoReturn:
    """Run the checks of `ray-ds verify` in this job and exit: 0 nothing is wrong, 1 something is, 2 bad arguments."""
    status = _guard(lambda: int(load_object("ray_ds.verify.job:run")(sys.argv[1:])))
    load_object("ray_ds.verify.job:end")(status)
    raise AssertionError("unreachable")


def _run_all() -> int:
    parser = ArgumentParser(prog="python -m jobs.run_recipe")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--root", help="absolute folder that relative paths in the recipe are below")
    options, overrides = parser.parse_known_args()
    recipe = load_recipe(options.recipe, overrides=overrides, root=options.root)
    for step in recipe.steps:
        run_step(recipe, step)
    return 0


def _guard(action: Callable[[], int]) -> int:
    """Return an action's exit status, with the project's own errors printed in one line each."""
    setup_logging()
    os.environ.update(NO_AUTO_CONNECT)
    try:
        return action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE
    except RetryableError as error:
        print(f"broken off: {error}", file=sys.stderr, flush=True)
        return RETRYABLE_EXIT_CODE
    except RayDsError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of `ray-ds`."""
    parser = ArgumentParser(prog="ray-ds", description="From raw text to a served language model on a Ray cluster.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=ArgumentParser)
    run = commands.add_parser("run", help="submit the steps in order; skip what is finished")
    submit = commands.add_parser("submit", help="submit one step as a Ray job and follow its log")
    submit.add_argument("step", help="a step's name, or its stage's")
    status = commands.add_parser("status", help="show the steps and which are finished")
    show = commands.add_parser("show", help="show every setting, its value and where that came from")
    plan = commands.add_parser("plan", help="tell memory, speed, time and cost of training; refuse what cannot fit")
    add_plan_options(plan)
    for stage in STAGES:
        one = commands.add_parser(stage.name, help=f"run the stage here: {stage.writes} ({stage.resources})")
        one.add_argument("--step", help="which step, where several run this stage")
        _add_recipe(one)
    for command in (run, submit):
        text = "times a job that broke off (exit status 75) is submitted again (default %(default)s)"
        command.add_argument("--retries", type=_count, default=0, metavar="N", help=text)
    for command in (run, submit, status, show, plan):
        _add_recipe(command)
    trace = commands.add_parser("trace", help="show what an artefact was made from")
    trace.add_argument("artefacts", nargs="+", metavar="ARTEFACT", help="its folder")
    scores = commands.add_parser("scores", help="print an EvalReport's scores; with a second one, how it differs")
    scores.add_argument("reports", nargs="+", metavar="REPORT", help="folders of one report or two")
    generate = commands.add_parser("generate", help="ask the served model")
    generate.add_argument("prompt")
    generate.add_argument(
        "--url", default="http://127.0.0.1:8000", help="address of the endpoint (default %(default)s)"
    )
    generate.add_argument("--max-tokens", type=int, default=64, help="tokens to generate (default %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    verify = commands.add_parser("verify", help="check a cluster, as a job of at most 15 minutes, and write a report")
    add_options(verify)
    imports = commands.add_parser("import", help="take a model's folder in Hugging Face's layout as a Checkpoint")
    imports.add_argument("layout", choices=["hf"], help="hf: config.json, safetensors, tokenizer.json")
    imports.add_argument("path", help="the folder")
    imports.add_argument("--output", required=True, help="folder below which the artefact is made, as `run_dir` is")
    imports.add_argument("--source", help="where it comes from, for `ray-ds trace`")
    imports.add_argument("--licence", help="its licence, for `ray-ds trace`")
    export = commands.add_parser("export", help="write a Checkpoint for transformers and vLLM")
    export.add_argument("artefact", metavar="ARTEFACT", help="its folder")
    export.add_argument("--to", required=True, choices=["hf"], help="hf: Hugging Face's layout")
    export.add_argument("--output", required=True, help="folder that is made")
    export.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="of the weights (default: as it is)"
    )
    export.add_argument(
        "--max-shard-bytes", type=_count, default=MAX_SHARD_BYTES, help="size of a file at most (default %(default)s)"
    )
    sample = commands.add_parser("sample-text", help="write real text from installed packages as jsonl.gz")
    sample.add_argument("folder")
    chats = commands.add_parser("sample-chats", help="write questions and answers from installed packages as jsonl.gz")
    chats.add_argument("folder")
    tasks = commands.add_parser("sample-tasks", help="write questions with right answers, for evaluation, as jsonl")
    tasks.add_argument("folder")
    return parser


def _count(text: str) -> int:
    """Return a whole number that is not negative."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file; then overrides like --train.steps=100")
    parser.add_argument("--root", help="folder that relative paths in the recipe are below (default: this one)")


def _dispatch(arguments: Sequence[str]) -> int:
    options, rest = argument_parser().parse_known_args(arguments)
    if options.command not in _WITHOUT_RECIPE:
        options.root = str(Path(options.root or os.getcwd()).resolve())
    elif rest:
        raise ConfigError("arguments", rest[0], "must fit the usage", f"see ray-ds {options.command} --help")
    if options.command in {stage.name for stage in STAGES}:
        step = ["--step", options.step] if options.step else []
        return _run_stage(options.command, ["--recipe", options.recipe, *step, *rest], root=options.root)
    handler: Callable[[argparse.Namespace, Sequence[str]], int] = _COMMANDS[options.command]
    return handler(options, rest)


def _run_stage(stage: str, arguments: Sequence[str], root: str | None) -> int:
    parser = ArgumentParser(prog=f"python -m jobs.{next(row.job for row in STAGES if row.name == stage)}")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--root", default=root, help="absolute folder that relative paths in the recipe are below")
    parser.add_argument("--step")
    options, overrides = parser.parse_known_args(arguments)
    recipe = load_recipe(options.recipe, overrides=overrides, root=options.root)
    step = recipe.step(options.step) if options.step else recipe.step_of_stage(stage)
    if step.stage.name != stage:
        raise ConfigError("--step", step.name, f"must be a step of stage {stage}", "run the job of its own stage")
    run_step(recipe, step)
    return 0


def run_step(recipe: Recipe, step: Step) -> None:
    """Run one step in this process, which becomes the driver; a finished one is left alone.

    Raises:
        ClusterError: another job is at work on this step.
    """
    if _is_finished(recipe, step):
        return
    run = prepare_run(recipe, step)
    stage: Callable[[Any, Any], Any] = load_object(step.stage.function)
    load_object("ray_ds.on_ray.session:connect")()
    load_object("ray_ds.on_ray.stopping:end_on_sigterm")()
    with load_object("ray_ds.on_ray.run_lock:lock_run")(run.uri) as lock:
        if _is_finished(recipe, step):  # by a job that had the folder until now
            return
        log_event("started", step=step.name, uri=run.uri)
        artifact = stage(step.settings, replace(run, check_alone=lock.check))
    log_event("finished", step=step.name, uri=artifact.uri, seconds=artifact.manifest.seconds)


def _is_finished(recipe: Recipe, step: Step) -> bool:
    """Tell whether a step's artefact is finished, and say so."""
    if (finished := find_finished(recipe, step)) is None:
        return False
    log_event("skipped", step=step.name, reason="finished", uri=finished.uri)
    return True


def _load(options: argparse.Namespace, overrides: Sequence[str]) -> Recipe:
    return load_recipe(options.recipe, overrides=overrides, root=options.root)


def _run_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    run_recipe: Callable[..., int] = load_object("ray_ds.pipeline:run_recipe")
    return run_recipe(_load(options, overrides), options.root, overrides, retries=options.retries)


def _submit_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    recipe = _load(options, overrides)
    named = [step for step in recipe.steps if step.name == options.step]
    step = named[0] if named else recipe.step_of_stage(options.step)
    submit: Callable[..., int] = load_object("ray_ds.pipeline:submit_and_follow")
    return submit(recipe, step, options.root, overrides, retries=options.retries)


def _print_lines(lines: Sequence[str]) -> int:
    print("\n".join(lines))
    return 0


def _status_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    return _print_lines(load_object("ray_ds.report:status_lines")(_load(options, overrides)))


def _show_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    return _print_lines(load_object("ray_ds.report:settings_lines")(_load(options, overrides)))


def _plan_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    def cluster_fleet(settings: Any) -> Fleet:
        load_object("ray_ds.on_ray.session:connect")()
        fleet: Fleet = load_object("ray_ds.on_ray.devices:cluster_fleet")(settings)
        return fleet

    return run_plan(_load(options, overrides), options, cluster_fleet)


def _trace_command(options: argparse.Namespace, _: Sequence[str]) -> int:
    trace: Callable[[str], list[str]] = load_object("ray_ds.report:trace_lines")
    for artefact in options.artefacts:
        _print_lines(trace(absolute_path(artefact, os.getcwd(), field="artefact")))
    return 0


def _scores_command(options: argparse.Namespace, _: Sequence[str]) -> int:
    uris = [absolute_path(report, os.getcwd(), field="report") for report in options.reports]
    return _print_lines(load_object("ray_ds.evaluate.tables:scores_lines")(uris))


def _generate_command(options: argparse.Namespace, _: Sequence[str]) -> int:
    answer = load_object("ray_ds.serve.client:generate")(
        options.url,
        options.prompt,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        api_key=os.environ.get("RAY_DS_API_KEY"),
    )
    return _print_lines([answer])


def _verify_command(options: argparse.Namespace, _: Sequence[str]) -> int:
    submit: Callable[[argparse.Namespace], int] = load_object("ray_ds.verify.submission:submit")
    return submit(options)


def _import_command(options: argparse.Namespace, _: Sequence[str]) -> int:
    path, output = (
        absolute_path(value.rstrip("/"), os.getcwd(), field=field)
        for value, field in ((options.path, "path"), (options.output, "--output"))
    )
    given = {name: getattr(options, name) for name in ("source", "licence") if getattr(options, name) is not None}
    artifact = load_object("ray_ds.stages.import_hf:import_alone")(path, output, **given)
    # The folder comes last, for scripts: `$(ray-ds import ... | tail -1)`.
    return _print_lines(["Name it in the `from` of a step, or give it to `ray-ds export`:", artifact.uri])


def _export_command(options: argparse.Namespace, _: Sequence[str]) -> int:
    uri = absolute_path(options.artefact.rstrip("/"), os.getcwd(), field="artefact")
    artifact = open_artifact(uri, list(KINDS.values()))
    target = absolute_path(options.output.rstrip("/"), os.getcwd(), field="--output")
    load_object("ray_ds.exchange.export_folder:export_checkpoint")(
        artifact, target, dtype=options.dtype, max_shard_bytes=options.max_shard_bytes
    )
    return _print_lines([target])


def _sample_chats_command(options: argparse.Namespace, _: Sequence[str]) -> int:
    load_object("ray_ds.data.sample_chats:write_sample_chats")(str(Path(options.folder).resolve()))
    return 0


def _sample_tasks_command(options: argparse.Namespace, _: Sequence[str]) -> int:
    load_object("ray_ds.data.sample_tasks:write_sample_tasks")(str(Path(options.folder).resolve()))
    return 0


def _sample_text_command(options: argparse.Namespace, _: Sequence[str]) -> int:
    load_object("ray_ds.data.sample_text:write_sample_text")(str(Path(options.folder).resolve()))
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace, Sequence[str]], int]] = {
    "run": _run_command,
    "submit": _submit_command,
    "status": _status_command,
    "show": _show_command,
    "plan": _plan_command,
    "trace": _trace_command,
    "scores": _scores_command,
    "generate": _generate_command,
    "verify": _verify_command,
    "import": _import_command,
    "export": _export_command,
    "sample-text": _sample_text_command,
    "sample-chats": _sample_chats_command,
    "sample-tasks": _sample_tasks_command,
}
_WITHOUT_RECIPE = (
    "trace",
    "scores",
    "generate",
    "verify",
    "import",
    "export",
    "sample-text",
    "sample-chats",
    "sample-tasks",
)
