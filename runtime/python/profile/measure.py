"""A whole profile of a bundle, step by step."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from lorgnette.bundle import MANIFEST, Bundle, open_bundle
from lorgnette.errors import LorgnetteError, RequestError
from lorgnette.runtime.engines import check_engine
from lorgnette.runtime.interface import check_interface
from lorgnette.runtime.profile.bench import Bench, Tell, say_nothing
from lorgnette.runtime.profile.document import (
    MAJOR,
    MINOR,
    NAME,
    BundleInfo,
    Memory,
    Operators,
    Profile,
    Settings,
    Threads,
    Version,
)
from lorgnette.runtime.profile.flat import figures_of
from lorgnette.runtime.profile.jobs import Warm
from lorgnette.runtime.profile.machine import EnergyMeter, both, conditions, describe_machine
from lorgnette.runtime.profile.memory import no_memory
from lorgnette.runtime.profile.noise import NoiseWatch
from lorgnette.runtime.profile.parent import run_job
from lorgnette.runtime.profile.picture import DRAWN, FreshPictures
from lorgnette.runtime.profile.request import Job
from lorgnette.runtime.profile.start import measure_starts
from lorgnette.runtime.profile.stats import unknown
from lorgnette.runtime.threads import usable_cores

OWN_THREADS = {"coreai": "how many threads the engine computes with cannot be said"}
"""Engines that do not listen to a number of threads."""
ANSWER_TOKENS = 64
"""Tokens of the answer that a number of threads is chosen for."""
RUNS = 10
SECONDS = 10.0
Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        threads: Threads of the engine, None for every core this process may use.
        sweep: Numbers of threads that are tried besides; None takes 1, 2, 4 and so on up to the
            cores.
        runs: The most runs of a figure.
        seconds: After which no run of a figure is begun, if there are three.
        image: The picture; None draws one as large as a tile.
        cold: Whether the system may be asked to forget the bundle's files.

    Raises:
        RequestError: A number is out of range.
    """

    threads: int | None = None
    sweep: tuple[int, ...] | None = None
    runs: int = RUNS
    seconds: float = SECONDS
    image: Path | None = None
    cold: bool = True

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name, values in (
            ("threads", () if self.threads is None else (self.threads,)),
            ("sweep", self.sweep or ()),
            ("runs", (self.runs,)),
        ):
            if any(value < 1 for value in values):
                raise RequestError(f"{name} is out of range", got=min(values), wanted="1 or more")
        if not 0 <= self.seconds < float("inf"):
            raise RequestError("seconds is out of range", got=self.seconds, wanted="0 or more")


def measure(path: Path, asked: Asked, tell: Tell = say_nothing) -> Profile:
    """Measures a bundle on this machine.

    Everything that runs the bundle does so in a process of its own, one at a time: nothing is in
    memory twice, starts are cold, and what an engine leaves behind is nobody's.

    Args:
        path: The bundle.
        asked: What is to be measured.
        tell: Takes the name of each step.

    Raises:
        BundleError: The bundle is damaged, or nothing here runs it.
        ImageError: The image is none.
        RequestError: A number is out of range.
    """
    bundle = open_bundle(path)
    check_interface(bundle)
    check_engine(bundle)
    pictures = FreshPictures(asked.image, bundle.manifest.preprocess.tile_size)
    settings = _settings(asked, pictures, bundle.manifest.engine)
    watch, meter, before = NoiseWatch(), EnergyMeter(), conditions()
    bench = Bench(asked.runs, asked.seconds, tell, watch, meter)
    job = Job(
        kind="start",
        bundle=str(path),
        threads=settings.threads,
        picture=None if asked.image is None else str(asked.image),
        runs=asked.runs,
        seconds=asked.seconds,
    )
    start = measure_starts(bundle, bench, job, asked.cold)
    memory = _memory(job, tell)
    operators = _operators(job, tell)
    sweep = _sweep(job, settings.sweep, tell)
    warm = run_job(msgspec.structs.replace(job, kind="phases"), Warm, tell)[0]
    watch.calibration_ms.extend(warm.calibration_ms)
    found = Profile(
        schema=Version(name=NAME, major=MAJOR, minor=MINOR),
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        bundle=describe_bundle(bundle),
        machine=describe_machine(bundle.manifest.engine, usable_cores()),
        settings=settings,
        before=before,
        after=conditions(),
        noise=watch.finish({}, usable_cores()),
        energy=both(meter.energy(), warm.energy),
        start=start,
        answers=warm.answers,
        phases=warm.phases,
        memory=memory,
        operators=operators,
        sweep=sweep,
    )
    # Which figure scatters most is known when all are there.
    noise = watch.finish(figures_of(found), usable_cores())
    return msgspec.structs.replace(found, noise=noise)


def describe_bundle(bundle: Bundle) -> BundleInfo:
    """What a bundle is, and how its bytes are shared out."""
    manifest = bundle.manifest
    kinds: dict[str, int] = {}
    for entry in manifest.files:
        folder = entry.path.partition("/")[0] if "/" in entry.path else "other"
        weights = entry.path.startswith("graphs/") and entry.path.endswith((".bin", ".mlirb.bin"))
        kind = "weights" if weights else folder
        kinds[kind] = kinds.get(kind, 0) + entry.bytes
    data = (bundle.path / MANIFEST).read_bytes()
    kinds["manifest"] = len(data)
    return BundleInfo(
        name=bundle.path.resolve().name,
        checkpoint=manifest.checkpoint,
        family=manifest.spec.family,
        variant=manifest.spec.variant,
        target=manifest.recipe.target,
        quant=manifest.recipe.quant,
        engine=manifest.engine,
        context_length=manifest.context_length,
        bytes=sum(kinds.values()),
        bytes_by_kind=kinds,
        manifest_sha256=hashlib.sha256(data).hexdigest(),
    )


def _settings(asked: Asked, pictures: FreshPictures, engine: str) -> Settings:
    cores = usable_cores()
    left_out = OWN_THREADS.get(engine, "") if asked.sweep is None else ""
    powers = (2**power for power in range(cores.bit_length()))
    every = () if left_out else tuple(sorted({*powers, cores}))
    return Settings(
        device="host",
        threads=asked.threads or cores,
        runs=asked.runs,
        seconds=asked.seconds,
        picture=DRAWN if asked.image is None else asked.image.name,
        picture_size=pictures.size,
        sweep=every if asked.sweep is None else asked.sweep,
        cold=asked.cold,
        sweep_left_out=left_out,
    )


def _memory(job: Job, tell: Tell) -> dict[str, Memory]:
    tell("memory")
    return _or_reason(
        msgspec.structs.replace(job, kind="memory"),
        dict[str, Memory],
        lambda reason: {"open": no_memory(reason)},
    )


def _operators(job: Job, tell: Tell) -> Operators:
    tell("operators")
    return _or_reason(
        msgspec.structs.replace(job, kind="operators"),
        Operators,
        lambda reason: Operators(entry_points=None, reason=reason),
    )


def _sweep(job: Job, counts: tuple[int, ...], tell: Tell) -> dict[str, Threads]:
    found = {}
    for count in counts:
        tell(f"{count} thread{'s' if count > 1 else ''}")
        found[str(count)] = _or_reason(
            msgspec.structs.replace(job, kind="sweep", threads=count), Threads, _no_threads
        )
    return found


def _no_threads(reason: str) -> Threads:
    none = unknown(reason)
    return Threads(
        ttft_tile_ms=none,
        vision_tile_ms=none,
        prefill_256_tokens_per_s=none,
        decode_256_tokens_per_s=none,
    )


def _or_reason(job: Job, type_: type[Reply], otherwise: Callable[[str], Reply]) -> Reply:
    """The reply of a job, or why there is none: what was measured before is not thrown away."""
    try:
        return run_job(job, type_)[0]
    except LorgnetteError as error:
        return otherwise(str(error))


def fastest(sweep: Mapping[str, Threads]) -> int | None:
    """The number of threads that gives a short answer soonest, None where none was measured.

    An answer of `ANSWER_TOKENS` about one tile: first token and decoding together.
    """
    times = {
        int(count): figures.ttft_tile_ms.median
        + 1e3 * ANSWER_TOKENS / figures.decode_256_tokens_per_s.median
        for count, figures in sweep.items()
        if figures.ttft_tile_ms.median and figures.decode_256_tokens_per_s.median
    }
    return min(times, key=lambda count: (times[count], count)) if times else None
