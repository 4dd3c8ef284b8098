"""The detectors that an endpoint's settings ask for, and what happens to what they find."""

import importlib
from collections.abc import Mapping, Sequence

from ray_ds.config.safety import ACTION_DEFAULTS, Action, SafetySettings
from ray_ds.errors import ConfigError
from ray_ds.serve.safety.contact import ContactDetector
from ray_ds.serve.safety.credentials import CredentialDetector
from ray_ds.serve.safety.finding import Detector
from ray_ds.serve.safety.harm import HARM
from ray_ds.serve.safety.jailbreak import JAILBREAK
from ray_ds.serve.safety.payment import PaymentDetector
from ray_ds.serve.safety.phrases import PhraseDetector
from ray_ds.serve.safety.screen import OutputScreen

DETECTORS: Mapping[str, Detector] = {
    "secret": CredentialDetector(),
    "payment": PaymentDetector(),
    "contact": ContactDetector(),
    "harm": PhraseDetector(HARM),
    "jailbreak": PhraseDetector(JAILBREAK),
}
"""By category."""


class ContentRefusedError(Exception):
    """A prompt holds what its endpoint refuses."""

    def __init__(self, category: str) -> None:
        super().__init__(f"the prompt was refused by this endpoint's safety filter ({category}); change it")
        self.category = category


class Policy:
    """What is looked for in prompts, and what in answers."""

    def __init__(
        self, *, actions: Mapping[str, Action], prompt: Sequence[Detector], answer: Sequence[Detector]
    ) -> None:
        self._actions = actions
        self._prompt = prompt
        self._answer = answer

    def check_prompt(self, text: str) -> None:
        """Refuse a prompt that holds something to be blocked.

        Raises:
            ContentRefusedError: it does.
        """
        for detector in self._prompt:
            for finding in detector.find(text):
                if self._actions.get(finding.category, "block") == "block":
                    raise ContentRefusedError(finding.category)

    def new_screen(self) -> OutputScreen | None:
        """Return the screen of one answer; None where answers are not looked at."""
        return OutputScreen(self._answer, self._actions) if self._answer else None


def make_policy(settings: SafetySettings) -> Policy | None:
    """Return the policy of settings that are resolved; None where the filter is off.

    Raises:
        ConfigError: the detector of one's own cannot be loaded.
    """
    if settings.scope in (None, "off"):
        return None
    actions: dict[str, Action] = {name: getattr(settings, name) or "allow" for name in ACTION_DEFAULTS}
    own = [] if settings.detector is None else [load_detector(settings.detector)]
    prompt = [DETECTORS[name] for name, action in actions.items() if action == "block"]
    answer = [DETECTORS[name] for name, action in actions.items() if action != "allow" and name != "jailbreak"]
    return Policy(
        actions=actions,
        prompt=[] if settings.scope == "output" else [*prompt, *own],
        answer=[] if settings.scope == "input" else [*answer, *own],
    )


def load_detector(reference: str) -> Detector:
    """Return what the function `package.module:function` returns.

    Raises:
        ConfigError: it is not there, fails, or returns something without the methods of a detector.
    """
    module, _, function = reference.partition(":")
    action = "install its package on every node, or correct the name"
    try:
        detector = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever a stranger's code raises, the setting is what must be mended
        reason = f"{reference}: {type(error).__name__}: {error}"
        raise ConfigError("safety.detector", reason, "must name a function that returns a detector", action) from error
    missing = [name for name in ("find", "undecided") if not callable(getattr(detector, name, None))]
    if missing:
        allowed = f"must return an object with the methods find and undecided; {missing[0]} is missing"
        raise ConfigError("safety.detector", reference, allowed, "see ray_ds.serve.safety.finding.Detector")
    found: Detector = detector
    return found
