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
    from lorgnette.export.search import Found, Limit, Samples, Search, WeightBytes
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
@click.option("--max-bytes", type=click.IntRange(min=1), help="The most bytes of all weights.")
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
