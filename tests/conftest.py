"""How a run of the tests begins and ends."""

import os
import sys

# Read when ray is imported. Otherwise any of Ray's functions, called while no Ray runs, starts a whole one: a thread
# that a test had left did so while the next test started its own, and the clash ended the process.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

import pytest

STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep the status for the end."""
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End at once, with all said and all fixtures closed, where Ray ran in this process.

    Ray's native threads live on after `ray.shutdown`; one of them once crashed while the interpreter was taken down
    beneath it, after 4,303 tests, and made the status of the whole run that of a crash.
    """
    if "ray" in sys.modules and STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[STATUS])
