import json
import os
import sys

os.environ["RAY_AUTH_MODE"] = "disabled"

import pytest

from jobs.bench import autoscale
from jobs.bench.autoscaling.cases import Case
from jobs.bench.autoscaling.traffic import burst


def test_the_last_line_holds_our_figures_and_those_of_the_peers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = Case(name="short", rate=burst(2.0, 5, 15), end_s=40, load_steps=2, load_ends_s=15)
    monkeypatch.setattr(autoscale, "CASES", (short,))
    monkeypatch.setattr(sys, "argv", ["autoscale", "--startup-s", "2", "--seed", "5"])
    autoscale.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["name"] == "autoscale"
    assert (result["inputs"]["startup_s"], result["inputs"]["seed"], result["inputs"]["live"]) == (2.0, 5, False)
    (ours,) = result["figures"]["simulated"]
    assert (ours["case"], ours["policy"]) == ("short", "tokens")
    assert {row["policy"] for row in result["peers"]["simulated"]} == {"ongoing_requests", "serve_defaults"}
    assert {row["requests"] for row in [ours, *result["peers"]["simulated"]]} == {ours["requests"]}, "the same load"
