"""One file a family: config, weight map, components, prompt."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lorgnette.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from lorgnette.export.checkpoint import Checkpoint
    from lorgnette.export.component import Family

GGUF_SUFFIX = ".gguf"


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


def open_checkpoint(path: str | Path, vision: str | Path | None = None) -> Checkpoint:
    """Opens a checkpoint in any published form and brings it to its family's normal form.

    Args:
        path: A directory with config.json and weights, a GGUF language model, or a directory
            that holds one and its vision tower.
        vision: The vision tower where it is published apart: a CLIP directory or an mmproj
            file. Without it, a GGUF language model takes the one mmproj file beside it.

    Raises:
        LorgnetteError: A file is missing or damaged, or no family reads it.
    """
    from lorgnette.export.checkpoint import open_files
    from lorgnette.export.gguf_import import is_gguf

    path, tower = _find_pair(Path(path), None if vision is None else Path(vision))
    checkpoint = open_files(path)
    apart = None if tower is None else open_files(tower)
    if is_gguf(checkpoint) and apart is not None:
        family = _find_gguf_family(apart)
    else:
        _, family = find_family(checkpoint.config.get("model_type"))
    return family.normal_form(checkpoint, apart)


def _find_pair(path: Path, vision: Path | None) -> tuple[Path, Path | None]:
    """The file or directory to open, and the one of the vision tower."""
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob(f"*{GGUF_SUFFIX}"))
        decoders = [file for file in found if not _is_mmproj(file)]
        if len(decoders) > 1:
            raise CheckpointError(
                "the folder holds several language models",
                where=path,
                got=", ".join(file.name for file in decoders),
                hint="name the one to take",
            )
        if decoders:
            path = decoders[0]
    if path.suffix.lower() != GGUF_SUFFIX or vision is not None or not path.exists():
        return path, vision
    if _is_mmproj(path):
        raise CheckpointError(
            "this file is a vision tower, by its name",
            where=path,
            wanted="the file of the language model",
            hint="name both: the language model, and this one with --vision",
        )
    towers = sorted(file for file in path.parent.glob(f"*{GGUF_SUFFIX}") if _is_mmproj(file))
    if len(towers) != 1:
        raise CheckpointError(
            "a GGUF language model needs the file of its vision tower",
            where=path,
            got=", ".join(file.name for file in towers) or "no mmproj file beside it",
            hint="name it with --vision",
        )
    return path, towers[0]


def _is_mmproj(file: Path) -> bool:
    """Whether a GGUF file is a vision tower, by the name that all of them carry."""
    return "mmproj" in file.name.lower()


def _find_gguf_family(vision: Checkpoint) -> Family:
    architecture = vision.config.get("general.architecture")
    known: list[str] = []
    for name in family_names():
        family = load_family(name)
        if architecture in family.GGUF_ARCHITECTURES:
            return family
        known += family.GGUF_ARCHITECTURES
    raise CheckpointError(
        "no family has such a vision tower",
        where=vision.path,
        got=f"architecture {architecture!r}",
        wanted=f"one of {', '.join(known)}",
    )
