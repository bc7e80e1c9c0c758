"""Starts the processes of jobs, and reads what they reply."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TypeVar

import msgspec

import lorgnette
from lorgnette.errors import LorgnetteError, ProfileError
from lorgnette.runtime.profile.bench import Tell, say_nothing
from lorgnette.runtime.profile.request import STEP, Failure, Job

Reply = TypeVar("Reply")


def run_job(job: Job, type_: type[Reply], tell: Tell = say_nothing) -> tuple[Reply, float]:
    """Does a job in a process of its own, which ends with this one's interrupt.

    Args:
        job: The job.
        type_: What it replies.
        tell: Takes the names of the steps that the process tells of.

    Returns:
        The reply, and when the process was started, by `time.monotonic`.

    Raises:
        LorgnetteError: What the job raised, or that its process failed.
    """
    with tempfile.TemporaryDirectory(prefix="lorgnette-profile-") as folder:
        asked, reply = Path(folder, "job.json"), Path(folder, "reply.json")
        said = Path(folder, "stderr")
        asked.write_bytes(msgspec.json.encode(job))
        command = [sys.executable, "-m", "lorgnette.runtime.profile.child", str(asked), str(reply)]
        with said.open("wb") as errors:
            started = time.monotonic()
            code = _wait(command, errors.fileno(), tell)
        if code == 0 and reply.is_file():
            return msgspec.json.decode(reply.read_bytes(), type=type_), started
        failure = Path(f"{reply}.failure")
        if failure.is_file():
            raise _error(msgspec.json.decode(failure.read_bytes(), type=Failure))
        raise ProfileError("a measuring process failed", where=job.kind, got=_last_line(said, code))


def _wait(command: list[str], errors: int, tell: Tell) -> int:
    """Runs a command to its end; never leaves it behind."""
    # What this process imports lorgnette from, be it installed or a checkout.
    home = str(Path(lorgnette.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, "PYTHONPATH": path},
    )
    with process:
        try:
            # Whatever else is printed by an engine is passed over.
            for line in process.stdout or ():
                if line.startswith(STEP):
                    tell(line.removeprefix(STEP).decode("utf-8", "replace").strip())
            return process.wait()
        finally:
            process.kill()


def _error(failure: Failure) -> LorgnetteError:
    error = LorgnetteError(
        failure.what,
        where=failure.where,
        got=failure.got,
        wanted=failure.wanted,
        hint=failure.hint,
    )
    error.exit_code = failure.exit_code
    return error


def _last_line(said: Path, code: int) -> str:
    lines = said.read_text("utf-8", "replace").strip().splitlines()
    return f"exit code {code}: {lines[-1]}" if lines else f"exit code {code}"
