"""The process of one job: `python -m lorgnette.runtime.profile.child JOB.json REPLY`.

The reply is JSON, or a `Failure` under `.failure`.
"""

from __future__ import annotations

import time

ENTERED = time.monotonic()

import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import msgspec  # noqa: E402

from lorgnette.errors import LorgnetteError  # noqa: E402
from lorgnette.runtime.profile.request import STEP, Failure, Job, Started  # noqa: E402


def start(job: Job) -> Started:
    """Opens the bundle and, as `lorgnette run` does, asks before everything is loaded."""
    from lorgnette.runtime.model import open_model

    imported = time.monotonic()
    only_open = job.kind == "ready"
    model = open_model(job.bundle, threads=job.threads, wait=only_open)
    ready = time.monotonic()
    if only_open:
        return Started(entered=ENTERED, imported=imported, ready=ready, first_token=None)
    from lorgnette.runtime.profile.answers import ONE_TOKEN, QUESTION
    from lorgnette.runtime.profile.picture import one_tile, with_preprocess

    chat = with_preprocess(model, one_tile(model.manifest.preprocess)).chat()
    next(chat.send(QUESTION, [job.picture or ""], ONE_TOKEN), "")
    return Started(entered=ENTERED, imported=imported, ready=ready, first_token=time.monotonic())


def do(job: Job, folder: Path) -> object:
    """Does a job; what comes out can be written as JSON.

    Args:
        job: The job.
        folder: Where it may leave files, which the process that asked removes.
    """
    if job.kind in ("start", "ready"):
        return start(job)
    from lorgnette.runtime.profile import jobs

    if job.kind == "operators":
        return jobs.operators_job(job, folder)
    if job.kind == "phases":
        return jobs.phases_job(job, tell)
    return jobs.memory_job(job) if job.kind == "memory" else jobs.sweep_job(job)


def tell(step: str) -> None:
    """Tells the process that asked what is measured next."""
    sys.stdout.buffer.write(STEP + step.encode() + b"\n")
    sys.stdout.buffer.flush()


def main(asked: str, reply: str) -> int:
    """Reads a job, does it and writes the reply; an exit code."""
    job = msgspec.json.decode(Path(asked).read_bytes(), type=Job)
    try:
        Path(reply).write_bytes(msgspec.json.encode(do(job, Path(reply).parent)))
    except LorgnetteError as error:
        failure = Failure(
            what=error.what,
            where=error.where,
            got=error.got,
            wanted=error.wanted,
            hint=error.hint,
            exit_code=error.exit_code,
        )
        Path(f"{reply}.failure").write_bytes(msgspec.json.encode(failure))
        return failure.exit_code
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stderr.flush()
    # The reply is written. Libraries of engines may abort while Python ends around their threads.
    os._exit(code)
