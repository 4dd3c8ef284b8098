"""Running checks: none of them stops the others, what they did is undone, and the exit status says what was found."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_ds import storage
from ray_ds.errors import ClusterError, ConfigError
from ray_ds.verify import job
from ray_ds.verify.checks import CHECKS, choose_checks
from ray_ds.verify.context import ClusterNode, Context
from ray_ds.verify.finding import Finding, Problem, judged, not_applicable
from ray_ds.verify.options import VerifyOptions
from ray_ds.verify.report import finding_lines, verdict, write_report
from ray_ds.verify.runner import Check, run_checks

NODE = ClusterNode(node_id="abcdef0123456789", address="10.0.0.7", cpus=4, gpus=1, is_head=True)


def make_context(folder: Path, left_s: float = 100.0) -> Context:
    return Context(
        run_dir=str(folder),
        folder=str(folder / "verify" / "one"),
        nodes=(NODE,),
        gpus=0,
        ends_at=time.monotonic() + left_s,
    )


def make_check(name: str, run: Callable[[Context], Finding], limit_s: float = 30.0) -> Check:
    return Check(name=name, run=run, limit_s=limit_s, shows="")


def passes(name: str) -> Check:
    return make_check(name, lambda context: judged(name, {"speed": 1.5, "by_node": {"a": 1}}, []))


def raises(name: str, error: BaseException) -> Check:
    def run(context: Context) -> Finding:
        raise error

    return make_check(name, run)


def test_a_check_that_raises_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    seen: list[str] = []
    checks = [raises("first", RuntimeError("one\nthe last line")), passes("second")]
    first, second = run_checks(checks, make_context(tmp_path), lambda finding: seen.append(finding.name))
    assert (first.outcome, second.outcome, seen) == ("failed", "passed", ["first", "second"])
    assert first.problems[0].wrong == "the check broke off: RuntimeError: the last line"
    assert "RuntimeError" in first.trace and "in run" in first.trace


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_check_that_wants_to_end_the_process_does_not(tmp_path: Path, error: BaseException) -> None:
    findings = run_checks([raises("first", error), passes("second")], make_context(tmp_path))
    assert [finding.outcome for finding in findings] == ["failed", "passed"]


def test_a_user_error_says_its_own_action(tmp_path: Path) -> None:
    error = ClusterError("num_workers", 4, "must fit the cluster", "lower it")
    (finding,) = run_checks([raises("first", error)], make_context(tmp_path))
    assert finding.problems == (Problem(wrong="num_workers (4) must fit the cluster", action="lower it"),)


def test_a_check_that_hangs_is_given_up_undone_and_shows_where_it_stood(tmp_path: Path) -> None:
    undone: list[str] = []

    def hang_here(context: Context) -> Finding:
        context.clean_up.add(lambda: undone.append("first"))
        context.clean_up.add(lambda: undone.append("second"))
        time.sleep(20)
        return judged("hangs", {}, [])

    started = time.monotonic()
    hung, after = run_checks([make_check("hangs", hang_here, limit_s=0.5), passes("after")], make_context(tmp_path))
    assert time.monotonic() - started < 10
    assert (hung.outcome, after.outcome) == ("failed", "passed")
    assert hung.problems[0].wrong.startswith("no end within") and "hang_here" in hung.trace
    assert undone == ["second", "first"]


def test_what_a_check_registers_after_it_was_given_up_is_undone_at_once(tmp_path: Path) -> None:
    undone: list[str] = []

    def late(context: Context) -> Finding:
        time.sleep(1.0)
        context.clean_up.add(lambda: undone.append("late"))
        return judged("late", {}, [])

    run_checks([make_check("late", late, limit_s=0.2)], make_context(tmp_path))
    assert undone == []
    deadline = time.monotonic() + 10
    while not undone and time.monotonic() < deadline:
        time.sleep(0.05)
    assert undone == ["late"]


def test_cleaning_up_that_fails_fails_the_check_and_the_rest_is_undone(tmp_path: Path) -> None:
    undone: list[str] = []

    def run(context: Context) -> Finding:
        context.clean_up.add(lambda: undone.append("other"))
        context.clean_up.add(lambda: [][0])  # raises IndexError
        return judged("dirty", {}, [])

    (finding,) = run_checks([make_check("dirty", run)], make_context(tmp_path))
    assert finding.outcome == "failed" and "cleaning up failed: IndexError" in finding.problems[0].wrong
    assert undone == ["other"]


def test_without_time_a_check_is_not_begun_and_does_not_pass(tmp_path: Path) -> None:
    (finding,) = run_checks([passes("first")], make_context(tmp_path, left_s=1.0))
    assert finding.outcome == "failed" and "--only first" in finding.problems[0].action


def some_findings(context: Context) -> list[Finding]:
    absent = make_check("absent", lambda context: not_applicable("absent", "no GPU here"))
    return run_checks([passes("good"), absent, raises("bad", RuntimeError("boom"))], context)


def test_the_reports_files_say_what_is_wrong_and_what_to_do(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    findings = some_findings(context)
    page = write_report(context, findings, {"seconds": 12.5})
    content = json.loads((tmp_path / "verify/one/report.json").read_text())
    assert page == str(tmp_path / "verify/one/report.md")
    assert content["verdict"] == verdict(findings) == "something is wrong: bad failed; 1 checks passed, 1 do not apply"
    assert (content["seconds"], content["nodes"][0]["address"]) == (12.5, "10.0.0.7")
    assert [finding["outcome"] for finding in content["findings"]] == ["passed", "not applicable", "failed"]
    assert content["findings"][0]["figures"] == {"speed": 1.5, "by_node": {"a": 1}}
    text = Path(page).read_text()
    assert "- Wrong: the check broke off: RuntimeError: boom" in text and "  - Do: see its trace" in text
    assert "no GPU here" in text and "| speed | 1.5 |" in text and "10.0.0.7 (abcdef01), head" in text
    assert "Traceback" in text


def test_the_report_is_json_also_where_a_figure_is_no_number(tmp_path: Path) -> None:
    finding = judged("one", {"difference": float("inf"), "by_run": {"a": float("nan")}}, [])
    write_report(make_context(tmp_path), [finding], {})
    text = (tmp_path / "verify/one/report.json").read_text()
    figures = json.loads(text, parse_constant=lambda word: pytest.fail(word))["findings"][0]["figures"]
    assert figures == {"difference": "inf", "by_run": {"a": "nan"}}


def test_lines_for_a_terminal(tmp_path: Path) -> None:
    good, absent, bad = some_findings(make_context(tmp_path))
    assert finding_lines(good)[0].startswith("ok      good") and finding_lines(good)[0].endswith("speed 1.5")
    assert finding_lines(absent)[0].startswith("n/a     absent") and finding_lines(absent)[0].endswith("no GPU here")
    assert [line[:15] for line in finding_lines(bad)] == ["FAILED  bad    ", "        wrong: ", "        do:    "]


@pytest.mark.parametrize(("outcome", "status"), [("passed", 0), ("not applicable", 0), ("failed", 1)])
def test_exit_status_and_nothing_but_the_report_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outcome: str, status: int
) -> None:
    def run(context: Context) -> Finding:
        storage.write_bytes(context.work("left.txt"), b"left")
        if outcome == "not applicable":
            return not_applicable("one", "no such thing")
        return judged("one", {}, [Problem(wrong="w", action="a")] if outcome == "failed" else [])

    context = make_context(tmp_path)
    monkeypatch.setattr(job, "connect", lambda: None)
    monkeypatch.setattr(job, "end_on_sigterm", lambda: None)
    monkeypatch.setattr(job, "choose_checks", lambda only, skip: (make_check("one", run),))
    monkeypatch.setattr(job, "make_context", lambda run_dir, options, started: context)
    assert job.run(["--run_dir", str(tmp_path)]) == status
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["verify/one/report.json", "verify/one/report.md"]
    assert "report.md" in capsys.readouterr().out.splitlines()[-1]


def test_checks_are_chosen_by_name() -> None:
    assert [check.name for check in choose_checks((), ())] == [check.name for check in CHECKS]
    assert [check.name for check in choose_checks(("serving", "versions"), ())] == ["versions", "serving"]
    assert "kill" not in [check.name for check in choose_checks((), ("kill",))]
    with pytest.raises(ConfigError, match=r"--only \(gpus\) must be some of versions, .*serving"):
        choose_checks(("gpus",), ())
    with pytest.raises(ConfigError, match="must leave a check to run"):
        choose_checks(("kill",), ("kill",))


def test_options_reach_the_job_as_they_were_given() -> None:
    options = VerifyOptions(run_dir="/runs", only=("kill", "join"), skip=(), gpus=None, timeout_s=600.0)
    assert options.arguments() == ["--run_dir", "/runs", "--only", "kill,join", "--gpus", "auto", "--timeout-s", "600"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--gpus", "two"], r"--gpus \(two\)"), (["--timeout-s", "5"], "at least 60"), (["--no"], "must fit the usage")],
)
def test_bad_arguments_are_refused_before_any_cluster_is_asked(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job.run(["--run_dir", "/runs", *arguments])
