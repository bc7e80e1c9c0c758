"""The entry point `lorgnette`."""

from __future__ import annotations

import os
import sys

import click

import lorgnette
from lorgnette.cli.doctor import doctor
from lorgnette.cli.evaluate import evaluate
from lorgnette.cli.export import export
from lorgnette.cli.inspect import inspect
from lorgnette.cli.list import list_known
from lorgnette.cli.profile import profile
from lorgnette.cli.run import run
from lorgnette.cli.search import search
from lorgnette.cli.verify import verify
from lorgnette.errors import EXIT_INTERRUPTED


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(lorgnette.__version__, prog_name="lorgnette")
def cli() -> None:
    """Compiles small vision-language models for edge devices, and runs them.

    Exit codes: 0 done, 1 a check failed, 2 wrong input, 70 a bug in lorgnette, 130 interrupted,
    141 the reader of the output went away.
    """


for command in (export, search, run, profile, evaluate, verify, inspect, list_known, doctor):
    cli.add_command(command)


def main() -> None:
    """Runs the command line and exits with its code."""
    for stream in (sys.stdout, sys.stderr):
        # An answer may hold characters that the terminal's encoding lacks: show them as '?'.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        cli(prog_name="lorgnette")
    except KeyboardInterrupt:  # before or after a command, which handle it themselves
        sys.exit(EXIT_INTERRUPTED)
    finally:
        _give_up_stdout_if_broken()


def _give_up_stdout_if_broken() -> None:
    """Keeps Python from failing once more, with another exit code, on what it could not print."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
