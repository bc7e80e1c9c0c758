"""Starts from nothing: a new process each, with and without the bundle in the file cache."""

from __future__ import annotations

import msgspec

from lorgnette.bundle import Bundle
from lorgnette.runtime.profile.bench import Bench
from lorgnette.runtime.profile.document import Start
from lorgnette.runtime.profile.pagecache import cached_share, evict, files_of
from lorgnette.runtime.profile.parent import run_job
from lorgnette.runtime.profile.request import Job, Started
from lorgnette.runtime.profile.stats import figure, unknown

MOST_RUNS = 5
"""Starts are long, and alike."""
COLD = 0.05
"""A bundle of which no more than this is in memory counts as forgotten."""
NOT_ASKED = "left out by --no-cold"
Moments = list[tuple[float, Started]]


def measure_starts(bundle: Bundle, bench: Bench, job: Job, cold: bool) -> dict[str, Start]:
    """Cold and warm starts.

    Args:
        bundle: The bundle, which no process should have open.
        bench: Repeats the runs.
        job: What each process is to do.
        cold: Whether the system may be asked to forget the bundle's files.

    Raises:
        LorgnetteError: The bundle cannot be run.
    """
    if not cold:
        return {"cold": no_start(NOT_ASKED), "warm": _warm(bundle, bench, job)}
    files = files_of(bundle)
    reason = evict(files)
    share = cached_share(files)
    if not reason and share is not None and share > COLD:
        reason = f"the system keeps {share:.0%} of the bundle in memory"
    found = no_start(reason) if reason else _cold(bundle, bench, job)
    return {"cold": found, "warm": _warm(bundle, bench, job)}


def no_start(reason: str) -> Start:
    """A start that could not be measured."""
    none = unknown(reason)
    return Start(
        ready_ms=none,
        first_token_ms=none,
        python_ms=none,
        imports_ms=none,
        load_ms=none,
        cached_share=None,
        reason=reason,
    )


def _cold(bundle: Bundle, bench: Bench, job: Job) -> Start:
    files = files_of(bundle)
    moments: Moments = []
    shares: list[float | None] = []

    def run() -> float:
        evict(files)
        shares.append(cached_share(files))
        return _start(job, moments)

    kept = len(bench.samples("cold start", run, min(bench.runs, MOST_RUNS)))
    return _figures(moments[-kept:], shares[-kept:])


def _warm(bundle: Bundle, bench: Bench, job: Job) -> Start:
    moments: Moments = []
    # Not each time: each run leaves the bundle as it found it.
    kept = len(
        bench.samples("warm start", lambda: _start(job, moments), min(bench.runs, MOST_RUNS))
    )
    return _figures(moments[-kept:], [cached_share(files_of(bundle))])


def _start(job: Job, moments: Moments) -> float:
    """One start; milliseconds until the first token."""
    told, begun = run_job(msgspec.structs.replace(job, kind="start"), Started)
    moments.append((begun, told))
    return (told.first_token - begun) * 1e3


def _figures(moments: Moments, shares: list[float | None]) -> Start:
    known = [share for share in shares if share is not None]
    return Start(
        ready_ms=figure([(told.ready - begun) * 1e3 for begun, told in moments]),
        first_token_ms=figure([(told.first_token - begun) * 1e3 for begun, told in moments]),
        python_ms=figure([(told.entered - begun) * 1e3 for begun, told in moments]),
        imports_ms=figure([(told.imported - told.entered) * 1e3 for _, told in moments]),
        load_ms=figure([(told.ready - told.imported) * 1e3 for _, told in moments]),
        cached_share=max(known) if known else None,
        reason="" if known else "the system does not tell what is in its file cache",
    )
