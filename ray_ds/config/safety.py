"""Settings of the safety filter: what is looked for in prompts and answers, and what happens then."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from ray_ds.config.settings import settings
from ray_ds.errors import ConfigError

Scope = Literal["off", "input", "output", "both"]
Action = Literal["allow", "redact", "block"]

ACTION_DEFAULTS: dict[str, Action] = {
    "secret": "redact",
    "payment": "redact",
    "contact": "allow",
    "harm": "block",
    "jailbreak": "block",
}
"""What happens to each category where the filter looks at answers as well as prompts."""


@settings
class SafetySettings:
    """What the safety filter looks at. `redact` puts a mark in place of what an answer must not say, and leaves prompts
    as they are; `block` refuses a prompt, and ends an answer before it."""

    scope: Scope | None = None
    """Whether prompts (`input`), answers (`output`) or both are looked at; absent = both where the host is open to the
    network, off on loopback."""
    secret: Action | None = None
    """Keys of well-known services, private keys, tokens, and passwords given a name; absent = redact."""
    payment: Action | None = None
    """Numbers of payment cards and bank accounts (IBAN) whose check digits are right; absent = redact."""
    contact: Action | None = None
    """E-mail addresses, phone numbers and public IP addresses; absent = allow."""
    harm: Literal["allow", "block"] | None = None
    """Instructions for hurting people, and calls to do so, in the wordings of a list of rules; others pass, so this is
    no moderation by itself; absent = block."""
    jailbreak: Literal["allow", "block"] | None = None
    """Prompts that tell the model to forget its instructions or to repeat them, in the wordings of a list of rules;
    absent = block."""
    detector: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """One of your own, `package.module:function`: the function returns an object with the two methods of
    `ray_ds.serve.safety.finding.Detector`. What it finds in categories of its own is blocked."""

    def resolved(self, scope: Scope) -> "SafetySettings":
        """Return the settings with nothing left out.

        Args:
            scope: the one in force where none is given.
        Raises:
            ConfigError: a setting would have no effect.
        """
        scope = self.scope or scope
        for name in (*ACTION_DEFAULTS, "detector"):
            given = getattr(self, name)
            if given is not None and (reason := _no_effect(scope, name, given)) is not None:
                raise ConfigError(f"safety.{name}", given, f"has no effect while safety.scope is {reason}", "remove it")
        if scope == "off":
            return dataclasses.replace(self, scope=scope)
        filled: dict[str, Any] = {name: getattr(self, name) or default for name, default in ACTION_DEFAULTS.items()}
        return dataclasses.replace(self, scope=scope, **filled)


def _no_effect(scope: Scope, name: str, given: str) -> str | None:
    """Return why a setting would have no effect; None where it has one."""
    if scope == "off":
        return "off"
    if scope == "output" and name == "jailbreak":
        return "output: only prompts are looked at for it"
    if scope == "input" and given == "redact":
        return "input: prompts are refused or left as they are"
    return None
