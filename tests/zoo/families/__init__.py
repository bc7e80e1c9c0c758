"""The families of the zoo, one module each."""

from __future__ import annotations

import json
from pathlib import Path

from tests.zoo.families.base import Family
from tests.zoo.families.mobilevlm import MobileVLM
from tests.zoo.families.omnivlm import OmniVLM
from tests.zoo.families.smolvlm import SmolVLM

FAMILIES: dict[str, Family] = {f.model_type: f for f in (SmolVLM(), MobileVLM(), OmniVLM())}
"""By model type."""


def family_of(folder: Path) -> Family:
    """The family of a checkpoint, by the model type in its config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return FAMILIES[config["model_type"]]
