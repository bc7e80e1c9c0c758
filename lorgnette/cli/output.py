"""What the commands share: how errors, progress, JSON and sizes appear."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

import click

from lorgnette.errors import EXIT_INTERRUPTED, LorgnetteError, MissingExtraError

EXIT_BUG = 70
"""An exception that nobody foresaw; EX_SOFTWARE of sysexits.h."""
EXIT_PIPE = 141
"""What a shell reports of a program whose reader went away: 128 + SIGPIPE."""
DEBUG = "lorgnette.debug"
"""Where a context keeps whether --debug was given."""
EXTRA_MODULES = {
    "export": ("torch", "onnx", "onnx_ir", "jinja2", "gguf"),
    "report": ("matplotlib",),
}
"""The top-level modules that an extra adds to the base install."""


class Command(click.Command):
    """A command whose errors are one line on stderr, and with --json a document on stdout."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own options and those that every command has."""
        return [*super().get_params(ctx), *_COMMON]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reads the arguments; a wrong one gives a JSON document too, where that was asked for."""
        as_json = "--json" in args
        with _usage_errors(as_json):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command and turns what it raises into a line and an exit code."""
        try:
            with _usage_errors(bool(ctx.params.get("as_json"))):
                result: object = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if ctx.meta[DEBUG]:
                traceback.print_exc()
            _leave(ctx, error)


@contextmanager
def _usage_errors(as_json: bool) -> Iterator[None]:
    """Gives a usage error, which click prints on stderr, a document on stdout too."""
    try:
        yield
    except click.UsageError as error:
        if as_json:
            print_json({"error": _plain("UsageError", error.format_message())})
        raise


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[DEBUG] = value


_COMMON = (
    click.Option(
        ["--json", "as_json"],
        is_flag=True,
        help="Print one JSON document on stdout and nothing else.",
    ),
    click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        callback=_remember,
        help="Show where in the code an error was raised.",
    ),
)


def _leave(ctx: click.Context, error: BaseException) -> NoReturn:
    """Reports what a command raised and exits with its code."""
    as_json = bool(ctx.params.get("as_json"))
    if isinstance(error, BrokenPipeError):
        ctx.exit(EXIT_PIPE)
    if isinstance(error, KeyboardInterrupt):
        if as_json:
            print_json({"error": _plain("Interrupted", "interrupted")})
        ctx.exit(EXIT_INTERRUPTED)
    if isinstance(error, MemoryError):
        error = LorgnetteError("not enough memory", got=str(error) or None)
    elif isinstance(error, OSError):
        error = LorgnetteError("the system refused", got=error)
    if isinstance(error, LorgnetteError):
        fail(error, as_json)
    if not ctx.meta[DEBUG]:
        traceback.print_exception(error)
    if as_json:
        print_json({"error": _plain("Bug", f"{type(error).__name__}: {error}")})
    click.echo("error: this is a bug in lorgnette; please report the lines above", err=True)
    ctx.exit(EXIT_BUG)


def _plain(kind: str, message: str) -> dict[str, object]:
    return {"type": kind, "message": message}


def fail(
    error: LorgnetteError, as_json: bool, document: Mapping[str, object] | None = None
) -> NoReturn:
    """Reports an error and leaves the command.

    Args:
        error: What went wrong.
        as_json: Whether stdout gets the error as a document.
        document: What the document tells besides.
    """
    if as_json:
        print_json({**(document or {}), "error": describe(error)})
    click.echo(f"error: {printable(str(error))}", err=True)
    click.get_current_context().exit(error.exit_code)


def describe(error: LorgnetteError) -> dict[str, object]:
    """An error as JSON: its line and its parts."""
    parts = {name: getattr(error, name) for name in ("what", "where", "got", "wanted", "hint")}
    return {
        "type": type(error).__name__,
        "message": str(error),
        **parts,
        "exit_code": error.exit_code,
    }


def print_json(document: Mapping[str, object]) -> None:
    """Prints the one document of a command; ASCII, so that every stdout can carry it."""
    click.echo(json.dumps(_finite(document), indent=1, allow_nan=False))


def _finite(value: object) -> object:
    """A document whose infinities and NaNs, which JSON lacks, are null."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """Text from a file or a model without what steers a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def require_extra(name: str) -> None:
    """Checks that an optional part is installed; one that is there but broken is not hidden.

    Raises:
        MissingExtraError: Naming the missing modules and what installs them.
    """
    missing = missing_modules(name)
    if missing:
        raise MissingExtraError(
            f"'lorgnette[{name}]' is not installed",
            got=f"no {', '.join(missing)}",
            hint=f"pip install 'lorgnette[{name}]'",
        )


def missing_modules(extra: str) -> list[str]:
    """The modules of an extra that are not installed; imports nothing."""
    return [name for name in EXTRA_MODULES[extra] if importlib.util.find_spec(name) is None]


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Tells a terminal on stderr about each step and its time; says nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    started: float | None = None

    def finish() -> None:
        if started is not None:
            click.echo(f" {time.perf_counter() - started:.1f} s", err=True)

    def step(name: str) -> None:
        nonlocal started
        finish()
        started = time.perf_counter()
        click.echo(f"{name} ...", err=True, nl=False)

    try:
        yield step
    finally:
        finish()


def size(count: float) -> str:
    """Bytes as people read them: three digits, in powers of 1000."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            value = count / 1000**power
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} bytes"


def table(rows: Sequence[tuple[str, ...]], indent: str = "  ") -> list[str]:
    """Rows as lines with aligned columns."""
    count = max(map(len, rows), default=0)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(count)]
    lines = []
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines
