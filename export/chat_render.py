"""Runs `jinja_worker.py` on a chat template and turns what can go wrong into errors."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from lorgnette.errors import ConfigError, MissingExtraError

CPU_SECONDS = 5
"""Processor time for all conversations together; a common template takes 0.1 s."""
WALL_SECONDS = 60
"""Time that passes, for systems without such a limit."""
_MEMORY_BYTES = 1 << 30
_OUTPUT_CHARS = 32 << 20


def render_chats(
    template: str, chats: list[dict[str, object]], variables: dict[str, str], where: str
) -> list[dict[str, str]]:
    """Renders conversations, each to `{"text": ...}` or `{"error": why}`.

    Args:
        template: The jinja2 source.
        chats: For each conversation `messages` and `add_generation_prompt`.
        variables: What else the template may read, such as `bos_token`.
        where: The file the template came from, for error messages.

    Raises:
        ConfigError: The template is refused as a whole, or was stopped at a limit.
        MissingExtraError: jinja2 is not installed.
    """
    spec = find_spec("jinja2")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "jinja2 is not installed", where=where, hint="pip install 'lorgnette[export]'"
        )
    request = {
        "template": template,
        "variables": variables,
        "chats": chats,
        "limits": {
            "cpu_seconds": CPU_SECONDS,
            "memory_bytes": _MEMORY_BYTES,
            "output_chars": _OUTPUT_CHARS,
        },
        "search_path": [str(Path(spec.origin).parent.parent)],
    }
    command = [sys.executable, "-I", str(Path(__file__).with_name("jinja_worker.py"))]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _runaway(where) from error
    if done.returncode < 0:
        raise _runaway(where)
    if done.returncode != 0:
        raise ConfigError(
            "the chat template could not be run",
            where=where,
            got=(done.stderr.decode(errors="replace").splitlines() or ["nothing"])[-1][:300],
        )
    answer = json.loads(done.stdout)
    if "refused" in answer:
        line = f" (line {answer['line']})" if answer["line"] is not None else ""
        raise ConfigError(f"the chat template{line} is refused", where=where, got=answer["refused"])
    renders: list[dict[str, str]] = answer["renders"]
    return renders


def _runaway(where: str) -> ConfigError:
    """The error for a template that was stopped."""
    return ConfigError(
        "the chat template does not finish",
        where=where,
        wanted=f"{CPU_SECONDS} s of processor time for all conversations, at most",
    )
