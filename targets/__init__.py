"""One folder a target: what can be made, and how a traced component is lowered to it."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, cast

from lorgnette.errors import ConfigError

if TYPE_CHECKING:
    from lorgnette.targets.target import Target


def all_targets() -> dict[str, Target]:
    """Every target by name; each folder here holds a `lowering.py` with a `TARGETS` tuple."""
    found: dict[str, Target] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.ispkg:
            lowering = importlib.import_module(f"{__name__}.{module.name}.lowering")
            found |= {
                target.name: target for target in cast("tuple[Target, ...]", lowering.TARGETS)
            }
    return found


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
        ConfigError: There is none; lists the known ones.
    """
    targets = all_targets()
    if name not in targets:
        raise ConfigError("unknown target", got=repr(name), wanted=f"one of {', '.join(targets)}")
    return targets[name]
