"""Commands on a recipe: run it, as jobs or a stage here; show how far it is, what it says, and what it will cost."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from ray_ds.commands.options import AddParser, add_recipe, print_lines, read_recipe, whole_number
from ray_ds.job import find_step, run_step
from ray_ds.plan.command import add_options as add_plan_options
from ray_ds.plan.command import run_plan
from ray_ds.plan.devices import Fleet
from ray_ds.stage_table import STAGES, Stage, load_object


def add_commands(add: AddParser) -> None:
    """Add run, submit, status, show, plan and a command for each stage."""
    run = add("run", help="submit the steps in order; skip what is finished")
    run.set_defaults(run=_run)
    submit = add("submit", help="submit one step as a Ray job and follow its log")
    submit.add_argument("step", help="a step's name, or its stage's")
    submit.set_defaults(run=_submit)
    status = add("status", help="show the steps and which are finished")
    status.set_defaults(run=_status)
    show = add("show", help="show every setting, its value and where that came from")
    show.set_defaults(run=_show)
    plan = add("plan", help="tell memory, speed, time and cost of training; refuse what cannot fit")
    add_plan_options(plan)
    plan.set_defaults(run=_plan)
    for command in (run, submit):
        text = "times a job that broke off (exit status 75) is submitted again (default %(default)s)"
        command.add_argument("--retries", type=whole_number, default=0, metavar="N", help=text)
    for command in (run, submit, status, show, plan):
        add_recipe(command)
    for stage in STAGES:
        one = add(stage.name, help=f"run the stage here: {stage.writes} ({stage.resources})")
        one.add_argument("--step", help="which step, where several run this stage")
        add_recipe(one)
        one.set_defaults(run=partial(_run_here, stage))


def _run(options: argparse.Namespace) -> int:
    run_recipe: Callable[..., int] = load_object("ray_ds.pipeline:run_recipe")
    return run_recipe(read_recipe(options), options.root, options.overrides, retries=options.retries)


def _submit(options: argparse.Namespace) -> int:
    recipe = read_recipe(options)
    named = [step for step in recipe.steps if step.name == options.step]
    step = named[0] if named else recipe.step_of_stage(options.step)
    submit: Callable[..., int] = load_object("ray_ds.pipeline:submit_and_follow")
    return submit(recipe, step, options.root, options.overrides, retries=options.retries)


def _status(options: argparse.Namespace) -> int:
    return print_lines(load_object("ray_ds.report:status_lines")(read_recipe(options)))


def _show(options: argparse.Namespace) -> int:
    return print_lines(load_object("ray_ds.report:settings_lines")(read_recipe(options)))


def _plan(options: argparse.Namespace) -> int:
    def cluster_fleet(settings: Any) -> Fleet:
        load_object("ray_ds.on_ray.session:connect")()
        fleet: Fleet = load_object("ray_ds.on_ray.devices:cluster_fleet")(settings)
        return fleet

    return run_plan(read_recipe(options), options, cluster_fleet)


def _run_here(stage: Stage, options: argparse.Namespace) -> int:
    recipe = read_recipe(options)
    run_step(recipe, find_step(recipe, stage.name, options.step))
    return 0
