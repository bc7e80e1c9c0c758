"""`lorgnette search`: a mixed plan, found by what each part of a model loses."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from lorgnette.cli.output import Command, print_json, printable, require_extra, size, table
from lorgnette.errors import LorgnetteError

if TYPE_CHECKING:
    from lorgnette.export.check import Parts
    from lorgnette.export.sample_set import SampleSet
    from lorgnette.export.search import Found, Limit, Search, WeightBytes
    from lorgnette.quantize.plan import QuantPlan
    from lorgnette.report.plots import Spot

COMPARED = ("int8", "int4")
"""Named plans that a plot shows beside what was found."""
SHOWN_POINTS = 16
PROGRESS_S = 0.2


@click.command(cls=Command)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--vision", type=click.Path(path_type=Path), help="The vision tower, where apart.")
@click.option("--target", default="onnx-cpu", show_default=True, help="What has to carry the plan.")
@click.option(
    "--max-bytes",
    type=click.IntRange(min=1),
    help="The most bytes of all weights, as predicted: gaps between them may differ by some kB.",
)
@click.option(
    "--max-loss",
    type=click.FloatRange(min=0, min_open=True),
    help="The highest mean KL divergence of answers from the original's, in nats.",
)
@click.option(
    "--bits",
    type=click.FloatRange(min=1, max=16),
    help="The most bits of a code, on average over the numbers of all matrices of the vision "
    "encoder, the embedding, the decoder and the head; scales are not counted.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    help="Pictures with questions: a folder or a .jsonl file; every fourth is measured on, with "
    "the others is calibrated.  [drawn ones that come with lorgnette]",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="The most questions to measure on; three times as many calibrate.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The plan file, ends in .toml."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Bytes against loss, as SVG.")
@click.option("--force", is_flag=True, help="Replace files that stand there.")
def search(
    checkpoint: Path,
    vision: Path | None,
    target: str,
    max_bytes: int | None,
    max_loss: float | None,
    bits: float | None,
    calibrate: Path | None,
    count: int,
    out: Path,
    plot: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Finds a plan for CHECKPOINT that gives each part the bits that it needs.

    Attention and feed-forward of each layer, the projector, the embedding and the head are rounded
    one at a time to each of a few schemes, and the answers to questions about pictures compared
    with the original's. The plan with the least sum of losses within the limit is written, after
    it was measured as a whole. Give one of --max-bytes, --max-loss and --bits.

    A model of 2 million weights takes a minute or two; time grows with the size of the model and
    with the square of its layers: hours for hundreds of millions of weights. A smaller --count is
    faster and less sure.
    """
    from lorgnette.export.search import Limit

    given = {"bytes": max_bytes, "loss": max_loss, "bits": bits}
    limits = [Limit(kind, value) for kind, value in given.items() if value is not None]  # type: ignore[arg-type]
    if len(limits) != 1:
        raise click.UsageError("give one of --max-bytes, --max-loss and --bits")
    _check_files(out, plot, force)
    started = time.perf_counter()
    with telling() as (step, part):
        found, document = _search(
            checkpoint, vision, target, limits[0], calibrate, count, out, plot, step, part
        )
    out.write_text(found.toml(), encoding="utf-8")
    document["seconds"] = round(time.perf_counter() - started, 3)
    if as_json:
        print_json(document)
    else:
        for line in _lines(document):
            click.echo(printable(line))


def _check_files(out: Path, plot: Path | None, force: bool) -> None:
    """Refuses what could not be written, before a search of minutes.

    Raises:
        LorgnetteError: Naming the file.
    """
    require_extra("export")
    if plot is not None:
        require_extra("report")
    for path, ending in ((out, ".toml"), (plot, ".svg")):
        if path is None:
            continue
        if path.suffix != ending:
            raise LorgnetteError("the file's name ends otherwise", where=path, wanted=ending)
        if not path.absolute().parent.is_dir():
            raise LorgnetteError("no such folder", where=path.parent)
        if path.exists() and not (force and path.is_file()):
            hint = "give --force to replace it" if path.is_file() else None
            raise LorgnetteError("something stands there already", where=path, hint=hint)


def _search(
    checkpoint: Path,
    vision: Path | None,
    target: str,
    limit: Limit,
    calibrate: Path | None,
    count: int,
    out: Path,
    plot: Path | None,
    step: Callable[[str], None],
    part: Callable[[int, int], None],
) -> tuple[Found, dict[str, Any]]:
    """Runs the search and draws the plot."""
    from lorgnette.cli.predict import bundle_weight_bytes
    from lorgnette.export.families import open_checkpoint
    from lorgnette.export.matrices import matrix_names
    from lorgnette.export.pipeline import read_parts
    from lorgnette.export.search import Progress, Search, plan_name
    from lorgnette.recipe import Recipe
    from lorgnette.targets import find_target

    found_target = find_target(target)
    step("read checkpoint")
    parts = read_parts(open_checkpoint(checkpoint, vision), Recipe(target=target))
    weight_bytes = partial(bundle_weight_bytes, parts.sources, matrix_names(parts.components))
    folder = out.absolute().parent
    search = Search(parts, found_target, _samples(calibrate, count), folder, Progress(step, part))
    found = search.run(limit, plan_name(limit), weight_bytes)
    compared = _compare(search, weight_bytes) if plot is not None else {}
    document = _document(checkpoint, target, limit, parts, found, weight_bytes, compared)
    document |= {"out": str(out), "plot": plot and str(plot)}
    if plot is not None:
        from lorgnette.report import plots

        plot.write_bytes(plots.frontier(*_spots(document)))
    return found, document


def _samples(path: Path | None, count: int) -> SampleSet:
    from lorgnette.export.search import split_for_search
    from lorgnette.quantize.samples import default_samples, read_samples

    name = "default" if path is None else path.resolve().name
    return split_for_search(name, read_samples(path or default_samples()), count)


def _compare(search: Search, weight_bytes: WeightBytes) -> dict[str, dict[str, Any]]:
    """Named plans, measured on the same questions."""
    from lorgnette.quantize.plan import PLANS

    found = {}
    for name in COMPARED:
        loss = search.measure_plan(PLANS[name])
        found[name] = {
            "bytes": weight_bytes(PLANS[name]),
            "loss": loss.kl,
            "same_answer": loss.same_answer,
        }
    return found


def _document(
    checkpoint: Path,
    target: str,
    limit: Limit,
    parts: Parts,
    found: Found,
    weight_bytes: WeightBytes,
    compared: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Everything that was found, as JSON."""
    from lorgnette.export.search import floats_of

    def plan(chosen: tuple[int, ...]) -> QuantPlan:
        return found.plan_of(chosen)

    points = [
        {
            "bytes": weight_bytes(plan(point.chosen)),
            "bits": found.bits(point),
            "stored_bits": found.stored_bits(point),
            "predicted_loss": point.loss,
        }
        for point in found.points
    ]
    chosen = found.chosen
    return {
        "checkpoint": str(checkpoint),
        "target": target,
        "limit": {limit.kind: limit.value},
        "sample_set": found.answers.sample_set,
        "samples": len(found.answers.answers),
        "units": [
            {
                "name": unit.name,
                "weights": unit.weights,
                "scheme": unit.rules[number].scheme.full_name,
                "tried": [
                    {
                        "scheme": rule.scheme.full_name,
                        "bytes": unit.bytes(n),
                        "loss": loss.kl,
                        "same_answer": loss.same_answer,
                    }
                    for n, (rule, loss) in enumerate(zip(unit.rules, losses, strict=True))
                ],
            }
            for unit, number, losses in zip(found.units, chosen.chosen, found.losses, strict=True)
        ],
        "points": points,
        "chosen": {
            "bytes": weight_bytes(plan(chosen.chosen)),
            "bits": found.bits(chosen),
            "stored_bits": found.stored_bits(chosen),
            "predicted_loss": chosen.loss,
            "measured_loss": found.measured.kl,
            "same_answer": found.measured.same_answer,
        },
        "compared": compared,
        "kept_in_float": floats_of(parts),
        "plan": msgspec.to_builtins(found.plan),
    }


def _lines(document: dict[str, Any]) -> list[str]:
    points = document["points"]
    every = max(1, -(-len(points) // SHOWN_POINTS))
    shown = [*points[:-1:every], points[-1]]
    rows = [("bytes", "bits", "with scales", "predicted loss")]
    rows += [
        (
            f"{point['bytes']:,}",
            f"{point['bits']:.2f}",
            f"{point['stored_bits']:.2f}",
            f"{point['predicted_loss']:.2e}",
        )
        for point in shown
    ]
    chosen = document["chosen"]
    units = [
        (
            unit["name"],
            unit["scheme"],
            ", ".join(f"{tried['loss']:.1e}" for tried in unit["tried"]),
        )
        for unit in document["units"]
    ]
    floats = document["kept_in_float"]
    named = [
        f"{name}: {size(entry['bytes'])}, loss {entry['loss']:.2e}, "
        f"same answer {entry['same_answer']:.1%}"
        for name, entry in document["compared"].items()
    ]
    return [
        f"{len(points)} plans from least loss to fewest bytes, of which {len(shown)}:",
        *table(rows),
        "chosen, with the loss of each scheme that was tried:",
        *table(units),
        f"stay float32: {len(floats)} norms, biases and others, "
        f"{size(sum(entry['bytes'] for entry in floats))}",
        *named,
        f"{document['out']}: {size(chosen['bytes'])}, {chosen['bits']:.2f} bits a weight, "
        f"{chosen['stored_bits']:.2f} with scales",
        f"loss predicted {chosen['predicted_loss']:.2e}, measured {chosen['measured_loss']:.2e} "
        f"on {document['samples']} questions, same answer {chosen['same_answer']:.1%}",
    ]


def _spots(document: dict[str, Any]) -> tuple[list[Spot], dict[str, Spot]]:
    """The line of a plot, and what is marked beside it."""
    line = [(point["bytes"], point["predicted_loss"]) for point in document["points"]]
    chosen = document["chosen"]
    marked = {
        "found, measured": (chosen["bytes"], chosen["measured_loss"]),
        **{name: (entry["bytes"], entry["loss"]) for name, entry in document["compared"].items()},
    }
    return line, marked


@contextmanager
def telling() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """Tells a terminal on stderr about each step and its parts; says nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda name: None, lambda done, of: None
        return
    now, told, started = "", 0.0, 0.0

    def finish() -> None:
        if now:
            click.echo(f"\r{now} ... {time.perf_counter() - started:.1f} s\033[K", err=True)

    def step(name: str) -> None:
        nonlocal now, started
        finish()
        now, started = name, time.perf_counter()
        click.echo(f"{name} ...", err=True, nl=False)

    def part(done: int, of: int) -> None:
        nonlocal told
        if time.perf_counter() - told >= PROGRESS_S:
            told = time.perf_counter()
            click.echo(f"\r{now} ... {done} of {of}", err=True, nl=False)

    try:
        yield step, part
    finally:
        finish()
