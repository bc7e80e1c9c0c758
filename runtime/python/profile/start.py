"""Starts from nothing: a new process each, with and without the bundle in the file cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from PIL import Image

from lorgnette.bundle import Bundle
from lorgnette.runtime.profile.bench import Bench
from lorgnette.runtime.profile.document import Start
from lorgnette.runtime.profile.pagecache import cached_share, evict, files_of
from lorgnette.runtime.profile.parent import run_job
from lorgnette.runtime.profile.picture import draw
from lorgnette.runtime.profile.request import Job, Started
from lorgnette.runtime.profile.stats import figure, unknown

MOST_RUNS = 5
"""Starts are long, and alike."""
COLD = 0.05
"""A bundle of which no more than this is in memory counts as forgotten."""
NOT_ASKED = "left out by --no-cold"


class Moments(NamedTuple):
    """One process, by `time.monotonic`."""

    begun: float
    told: Started

    @property
    def first_token_ms(self) -> float:
        """From its start until the first token, where it was asked for one."""
        return ((self.told.first_token or self.told.ready) - self.begun) * 1e3


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
    with tempfile.TemporaryDirectory(prefix="lorgnette-profile-") as folder:
        if job.picture is None:
            # A file, as people have pictures: drawing one would count as part of a start.
            drawn = Path(folder, "drawn.png")
            Image.fromarray(draw(bundle.manifest.preprocess.tile_size)).save(drawn)
            job = msgspec.structs.replace(job, picture=str(drawn))
        return _starts(bundle, bench, job, cold)


def _starts(bundle: Bundle, bench: Bench, job: Job, cold: bool) -> dict[str, Start]:
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
    shares: list[float | None] = []

    def forget() -> None:
        evict(files)
        shares.append(cached_share(files))

    return _start("cold start", bench, job, forget, shares)


def _warm(bundle: Bundle, bench: Bench, job: Job) -> Start:
    shares: list[float | None] = []
    files = files_of(bundle)
    return _start("warm start", bench, job, lambda: shares.append(cached_share(files)), shares)


def _start(
    name: str, bench: Bench, job: Job, before: Callable[[], None], shares: list[float | None]
) -> Start:
    """Two processes a run: one that answers, and one that only gets ready."""
    answered: list[Moments] = []
    opened: list[Moments] = []

    def run() -> float:
        for kind, moments in (("ready", opened), ("start", answered)):
            before()
            told, begun = run_job(msgspec.structs.replace(job, kind=kind), Started)
            moments.append(Moments(begun, told))
        return answered[-1].first_token_ms

    kept = len(bench.samples(name, run, min(bench.runs, MOST_RUNS)))
    known = [share for share in shares[-2 * kept :] if share is not None]
    opened, answered = opened[-kept:], answered[-kept:]
    return Start(
        ready_ms=figure([(each.told.ready - each.begun) * 1e3 for each in opened]),
        first_token_ms=figure([each.first_token_ms for each in answered]),
        python_ms=figure([(each.told.entered - each.begun) * 1e3 for each in opened]),
        imports_ms=figure([(each.told.imported - each.told.entered) * 1e3 for each in opened]),
        load_ms=figure([(each.told.ready - each.told.imported) * 1e3 for each in opened]),
        cached_share=max(known) if known else None,
        reason="" if known else "the system does not tell what is in its file cache",
    )
