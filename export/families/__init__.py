"""One file a family: config, weight map, components, prompt."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, cast

from lorgnette.errors import ConfigError

if TYPE_CHECKING:
    from lorgnette.export.component import Family


def family_names() -> list[str]:
    """Names of all families, one for each file of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_family(name: str) -> Family:
    """The family of a name that `family_names` lists."""
    return cast("Family", importlib.import_module(f"{__name__}.{name}"))


def find_family(model_type: object) -> tuple[str, Family]:
    """The family that reads a `model_type`.

    Raises:
        ConfigError: No family does; lists the known ones.
    """
    known: list[str] = []
    for name in family_names():
        family = load_family(name)
        if model_type in family.MODEL_TYPES:
            return name, family
        known += family.MODEL_TYPES
    raise ConfigError(
        "unknown architecture",
        where="config.json model_type",
        got=repr(model_type),
        wanted=f"one of {', '.join(known)}",
    )
