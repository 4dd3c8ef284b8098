"""The report of a verification: a line as each check ends, `report.json` and `report.md`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import JsonValue

from ray_ds import __version__, storage
from ray_ds.verify.context import Context
from ray_ds.verify.finding import Finding

SIGNS = {"passed": "ok", "failed": "FAILED", "not applicable": "n/a"}


def finding_lines(finding: Finding) -> list[str]:
    """Return a finding for a terminal: a line, then what is wrong and what to do."""
    head = f"{SIGNS[finding.outcome]:6}  {finding.name:12} {finding.seconds:6.1f} s  {_summary(finding)}"
    lines = [head.rstrip()]
    for problem in finding.problems:
        lines += [f"        wrong: {problem.wrong}", f"        do:    {problem.action}"]
    return lines + [f"        note:  {advice}" for advice in finding.advice]


def _summary(finding: Finding) -> str:
    """Return a finding's reason, or its plain figures."""
    if finding.reason:
        return finding.reason
    plain = {key: value for key, value in finding.figures.items() if isinstance(value, (int, float, str))}
    return ", ".join(f"{key.replace('_', ' ')} {_show(value)}" for key, value in plain.items())


def _show(value: JsonValue) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verdict(findings: Sequence[Finding]) -> str:
    """Return the verification's end in one sentence."""
    failed = [finding.name for finding in findings if finding.outcome == "failed"]
    passed = sum(finding.outcome == "passed" for finding in findings)
    absent = len(findings) - passed - len(failed)
    if not failed:
        return f"nothing is wrong: {passed} checks passed, {absent} do not apply"
    return f"something is wrong: {', '.join(failed)} failed; {passed} checks passed, {absent} do not apply"


def write_report(context: Context, findings: Sequence[Finding], facts: Mapping[str, JsonValue]) -> str:
    """Write both files into the verification's folder and return the URI of the one for people."""
    content = {
        "verdict": verdict(findings),
        "package_version": __version__,
        "run_dir": context.run_dir,
        "nodes": [asdict(node) for node in context.nodes],
        **facts,
        "findings": [asdict(finding) for finding in findings],
    }
    data = json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False).encode()
    storage.write_bytes(storage.join(context.folder, "report.json"), data + b"\n")
    page = storage.join(context.folder, "report.md")
    storage.write_bytes(page, "\n".join(_page(context, findings)).encode() + b"\n")
    return page


def _finite(value: Any) -> Any:
    """Return JSON values with those floats as words that JSON cannot write: inf, nan."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _page(context: Context, findings: Sequence[Finding]) -> list[str]:
    """Return the lines of report.md."""
    lines = ["# ray-ds verify", "", f"{verdict(findings)}.", "", f"Run directory: `{context.run_dir}`", ""]
    lines += ["| node | CPUs | GPUs |", "|---|---|---|"]
    lines += [f"| {node.name}{', head' * node.is_head} | {node.cpus:g} | {node.gpus:g} |" for node in context.nodes]
    lines += ["", "| check | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {finding.name} | {finding.outcome} | {finding.seconds:.1f} |" for finding in findings]
    for finding in findings:
        lines += ["", f"## {finding.name}: {finding.outcome}", ""]
        lines += [finding.reason, ""] if finding.reason else []
        for problem in finding.problems:
            lines += [f"- Wrong: {problem.wrong}", f"  - Do: {problem.action}"]
        lines += [f"- Note: {advice}" for advice in finding.advice]
        lines += ["", *_figure_lines(finding.figures)] if finding.figures else []
        lines += ["", "```", finding.trace.rstrip(), "```"] if finding.trace else []
    return lines


def _figure_lines(figures: Mapping[str, JsonValue]) -> list[str]:
    """Return figures as a Markdown table."""
    rows = [
        f"| {key.replace('_', ' ')} | {_show(value) if not isinstance(value, (dict, list)) else _compact(value)} |"
        for key, value in figures.items()
    ]
    return ["| figure | value |", "|---|---|", *rows]


def _compact(value: JsonValue) -> str:
    """Return nested figures in one line."""
    if isinstance(value, dict):
        return "<br>".join(f"{key}: {_compact(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_compact(item) for item in value)
    return _show(value)
