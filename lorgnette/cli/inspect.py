"""`lorgnette inspect`: what a checkpoint or a bundle is, in numbers, without running it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from lorgnette.cli.components import departures, forms
from lorgnette.cli.output import Command, print_json, printable, require_extra, size, table
from lorgnette.errors import LorgnetteError

if TYPE_CHECKING:
    from lorgnette.export.check import Parts
    from lorgnette.export.checkpoint import Checkpoint
    from lorgnette.manifest import Manifest


@click.command(cls=Command)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--vision", type=click.Path(path_type=Path), help="The vision tower, where it lies apart."
)
def inspect(path: Path, vision: Path | None, as_json: bool) -> None:
    """Tells sizes, shapes, schemes and predicted memory of a checkpoint or a bundle at PATH.

    A checkpoint is a folder as published or a GGUF file.
    """
    if (path / "manifest.json").exists() or path.suffix == ".lorg":
        if vision is not None:
            raise LorgnetteError("a bundle has its vision tower inside", hint="leave --vision out")
        document = inspect_bundle(path)
        lines = _bundle_lines
    elif (path / "config.json").exists() or path.is_file() or any(path.glob("*.gguf")):
        document = inspect_checkpoint(path, vision)
        lines = _checkpoint_lines
    else:
        raise LorgnetteError(
            "neither a checkpoint nor a bundle",
            where=path,
            got="a folder without config.json, manifest.json or GGUF files"
            if path.is_dir()
            else "nothing",
        )
    if as_json:
        print_json(document)
        return
    for line in lines(document):
        click.echo(printable(line))


def inspect_bundle(path: Path) -> dict[str, Any]:
    """A bundle's manifest and what follows from it; sizes are checked, contents are not."""
    from lorgnette.bundle import open_bundle
    from lorgnette.cli import predict

    manifest = open_bundle(path).manifest
    spec, context = manifest.spec, manifest.context_length
    cache_bits = _cache_bits(manifest)
    kv = predict.kv_bytes_per_token(spec.text, cache_bits)
    weights = sum(sum(entry.weight_bytes.values()) for entry in manifest.components)
    return {
        "kind": "bundle",
        "path": str(path),
        "format": msgspec.to_builtins(manifest.format),
        "producer": manifest.producer,
        "checkpoint": manifest.checkpoint,
        "family": spec.family,
        "model_type": spec.model_type,
        "variant": spec.variant,
        "target": manifest.recipe.target,
        "engine": manifest.engine,
        "quant": manifest.recipe.quant,
        "rules": _rules(manifest),
        "recipe": msgspec.to_builtins(manifest.recipe),
        "context_length": context,
        "components": _components(manifest),
        "departures": departures(manifest.components),
        "not_run": manifest.not_run or None,
        "pictures": predict.pictures(spec, manifest.preprocess),
        "kv_cache_bytes": {"per_1000_tokens": 1000 * kv, "at_full_context": context * kv},
        "predicted_memory_bytes": predict.memory(
            spec,
            manifest.preprocess,
            context,
            weights,
            cache_bits,
            prefill_weights=any(each.weights for each in manifest.component("decoder").functions),
        ),
        "files": [msgspec.to_builtins(entry) for entry in manifest.files],
        "bytes": sum(entry.bytes for entry in manifest.files),
    }


def _cache_bits(manifest: Manifest) -> int:
    """Bits of an element of the KV cache: as its states say, where it is state."""
    from lorgnette.manifest import CACHE8

    functions = manifest.component("decoder").functions
    if any(state.dtype == "float16" for function in functions for state in function.states):
        return 16
    return 8 if CACHE8 in manifest.requires else 32


def _rules(manifest: Manifest) -> list[str]:
    """The rules of a plan file; a named plan is known by its name."""
    from lorgnette.quantize.plan_file import plan_for

    recipe = manifest.recipe
    return [] if recipe.plan is None else [str(rule) for rule in plan_for(recipe).rules]


def _components(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "name": entry.name,
            "entry_points": list(entry.entry_points),
            "operators": sum(entry.operators.values()),
            "operators_by_name": entry.operators,
            "weight_bytes": entry.weight_bytes,
            "kept_in_float": entry.kept_in_float,
            "exceptions": list(entry.exceptions),
            "fallbacks": [msgspec.to_builtins(fallback) for fallback in entry.fallbacks],
            "advice": list(entry.advice),
            "functions": [msgspec.to_builtins(function) for function in entry.functions],
            "inputs": [msgspec.to_builtins(tensor) for tensor in entry.inputs],
            "outputs": [msgspec.to_builtins(tensor) for tensor in entry.outputs],
            "caches": len(entry.cache_inputs),
        }
        for entry in manifest.components
    ]


def inspect_checkpoint(path: Path, vision: Path | None = None) -> dict[str, Any]:
    """What a checkpoint's headers tell and what its bundles would take; reads no weight."""
    require_extra("export")
    from lorgnette.cli import predict
    from lorgnette.export.families import open_checkpoint
    from lorgnette.export.pipeline import read_parts
    from lorgnette.recipe import Recipe

    checkpoint = open_checkpoint(path, vision)
    parts = read_parts(checkpoint, Recipe())
    context = parts.context_length
    spec = parts.spec
    kv = predict.kv_bytes_per_token(spec.text)
    sizes = predict.checkpoint_weight_bytes(parts)
    return {
        "kind": "checkpoint",
        "path": str(path),
        "family": spec.family,
        "model_type": spec.model_type,
        "variant": spec.variant,
        "spec": msgspec.to_builtins(spec),
        "parameters": _parameters(checkpoint, parts),
        "dtypes": dict(Counter(info.dtype for info in checkpoint.tensors.values())),
        "context_length": context,
        "pictures": predict.pictures(spec, parts.preprocess),
        "kv_cache_bytes": {"per_1000_tokens": 1000 * kv, "at_full_context": context * kv},
        "predicted_weight_bytes": sizes,
        "predicted_memory_bytes": {
            name: predict.memory(spec, parts.preprocess, context, count)["total"]
            for name, count in sizes.items()
        },
    }


def _parameters(checkpoint: Checkpoint, parts: Parts) -> dict[str, int]:
    """Parameters by component; a tensor that two share counts in both and in the total once."""

    def count(names: set[str]) -> int:
        return sum(math.prod(checkpoint.tensors[name].shape) for name in names)

    used = {name: source.used_tensors() for name, source in parts.sources.items()}
    counts = {name: count(tensors) for name, tensors in used.items()}
    return {**counts, "total": count(set().union(*used.values()))}


def _bundle_lines(document: dict[str, Any]) -> list[str]:
    made = document["format"]
    rows: list[tuple[str, ...]] = [
        ("bundle", f"{document['path']}, format {made['major']}.{made['minor']}"),
        ("checkpoint", f"{document['checkpoint']}, {_family(document)}"),
        ("target", f"{document['target']}, engine {document['engine']}"),
        *([("not run", document["not_run"])] if document["not_run"] else []),
        ("scheme", document["quant"]),
        *(("", rule) for rule in document["rules"]),
        *_common_rows(document),
    ]
    components = [
        (
            entry["name"],
            f"{entry['operators']} operators",
            forms(entry["weight_bytes"]),
            f"{len(kept)} matrices kept in float" if (kept := entry["kept_in_float"]) else "",
        )
        for entry in document["components"]
    ]
    predicted = document["predicted_memory_bytes"]
    parts = ", ".join(
        f"{name.replace('_', ' ')} {size(n)}" for name, n in predicted.items() if name != "total"
    )
    files = [(entry["path"], size(entry["bytes"])) for entry in document["files"]]
    return [
        *table(rows, indent=""),
        "components",
        *table(components),
        *document["departures"],
        f"predicted peak memory {size(predicted['total'])} and what the engine adds: {parts}",
        f"files, {size(document['bytes'])}",
        *table(files),
    ]


def _checkpoint_lines(document: dict[str, Any]) -> list[str]:
    counts = document["parameters"]
    rows: list[tuple[str, ...]] = [
        ("checkpoint", f"{document['path']}, {_family(document)}"),
        ("parameters", f"{counts['total']:,}"),
        *(("", f"{name} {n:,}") for name, n in counts.items() if name != "total"),
        ("on disk", ", ".join(f"{n} tensors {name}" for name, n in document["dtypes"].items())),
        *_common_rows(document),
    ]
    schemes = [
        (name, f"weights {size(n)}", f"memory {size(document['predicted_memory_bytes'][name])}")
        for name, n in document["predicted_weight_bytes"].items()
    ]
    return [
        *table(rows, indent=""),
        "predicted by scheme (memory: weights, full KV cache, image tokens; the engine adds to it)",
        *table(schemes),
    ]


def _common_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    kv = document["kv_cache_bytes"]
    return [
        ("context", f"{document['context_length']} tokens"),
        (
            "KV cache",
            f"{size(kv['per_1000_tokens'])} per 1000 tokens, "
            f"{size(kv['at_full_context'])} at full context",
        ),
        *(
            ("picture", f"{p['picture']}: {_tiles(p['tiles'])}, {p['image_tokens']} image tokens")
            for p in document["pictures"]
        ),
    ]


def _tiles(count: int) -> str:
    return "1 tile" if count == 1 else f"{count} tiles"


def _family(document: dict[str, Any]) -> str:
    return f"family {document['family']} ({document['model_type']}), {document['variant']}"
