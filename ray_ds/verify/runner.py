"""Running checks one after the other: none of them can stop the others, and nothing of them stays behind."""

import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ray_ds.errors import UserError
from ray_ds.verify.context import CleanUp, Context
from ray_ds.verify.finding import Finding, Problem
from ray_ds.verify.on_nodes import headline

LEAST_S = 5.0
"""A check with less time than this is not begun."""
CLEAN_UP_S = 30.0
"""Longest that undoing what a check did may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A row of the table of checks."""

    name: str
    run: Callable[[Context], Finding]
    limit_s: float
    """Longest it may take."""
    shows: str
    """What it looks at, for people."""


def run_checks(
    checks: Sequence[Check], context: Context, on_finding: Callable[[Finding], None] = lambda finding: None
) -> list[Finding]:
    """Run checks in order and return what each of them found.

    Args:
        on_finding: called here as each of them ends.
    """
    findings = []
    for check in checks:
        left_s = context.left_s()
        finding = _run(check, context, left_s) if left_s >= LEAST_S else _not_run(check)
        findings.append(finding)
        on_finding(finding)
    return findings


def _not_run(check: Check) -> Finding:
    action = f"run it again with --only {check.name}, or with a greater --timeout-s"
    problem = Problem(wrong="not run: the checks before it took all the time", action=action)
    return Finding(name=check.name, outcome="failed", problems=(problem,))


def _run(check: Check, context: Context, left_s: float) -> Finding:
    """Run a check in a thread of its own, for as long as it has, and undo what it did."""
    clean_up = CleanUp()
    results: list[Finding] = []
    mine = dataclasses.replace(context, clean_up=clean_up)
    thread = threading.Thread(target=lambda: results.append(_guarded(check, mine)), daemon=True, name=check.name)
    started = time.monotonic()
    limit_s = min(check.limit_s, left_s)
    thread.start()
    try:
        thread.join(limit_s)
        finding = results[0] if results else _hung(check, thread, limit_s)
    finally:
        errors = _undo(clean_up)
    if errors:
        action = "look for what it left with `ray list actors`, `serve status` and in the run directory"
        problem = Problem(wrong=f"cleaning up failed: {'; '.join(errors)}", action=action)
        finding = dataclasses.replace(finding, outcome="failed", problems=(*finding.problems, problem))
    return dataclasses.replace(finding, seconds=round(time.monotonic() - started, 2))


def _guarded(check: Check, context: Context) -> Finding:
    """Return a check's finding; what it raises is one too."""
    try:
        return check.run(context)
    except UserError as error:
        problem = Problem(wrong=f"{error.field} ({error.value}) {error.allowed}", action=error.action)
        trace = traceback.format_exc()
    except BaseException as error:
        problem = Problem(wrong=f"the check broke off: {headline(error)}", action="see its trace in report.json")
        trace = traceback.format_exc()
    return Finding(name=check.name, outcome="failed", problems=(problem,), trace=trace)


def _hung(check: Check, thread: threading.Thread, limit_s: float) -> Finding:
    """Return the finding of a check that does not come to an end."""
    frame = sys._current_frames().get(thread.ident or 0)
    stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
    wrong = f"no end within {limit_s:.0f} s"
    action = "see in report.json where it stood; a cluster that is busy or too small makes checks wait"
    return Finding(name=check.name, outcome="failed", problems=(Problem(wrong=wrong, action=action),), trace=stack)


def _undo(clean_up: CleanUp) -> list[str]:
    """Undo what a check did; return what went wrong."""
    errors: list[str] = []
    thread = threading.Thread(target=lambda: errors.extend(clean_up.close()), daemon=True)
    thread.start()
    thread.join(CLEAN_UP_S)
    return [*errors, f"not done within {CLEAN_UP_S:g} s"] if thread.is_alive() else errors
