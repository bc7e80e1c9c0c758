"""`lorgnette list`: what is known, and what of it works on this machine."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

import click

from lorgnette.cli.output import Command, missing_modules, print_json, table

if TYPE_CHECKING:
    from lorgnette.targets.capabilities import Capabilities
    from lorgnette.targets.target import Target


@click.command(name="list", cls=Command)
@click.argument("kind", type=click.Choice(["families", "targets", "schemes"]))
def list_known(kind: str, as_json: bool) -> None:
    """Lists the model families, the deployment targets or the quantisation schemes."""
    entries = {"families": list_families, "targets": list_targets, "schemes": list_schemes}[kind]()
    if as_json:
        print_json({kind: entries})
        return
    if kind == "targets":
        for entry in entries:
            click.echo("\n".join((entry["name"], *table(_target_rows(entry)))))
        return
    click.echo("\n".join(table([_row(entry) for entry in entries], indent="")))


def list_families() -> list[dict[str, Any]]:
    """Every family; what it reads is known where the export extra is installed."""
    from lorgnette.export.families import family_names, load_family

    missing = missing_modules("export")
    if missing:
        reason = f"needs lorgnette[export]: no {', '.join(missing)}"
        return [{"name": name, "model_types": None, "reason": reason} for name in family_names()]
    return [
        {"name": name, "model_types": list(load_family(name).MODEL_TYPES), "reason": None}
        for name in family_names()
    ]


def list_targets() -> list[dict[str, Any]]:
    """Every target, and whether this machine can lower to it and run what comes out."""
    from lorgnette.targets import all_targets

    return [_target(target) for target in all_targets().values()]


def _target(target: Target) -> dict[str, Any]:
    from lorgnette.quantize.plan import PLANS

    capabilities = target.capabilities
    missing = missing_modules("export")
    no_lower = f"no {', '.join(missing)}: pip install 'lorgnette[export]'" if missing else None
    no_lower = no_lower or target.missing() or None
    runs = _can_run(capabilities)
    return {
        "name": target.name,
        "summary": capabilities.summary,
        "schemes": [name for name, plan in PLANS.items() if capabilities.takes(plan)],
        "matrices": [str(each) for each in capabilities.matrices],
        "tables": [str(each) for each in capabilities.tables],
        "activations": dict(capabilities.activations),
        "arithmetic": capabilities.arithmetic,
        "cache_style": capabilities.cache_style,
        "cache_bits": capabilities.cache_bits,
        "tile_counts": capabilities.tile_counts or "any",
        "os_floor": capabilities.os_floor,
        "engine": f"{capabilities.engine_package}>={capabilities.engine_min_version}",
        "can_lower": no_lower is None,
        "no_lower_reason": no_lower,
        **runs,
        # The ladder needs nothing but the bundle and what runs it.
        "can_verify": runs["can_run"],
    }


def _can_run(capabilities: Capabilities) -> dict[str, Any]:
    from lorgnette.cli.doctor import fits
    from lorgnette.runtime.engines import ENGINES, missing_for

    package, wanted = capabilities.engine_package, capabilities.engine_min_version
    reason: str | None = capabilities.not_run or None
    try:
        version = importlib.metadata.version(package)
        if not fits(version, f">={wanted}"):
            reason = reason or f"{package} {version} is too old"
    except importlib.metadata.PackageNotFoundError:
        reason = reason or f"{package} is not installed"
    if reason is None and (missing := missing_for(capabilities.engine)):
        extra = ENGINES[capabilities.engine].extra
        reason = f"no {', '.join(missing)}: pip install 'lorgnette[{extra}]'"
    return {"can_run": reason is None, "no_run_reason": reason}


def list_schemes() -> list[dict[str, Any]]:
    """Every named plan and the targets that take it."""
    from lorgnette.quantize.plan import MIXED, MIXED_BITS, PLANS
    from lorgnette.targets import all_targets

    targets = all_targets().values()
    named = [
        {
            "name": plan.name,
            "summary": plan.summary,
            "rules": [str(rule) for rule in plan.rules],
            "targets": [t.name for t in targets if t.capabilities.takes(plan)],
        }
        for plan in PLANS.values()
    ]
    found = {
        "name": MIXED,
        "summary": f"codes of {MIXED_BITS} bits on average, by rules that a search finds for each "
        "checkpoint; takes minutes, or hours for large ones",
        "rules": [],
        "targets": [target.name for target in targets],
    }
    return [*named, found]


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    if "model_types" in entry:
        types = entry["model_types"]
        return entry["name"], entry["reason"] or f"model types {', '.join(types)}"
    targets = f"targets: {', '.join(entry['targets'])}"
    return entry["name"], targets, "; ".join(entry["rules"]) or entry["summary"]


def _target_rows(entry: dict[str, Any]) -> list[tuple[str, str]]:
    tiles, bits = entry["tile_counts"], " or ".join(map(str, entry["cache_bits"]))
    counts = "any number of" if tiles == "any" else " or ".join(map(str, tiles))
    noun = "tile" if tiles == (1,) else "tiles"
    return [
        ("for", entry["summary"]),
        ("systems", entry["os_floor"]),
        ("schemes", ", ".join(entry["schemes"])),
        ("graphs", f"{entry['arithmetic']}, {counts} {noun} a call"),
        ("KV cache", f"{entry['cache_style']}, {bits} bits"),
        ("engine", entry["engine"]),
        ("made here", "yes" if entry["can_lower"] else f"no: {entry['no_lower_reason']}"),
        ("run here", "yes" if entry["can_run"] else f"no: {entry['no_run_reason']}"),
        ("verified here", "yes" if entry["can_verify"] else "no, since it is not run"),
    ]
