"""One ledger for all replicas of an endpoint, so that a key's limits hold for them together.

The ledger is an actor that Serve keeps beside the replicas: it starts before them, and again where it died, then with
full buckets.
"""

from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import DeploymentActorConfig

from ray_ds.config.keys import ApiKey
from ray_ds.serve.limits import Ledger, LedgerUnavailableError, Verdict

ACTOR_NAME = "ledger"


class LedgerOwner:
    """The actor. Serve pickles the whole module of an actor's class by value, so that only this class is a copy."""

    def __init__(self) -> None:
        self._ledger = Ledger()

    def admit(self, name: str, key: ApiKey, num_tokens: int, lease_s: float) -> Verdict:
        """Ask the ledger."""
        return self._ledger.admit(name, key, num_tokens, lease_s)

    def settle(self, name: str, lease: int, unused_tokens: int) -> None:
        """Tell the ledger."""
        self._ledger.settle(name, lease, unused_tokens)


def ledger_actor() -> DeploymentActorConfig:
    """Return the actor for `serve.deployment(deployment_actors=...)`."""
    return DeploymentActorConfig(name=ACTOR_NAME, actor_class=ray.remote(LedgerOwner), actor_options={"num_cpus": 0})


class SharedLedger:
    """Asks the actor, from a replica."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def admit(self, name: str, key: ApiKey, num_tokens: int, lease_s: float) -> Verdict:
        """Do what `Ledger.admit` does.

        Raises:
            LedgerUnavailableError: the actor is gone; Serve starts another one.
        """
        try:
            if self._actor is None:
                self._actor = serve.get_deployment_actor(ACTOR_NAME)
            verdict: Verdict = await self._actor.admit.remote(name, key, num_tokens, lease_s)
        except (RayActorError, ValueError) as error:
            self._actor = None
            raise LedgerUnavailableError("the limits of API keys cannot be checked now; try again in 1 s") from error
        return verdict

    def settle(self, name: str, lease: int, unused_tokens: int) -> None:
        """Do what `Ledger.settle` does; an actor that is gone has nothing to settle."""
        if self._actor is not None:
            self._actor.settle.remote(name, lease, unused_tokens)
