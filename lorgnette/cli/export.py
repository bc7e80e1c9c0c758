"""`lorgnette export`: a checkpoint to a bundle."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from lorgnette.cli.components import component_lines
from lorgnette.cli.output import Command, print_json, printable, require_extra, size, steps, table
from lorgnette.cli.parity import parity_document, parity_lines, rung_lines
from lorgnette.errors import ConfigError
from lorgnette.recipe import PlanText, Recipe

if TYPE_CHECKING:
    from lorgnette.bundle import Bundle
    from lorgnette.export.pipeline import Exported
    from lorgnette.runtime.golden import GoldenText
    from lorgnette.runtime.verify import Ladder

EXCLUSIVE = (("longest_edge", "max_tiles"), ("quant", "plan"))
"""Pairs of ways to say the same: the one that is given last replaces the other."""


@click.command(cls=Command)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--vision",
    type=click.Path(path_type=Path),
    help="The vision tower, where it is published apart: a CLIP folder or an mmproj GGUF file.",
)
@click.option(
    "--target",
    help="What it is made for: see 'lorgnette list targets'. Several, with commas between, give a "
    "bundle each, whose answers are compared.  [onnx-cpu]",
)
@click.option("--quant", help="How weights are stored: see 'lorgnette list schemes'.  [fp32]")
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    help="The same as a TOML file of rules, in place of --quant.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The bundle; of several targets the name of each has -TARGET behind it."
    "  [CHECKPOINT's name-QUANT.lorg]",
)
@click.option("--context", type=int, help="KV cache capacity in tokens.  [the model's, up to 8192]")
@click.option("--max-tiles", type=int, help="The most tiles that one picture may become.")
@click.option("--longest-edge", type=int, help="The same, as pixels of a picture's longest side.")
@click.option("--split/--no-split", default=None, help="Whether pictures are cut into tiles.")
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="A TOML file of choices; the options here go before it.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A choice by its name.")
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    help="Pictures with questions to calibrate with and measure on: a folder or a .jsonl file."
    "  [drawn ones that come with lorgnette]",
)
@click.option(
    "--measure",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="The most questions that answers are compared with the original's on; 0 for none.",
)
@click.option(
    "--accept-loss",
    is_flag=True,
    help="Make the bundle even if it is worse than its plan promises.",
)
@click.option(
    "--max-fallback",
    type=click.IntRange(min=0),
    metavar="N",
    help="Refuse a bundle of which more operators run outside the target's delegate.",
)
@click.option("--force", is_flag=True, help="Replace a bundle that stands there.")
def export(
    checkpoint: Path,
    vision: Path | None,
    target: str | None,
    quant: str | None,
    plan_file: Path | None,
    out: Path | None,
    context: int | None,
    max_tiles: int | None,
    longest_edge: int | None,
    split: bool | None,
    recipe_file: Path | None,
    settings: tuple[str, ...],
    calibrate: Path | None,
    measure: int,
    accept_loss: bool,
    max_fallback: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compiles CHECKPOINT into a bundle and verifies it.

    CHECKPOINT is a folder as published or a GGUF file.
    """
    if quant is not None and plan_file is not None:
        raise click.UsageError("--quant and --plan both say how weights are stored: give one")
    options = {
        "target": target,
        "quant": quant,
        "plan": None if plan_file is None else _plan(plan_file),
        "context_length": context,
        "longest_edge": longest_edge,
        "max_tiles": max_tiles,
        "split": split,
        "max_fallback": max_fallback,
    }
    given = {key: value for key, value in options.items() if value is not None}
    recipe = build_recipe(recipe_file, settings, given)
    require_extra("export")
    from lorgnette.export.pipeline import export_all as run_export
    from lorgnette.export.sample_set import Pictures

    name = checkpoint.resolve().name.removesuffix(".gguf")
    outs = name_bundles(recipe.target, out or Path(f"{name}-{recipe.quant}.lorg"))
    started = time.perf_counter()
    with steps() as progress:
        made = run_export(
            checkpoint,
            outs,
            recipe,
            vision=vision,
            pictures=Pictures(calibrate, measure, accept_loss),
            replace=force,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    _tell(made, list(outs), seconds, as_json)


def _tell(made: Exported, targets: list[str], seconds: float, as_json: bool) -> None:
    """Prints what was made, and of several targets how far they are from each other."""
    from lorgnette.runtime.golden import read_golden

    documents = [
        _document(bundle, ladder, read_golden(bundle).text, seconds)
        for bundle, ladder in zip(made.bundles, made.ladders, strict=True)
    ]
    if len(targets) == 1:
        parity: dict[str, Any] = {}
    else:
        parity = {"bundles": documents, **parity_document(made.comparison)}
    if as_json:
        print_json(parity or documents[0])
        return
    for document, bundle, ladder in zip(documents, made.bundles, made.ladders, strict=True):
        _print_summary(document, bundle, ladder)
    if parity:
        rows = parity_lines(targets, made.ladders, made.comparison)
        click.echo(printable("\n".join(rows)))


def name_bundles(target: str, out: Path) -> dict[str, Path]:
    """Where the bundle of each target goes: `OUT` of one, `OUT-TARGET` of several.

    Raises:
        ConfigError: A target is named twice, or not at all.
    """
    names = [name.strip() for name in target.split(",")]
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError("targets are not names with commas between", got=repr(target))
    if len(names) == 1:
        return {names[0]: out}
    return {name: out.with_name(f"{out.stem}-{name}{out.suffix}") for name in names}


def build_recipe(file: Path | None, settings: Sequence[str], options: Mapping[str, Any]) -> Recipe:
    """A recipe from a TOML file, then --set, then options; the later goes before the earlier.

    Raises:
        ConfigError: The file or a setting is not understood.
    """
    levels = [read_recipe_file(file) if file is not None else {}, _parse_settings(settings)]
    merged: dict[str, Any] = {}
    for level in (*levels, options):
        for pair in EXCLUSIVE:
            if any(key in level for key in pair):
                merged = {key: value for key, value in merged.items() if key not in pair}
        merged |= level
    if isinstance(plan := merged.get("plan"), PlanText):
        merged.setdefault("quant", plan.name)
    return Recipe(**merged)


def _plan(file: Path) -> PlanText:
    from lorgnette.quantize.plan_file import read_plan_file

    return read_plan_file(file)


def read_recipe_file(file: Path) -> dict[str, Any]:
    """The choices of a TOML file.

    Raises:
        ConfigError: It cannot be read, or a key or a value is not a recipe's.
    """
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError("cannot read the recipe", where=file, got=error.strerror) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("the recipe is not valid TOML", where=file, got=error) from error
    return {key: _field(key, value, str(file), strict=True) for key, value in values.items()}


def _parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts as values of a recipe."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(
                "a setting has no value", where="--set", got=setting, wanted="key=value"
            )
        values[key] = _field(key, value, "--set", strict=False)
    return values


def _field(key: str, value: object, where: str, *, strict: bool) -> object:
    """One value of a recipe, of the type that the recipe wants.

    Not strict means that the value is text that stands for it.
    """
    types = {field.name: field.type for field in msgspec.structs.fields(Recipe)}
    if key not in types:
        raise ConfigError(
            "unknown key of a recipe",
            where=where,
            got=repr(key),
            wanted=f"one of {', '.join(types)}",
        )
    try:
        return msgspec.convert(value, types[key], strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"'{key}' has a value of the wrong kind", where=where, got=repr(value), hint=str(error)
        ) from error


def _document(
    bundle: Bundle, ladder: Ladder, golden: GoldenText, seconds: float
) -> dict[str, object]:
    from lorgnette.runtime.generation import peak_rss_bytes

    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "bytes": sum(entry.bytes for entry in manifest.files),
        "files": [msgspec.to_builtins(entry) for entry in manifest.files],
        "seconds": round(seconds, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "components": [
            {
                "name": entry.name,
                "weight_bytes": entry.weight_bytes,
                "operators": entry.operators,
                "kept_in_float": entry.kept_in_float,
                "exceptions": entry.exceptions,
                "fallbacks": msgspec.to_builtins(entry.fallbacks),
                "advice": entry.advice,
            }
            for entry in manifest.components
        ],
        "target": manifest.recipe.target,
        "not_run": manifest.not_run or None,
        "ladder": [msgspec.to_builtins(rung) for rung in ladder.rungs],
        "rounding": {
            "image_tokens": golden.rounding_image_tokens,
            "logits": golden.rounding_logits,
        },
        "quality": msgspec.to_builtins(manifest.quality),
    }


def _print_summary(document: Mapping[str, Any], bundle: Bundle, ladder: Ladder) -> None:
    click.echo(
        f"{document['bundle']}: {size(document['bytes'])} in {len(document['files'])} files, "
        f"made in {document['seconds']:.1f} s"
    )
    for line in (*component_lines(bundle.manifest.components), *rung_lines(ladder)):
        click.echo(printable(line))
    if bundle.manifest.not_run:
        click.echo(printable(f"Not run: {bundle.manifest.not_run}"))
    rounding = document["rounding"]
    if any(rounding.values()):
        click.echo(
            f"Rounding the weights moved the image tokens by {rounding['image_tokens']:.2%} and "
            f"the logits by {rounding['logits']:.2%}."
        )
    summary = bundle.manifest.quality
    if summary is not None:
        from lorgnette.report.lines import summary_rows

        click.echo(printable("\n".join(table(summary_rows(summary), indent=""))))
