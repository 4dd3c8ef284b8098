"""The packages that this one needs, whose documentation is the sample text: other installed ones must not change it."""

import re
from collections.abc import Mapping
from importlib import metadata

from packaging.requirements import Requirement


def own_packages() -> dict[str, metadata.Distribution]:
    """Return this package and those installed that it brings in for the demo, by their normal names (PEP 503, `_`)."""
    found = {_normal_name(each.metadata["Name"]): each for each in metadata.distributions()}
    return {name: found[name] for name in _reached(Requirement("ray_ds[demo]"), found)}


def _reached(wanted: Requirement, found: Mapping[str, metadata.Distribution]) -> set[str]:
    """Return which of the installed packages a requirement brings in, itself among them."""
    seen: dict[str, set[str]] = {}
    pending = [wanted]
    while pending:
        one = pending.pop()
        name = _normal_name(one.name)
        extras = one.extras | {""}
        if name not in found or extras <= seen.get(name, set()):
            continue
        seen.setdefault(name, set()).update(extras)
        for line in found[name].requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                pending.append(needed)
    return set(seen)


def _normal_name(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()
