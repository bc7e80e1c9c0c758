"""`lorgnette verify`: whether a bundle gives the original's answer on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click
import msgspec

from lorgnette.cli.output import Command, fail, print_json, printable, require_extra, steps
from lorgnette.cli.parity import parity_document, parity_lines, rung_lines
from lorgnette.cli.quality import Request, measure, show_recorded
from lorgnette.errors import ConfigError, VerifyError
from lorgnette.manifest import Bounds

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorgnette.bundle import Bundle
    from lorgnette.export.check import Parts
    from lorgnette.runtime.golden import Golden
    from lorgnette.runtime.verify import Ladder


@click.command(cls=Command)
@click.argument(
    "bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path)
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="Compare with what this checkpoint computes now, not with what the bundle recorded.",
)
@click.option(
    "--vision",
    type=click.Path(path_type=Path),
    help="The vision tower of that checkpoint, where it lies apart.",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A picture to compare on, with --against; repeatable.  [a built-in one]",
)
@click.option(
    "--quality",
    is_flag=True,
    help="Instead of the ladder, how far answers are from the original's: measured with --against, "
    "else as the export recorded it.",
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE",
    help="Pictures with questions to measure on: .jsonl or VLMEvalKit's .tsv.  [a built-in set]",
)
@click.option("--count", type=click.IntRange(min=1), help="The first so many of them.  [64]")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a report with plots there.",
)
def verify(
    bundles: tuple[Path, ...],
    against: Path | None,
    vision: Path | None,
    images: tuple[Path, ...],
    quality: bool,
    samples: Path | None,
    count: int | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Climbs the parity ladder of BUNDLE: pixels, prompt, image tokens, logits, greedy ids.

    Several bundles of one checkpoint are compared with each other as well. With --quality, tells
    how a bundle's answers differ from the original's instead. Exits with 1 where a rung fails, two
    bundles disagree, or what the plan promises of the answers does not hold.
    """
    if images and against is None:
        raise click.UsageError("--image needs --against, which computes what is to be expected")
    if vision is not None and against is None:
        raise click.UsageError("--vision needs --against, whose vision tower it is")
    request = Request(samples, count, html)
    _check_usage(request, quality, against, images)
    if len(bundles) > 1:
        if quality or against is not None:
            raise click.UsageError("--quality and --against are for one bundle at a time")
        _compare(bundles, as_json)
        return
    (bundle,) = bundles
    if quality:
        _quality(bundle, (against, vision), request, as_json)
    else:
        _ladder(bundle, (against, vision), images, as_json)


def _check_usage(
    request: Request, quality: bool, against: Path | None, images: tuple[Path, ...]
) -> None:
    """Refuses options that belong to the other thing that the command does."""
    if quality and images:
        raise click.UsageError("--image is for the ladder; --quality measures on --samples")
    measures = quality and against is not None
    for name in ("samples", "count", "html"):
        if getattr(request, name) is not None and not measures:
            raise click.UsageError(f"--{name} needs --quality and --against: it is for measuring")


def _ladder(
    bundle: Path,
    original: tuple[Path | None, Path | None],
    images: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Climbs the ladder and tells of each rung."""
    against, vision = original
    from lorgnette.bundle import open_bundle
    from lorgnette.runtime.model import Model
    from lorgnette.runtime.verify import verify as climb

    opened = open_bundle(bundle)
    with steps() as progress:
        goldens: Sequence[Golden | None] = [None]
        bounds = None
        if against is not None:
            goldens = _fresh_goldens(opened, (against, vision), images, progress)
            bounds = _bounds_against(opened)
        progress("open bundle")
        model = Model(opened)
        progress("climb the ladder")
        ladders = [climb(model, golden, bounds) for golden in goldens]
    names = [str(image) for image in images] or ["built-in picture"]
    document = _document(opened, against, dict(zip(names, ladders, strict=True)))
    if not as_json:
        for name, ladder in zip(names, ladders, strict=True):
            click.echo(printable(f"{name}:"))
            click.echo("\n".join(rung_lines(ladder)))
    for ladder in ladders:
        try:
            ladder.require(bundle)
        except VerifyError as error:
            fail(error, as_json, document)
    if as_json:
        print_json(document)


def _compare(bundles: Sequence[Path], as_json: bool) -> None:
    """Climbs the ladder with several bundles, one after the other, and compares them."""
    from lorgnette.bundle import open_bundle
    from lorgnette.runtime.golden import read_golden
    from lorgnette.runtime.model import Model
    from lorgnette.runtime.parity import compare_ladders
    from lorgnette.runtime.verify import verify as climb

    opened = [open_bundle(bundle) for bundle in bundles]
    names = [str(bundle.path) for bundle in opened]
    ladders = []
    with steps() as progress:
        for bundle in opened:
            progress(f"climb the ladder of {bundle.path}")
            ladders.append(climb(Model(bundle)))
    goldens = [(read_golden(bundle), bundle.manifest.golden.bounds) for bundle in opened]
    comparison = compare_ladders(
        [(name, ladder, *one) for name, ladder, one in zip(names, ladders, goldens, strict=True)]
    )
    documents = [
        _document(bundle, None, {"built-in picture": ladder})
        for bundle, ladder in zip(opened, ladders, strict=True)
    ]
    document = {"bundles": documents, **parity_document(comparison)}
    if not as_json:
        click.echo(printable("\n".join(parity_lines(names, ladders, comparison))))
    try:
        for name, ladder in zip(names, ladders, strict=True):
            ladder.require(name)
        comparison.require(" and ".join(names))
    except VerifyError as error:
        fail(error, as_json, document)
    if as_json:
        print_json(document)


def _quality(
    bundle: Path, against: tuple[Path | None, Path | None], request: Request, as_json: bool
) -> None:
    """Tells how far the bundle's answers are from the original's."""
    from lorgnette.bundle import open_bundle

    opened = open_bundle(bundle)
    checkpoint, vision = against
    if checkpoint is None:
        show_recorded(opened, as_json)
        return

    def read() -> Parts:
        with steps() as progress:
            return _read_original(opened, (checkpoint, vision), progress)

    measure(opened, checkpoint, read, request, as_json)


def _read_original(
    bundle: Bundle, against: tuple[Path, Path | None], progress: Callable[[str], None]
) -> Parts:
    """The checkpoint that a bundle was made from, read the way the bundle was asked for.

    Raises:
        ConfigError: The checkpoint is another model than the bundle was made from.
    """
    require_extra("export")
    from lorgnette.export.families import open_checkpoint
    from lorgnette.export.pipeline import read_parts

    progress("read checkpoint")
    parts = read_parts(open_checkpoint(*against), bundle.manifest.recipe)
    if parts.spec != bundle.manifest.spec:
        raise ConfigError(
            "the checkpoint is another model than the bundle's",
            where=against[0],
            got=_differences(parts.spec, bundle.manifest.spec),
            hint="give the checkpoint that the bundle was exported from",
        )
    return parts


def _fresh_goldens(
    bundle: Bundle,
    against: tuple[Path, Path | None],
    images: Sequence[Path],
    progress: Callable[[str], None],
) -> list[Golden]:
    """Golden data computed from the checkpoint the way the bundle was asked for.

    Args:
        bundle: The bundle.
        against: The checkpoint, and its vision tower where that lies apart.
        images: Pictures to compute them for; none takes the golden one.
        progress: Told about each step.

    Raises:
        ConfigError: The checkpoint is another model than the bundle was made from.
    """
    require_extra("export")
    from lorgnette.export.check import make_golden
    from lorgnette.export.pipeline import quantize_parts
    from lorgnette.quantize.plan import PLANS
    from lorgnette.quantize.plan_file import plan_for
    from lorgnette.runtime.image import load_image

    pictures = [load_image(image) for image in images]
    parts = _read_original(bundle, against, progress)
    plan = plan_for(bundle.manifest.recipe)
    with TemporaryDirectory() as folder:
        # Calibrated codes are not what another machine would choose again: see `_bounds_against`.
        known = replace(PLANS["fp32"], rotate=plan.rotate) if plan.needs_samples else plan
        quantized = quantize_parts(parts, known, Path(folder) / "model", (), progress)
        if not pictures:
            return [make_golden(parts, quantized, progress)]
        return [make_golden(parts, quantized, progress, picture) for picture in pictures]


def _bounds_against(bundle: Bundle) -> Bounds:
    """How far a bundle may be from what its checkpoint gives now.

    Codes that come from calibration depend on the last bit of sums, so another machine would
    choose others. Such a bundle is compared with the original's own weights, and may be as far
    from it as rounding cost when it was made, five times over: that is one figure for all
    steps, and single ones lie apart.
    """
    from lorgnette.quantize.plan_file import plan_for
    from lorgnette.runtime.golden import read_golden

    bounds = bundle.manifest.golden.bounds
    if not plan_for(bundle.manifest.recipe).needs_samples:
        return bounds
    text = read_golden(bundle).text
    return Bounds(
        image_tokens=bounds.image_tokens + 5 * text.rounding_image_tokens,
        logits=bounds.logits + 5 * text.rounding_logits,
        greedy_ids_equal=False,
    )


def _differences(got: msgspec.Struct, wanted: msgspec.Struct, prefix: str = "") -> str:
    """The fields in which two specs differ, with both values."""
    found = []
    for name in got.__struct_fields__:
        a, b = getattr(got, name), getattr(wanted, name)
        if isinstance(a, msgspec.Struct) and a != b:
            found.append(_differences(a, b, f"{prefix}{name}."))
        elif a != b:
            found.append(f"{prefix}{name} {a} instead of {b}")
    return ", ".join(found)


def _document(bundle: Bundle, against: Path | None, ladders: dict[str, Ladder]) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "against": None if against is None else str(against),
        "passed": all(ladder.passed for ladder in ladders.values()),
        "ladders": [
            {"picture": name, "rungs": [msgspec.to_builtins(rung) for rung in ladder.rungs]}
            for name, ladder in ladders.items()
        ],
    }
