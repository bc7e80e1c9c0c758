"""`lorgnette profile`: what a bundle costs on this machine, phase by phase."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorgnette.cli.output import Command, print_json, printable, require_extra, steps, table
from lorgnette.errors import LorgnetteError
from lorgnette.files import write_whole

if TYPE_CHECKING:
    from lorgnette.runtime.profile.compare import Comparison
    from lorgnette.runtime.profile.document import Profile
    from lorgnette.runtime.profile.measure import Asked

SHOWN_GROUPS = 6
"""Groups of operators of an entry point that are printed; JSON has every node."""
MEASURING = ("threads", "sweep", "keep_threads", "runs", "seconds", "image", "no_cold", "device")
"""Options that say nothing to --compare."""


@click.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="A.json B.json",
    help="Compare two documents in place of measuring.",
)
@click.option("--threads", type=int, help="Threads of the engine.  [every core]")
@click.option(
    "--sweep",
    metavar="N,N,...",
    help="Numbers of threads to try besides; none for none.  [1, 2, 4, ... every core]",
)
@click.option(
    "--keep-threads",
    is_flag=True,
    help="Keep the fastest number of threads for later openings of BUNDLE on this machine.",
)
@click.option("--runs", type=int, default=10, show_default=True, help="Most runs of a figure.")
@click.option(
    "--seconds",
    type=float,
    default=10.0,
    show_default=True,
    help="After these no run of a figure is begun, if there were three.",
)
@click.option("--image", type=click.Path(path_type=Path), help="The picture.  [a drawn one]")
@click.option("--no-cold", is_flag=True, help="Leave the bundle in the system's file cache.")
@click.option("--device", type=click.Choice(["host"]), default="host", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the JSON document there.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a report with plots there.")
def profile(
    bundle: Path | None,
    compare: tuple[Path, Path] | None,
    threads: int | None,
    sweep: str | None,
    keep_threads: bool,
    runs: int,
    seconds: float,
    image: Path | None,
    no_cold: bool,
    device: str,
    out: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Measures what BUNDLE costs here: start, first token, each phase, memory, operators.

    Takes a minute or more, best with nothing else running. The document that --json prints and
    --out writes is described in docs/profile.md; --compare tells which differences of two are
    larger than the noise.
    """
    _check_files(out, html)
    if compare is not None:
        _check_alone(bundle)
        _compare(compare, out, html, as_json)
        return
    if bundle is None:
        raise click.UsageError("BUNDLE is missing (or --compare A.json B.json)")
    from lorgnette.runtime.profile.measure import Asked

    counts = _counts(sweep)
    if keep_threads and counts == ():
        raise click.UsageError("--keep-threads wants a --sweep to choose from")
    asked = Asked(threads, counts, runs, seconds, image, cold=not no_cold)
    _measure(bundle, asked, out, html, as_json, keep_threads)


def _measure(
    bundle: Path,
    asked: Asked,
    out: Path | None,
    html: Path | None,
    as_json: bool,
    keep: bool,
) -> None:
    from lorgnette.runtime.profile.document import encode_profile
    from lorgnette.runtime.profile.measure import measure

    with steps() as tell:
        found = measure(bundle, asked, tell)
    if out is not None:
        _write(out, encode_profile(found))
    if html is not None:
        from lorgnette.report.profile_html import render_profile

        _write(html, render_profile(found))
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(found))
    else:
        _print(profile_text(found))
    if keep:
        _keep_threads(bundle, found)


def _keep_threads(path: Path, found: Profile) -> None:
    """Keeps the fastest number of threads, and tells it on stderr."""
    from lorgnette.bundle import open_bundle
    from lorgnette.runtime.profile.measure import fastest
    from lorgnette.runtime.threads import keep_threads

    count = fastest(found.sweep)
    if count is None:
        reason = found.settings.sweep_left_out or "no number of threads could be measured"
        raise LorgnetteError("no number of threads to keep", where=path, got=reason)
    try:
        kept = keep_threads(open_bundle(path), count)
    except OSError as error:
        raise LorgnetteError(
            "cannot keep the number of threads", where=error.filename, got=error.strerror
        ) from error
    click.echo(f"{count} thread{'s' if count > 1 else ''} from now on, kept in {kept}", err=True)


def _compare(paths: tuple[Path, Path], out: Path | None, html: Path | None, as_json: bool) -> None:
    import msgspec

    from lorgnette.runtime.profile.compare import compare
    from lorgnette.runtime.profile.document import read_profile

    found = compare(read_profile(paths[0]), read_profile(paths[1]))
    if out is not None:
        _write(out, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    if html is not None:
        from lorgnette.report.profile_html import render_comparison

        _write(html, render_comparison(found))
    if as_json:
        print_json(msgspec.to_builtins(found))
    else:
        _print(comparison_text(found))


def profile_text(found: Profile) -> list[str]:
    """A profile for a terminal: what a person feels first, then where it comes from."""
    from lorgnette.report import profile_lines as lines

    told = [lines.heading(found), *lines.noise_lines(found)]
    for name, rows in (("", lines.headline_rows(found)), ("phases", lines.phase_rows(found))):
        told += ["", *table([(name, *lines.HEAD[1:]), *lines.measured(rows)], indent="")]
        told += lines.unmeasured(rows)
    told += ["", "memory", *table([lines.MEMORY_HEAD, *lines.memory_rows(found)])]
    if found.operators.entry_points is None:
        told += ["", f"operators: not measured: {found.operators.reason}"]
    for name, entry in (found.operators.entry_points or {}).items():
        rows = [lines.OPERATOR_HEAD, *lines.operator_rows(entry, SHOWN_GROUPS)]
        told += ["", lines.operator_title(name, entry)]
        told += [f"  {lines.operator_line(entry)}", *table(rows)]
    if found.settings.sweep_left_out:
        told += ["", f"by threads: not measured: {found.settings.sweep_left_out}"]
    if found.sweep:
        told += ["", "by threads", *table([lines.SWEEP_HEAD, *lines.sweep_rows(found)])]
    return [*told, "", "machine", *table(lines.condition_rows(found))]


def comparison_text(found: Comparison) -> list[str]:
    """A comparison for a terminal."""
    from lorgnette.report import profile_lines as lines

    told = [f"A: {found.a}", f"B: {found.b}", *(f"warning: {each}" for each in found.warnings)]
    return [*told, "", *table([lines.COMPARED, *lines.comparison_rows(found)], indent="")]


def _write(path: Path, data: bytes) -> None:
    """Writes a file.

    Raises:
        LorgnetteError: The system refuses.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        raise _unwritable(path, error.strerror or error) from error


def _print(told: Iterable[str]) -> None:
    for line in told:
        click.echo(printable(line))


def _counts(sweep: str | None) -> tuple[int, ...] | None:
    """Numbers of threads as they were typed."""
    if sweep is None:
        return None
    if sweep == "none":
        return ()
    words = sweep.split(",")
    if not all(word.strip().isdecimal() and len(word) < 10 for word in words):
        raise click.UsageError(f"--sweep wants numbers and commas, or none: got {sweep!r}")
    return tuple(dict.fromkeys(int(word) for word in words))


def _check_alone(bundle: Path | None) -> None:
    """Refuses what --compare would not listen to."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    given = [name for name in MEASURING if context.get_parameter_source(name) is not default]
    if bundle is not None:
        raise click.UsageError("--compare takes two documents and no BUNDLE")
    if given:
        raise click.UsageError(f"--compare measures nothing: no --{given[0].replace('_', '-')}")


def _check_files(out: Path | None, html: Path | None) -> None:
    """Refuses a file that could not be written, before anything is measured."""
    if html is not None:
        require_extra("report")
    if out is not None and html is not None and out.resolve() == html.resolve():
        raise LorgnetteError("--out and --html are the same file", where=out)
    for path in (out, html):
        if path is None:
            continue
        final = path.resolve()
        if final.exists() and not final.is_file():
            raise _unwritable(path, "not a plain file")
        try:
            with tempfile.NamedTemporaryFile(dir=final.parent, prefix=f".{final.name}.partial-"):
                pass
        except OSError as error:
            raise _unwritable(path, error.strerror or error) from error


def _unwritable(path: Path, reason: object) -> LorgnetteError:
    return LorgnetteError("cannot write the file", where=path, got=reason)
