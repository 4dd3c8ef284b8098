"""Measure how the number of replicas follows the load, our policy beside Serve's own.

    python -m jobs.bench.autoscale                 # simulated, a minute
    python -m jobs.bench.autoscale --live          # and on a Serve of its own on loopback, five minutes

The simulated part runs Ray Serve's real decisions on simulated replicas (`jobs/bench/autoscaling/`); its loads are
those that autoscalers get wrong. The live part lets four times the clients ask one replica of a small model, until
another one answers, then waits until it has gone; and asks when there is none. The last line is one JSON object.
"""

import argparse
import json
import logging
import os
import socket
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; this Ray listens on loopback only

import ray

from jobs.bench.autoscaling.cases import CASES, POLICIES, SPEED, Outcome, simulate
from jobs.bench.autoscaling.simulated_serve import ServeTimes

OURS = "tokens"


def main() -> None:
    """Print tables and, as the last line, the figures as JSON."""
    options = parse_options()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    times = ServeTimes(startup_s=options.startup_s)
    outcomes = []
    print("| case | policy | in time | p99 s | replica seconds | most | turns | steps | back s |\n" + "|---" * 9 + "|")
    for case in CASES:
        for policy in POLICIES:
            outcomes.append(simulate(case, policy, times, target_ttft_s=options.target_ttft_s, seed=options.seed))
            print(format_outcome(outcomes[-1]), flush=True)
    rows = live_rows() if options.live else []
    for row in rows:
        print(json.dumps(row), flush=True)
    inputs = {**vars(options), **vars(SPEED), **vars(times), "ray": ray.__version__, "cpus": os.cpu_count()}
    figures: dict[str, Any] = {
        "simulated": [outcome.as_json() for outcome in outcomes if outcome.policy == OURS],
        "live": [row for row in rows if row["policy"] == OURS],
    }
    peers = {
        "simulated": [outcome.as_json() for outcome in outcomes if outcome.policy != OURS],
        "live": [row for row in rows if row["policy"] != OURS],
    }
    print(json.dumps({"name": "autoscale", "inputs": inputs, "figures": figures, "peers": peers}))


def parse_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", action="store_true", help="also on a real Serve")
    parser.add_argument("--startup-s", type=float, default=ServeTimes().startup_s, help="of a simulated replica")
    parser.add_argument("--target-ttft-s", type=float, default=1.0, help="what counts as in time")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def format_outcome(outcome: Outcome) -> str:
    """Return a row of the table."""
    back = "" if outcome.back_to_minimum_s is None else f"{outcome.back_to_minimum_s:.0f}"
    return (
        f"| {outcome.case} | {outcome.policy} | {outcome.ttft_met:.1%} | {outcome.ttft_p99_s:.2f} "
        f"| {outcome.replica_seconds:.0f} | {outcome.most_replicas} | {outcome.direction_changes} "
        f"| {outcome.load_steps} | {back} |"
    )


def live_rows() -> list[dict[str, Any]]:
    """Return the live part's figures."""
    from jobs.bench.autoscaling.live import run_live  # torch is not needed for the simulated part

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="ray_ds-bench-") as folder:
        return [*run_live(Path(folder), port, ("tokens", "ongoing_requests"))]


if __name__ == "__main__":
    main()
