"""The entry point `lorgnette`."""

from __future__ import annotations

import importlib
import os
import sys

import click

import lorgnette
from lorgnette.errors import EXIT_INTERRUPTED

COMMANDS = {
    "export": "export",
    "search": "search",
    "run": "run",
    "profile": "profile",
    "evaluate": "evaluate",
    "verify": "verify",
    "inspect": "inspect",
    "list": "list_known",
    "doctor": "doctor",
}
"""Names of commands, each also the file beside this one that holds it, and what it is there."""


ABORTS_AT_EXIT = "coreai.runtime"
"""What now and then aborts when the interpreter takes it down: its process is left at once."""


class Commands(click.Group):
    """The commands, each imported when it is asked for: a run's first word waits for no other."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in alphabetical order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"lorgnette.cli.{cmd_name}")
        found: click.Command = getattr(module, COMMANDS[cmd_name])
        return found


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(lorgnette.__version__, prog_name="lorgnette")
def cli() -> None:
    """Compiles small vision-language models for edge devices, and runs them.

    Exit codes: 0 done, 1 a check failed, 2 wrong input, 70 a bug in lorgnette, 130 interrupted,
    141 the reader of the output went away.
    """


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
    except SystemExit as end:
        if ABORTS_AT_EXIT in sys.modules and isinstance(end.code, int):
            _give_up_stdout_if_broken()
            sys.stderr.flush()
            os._exit(end.code)
        raise
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
