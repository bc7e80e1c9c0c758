"""The document of a profile: what `lorgnette profile --json` prints and `--compare` reads.

Where something could not be measured it is null, and `reason` or `reasons` of the same object says
why. Milliseconds and bytes are told by the names of the fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from lorgnette.errors import ProfileError
from lorgnette.manifest import DAMAGE

NAME = "lorgnette.profile"
MAJOR = 1
MINOR = 0
MAX_BYTES = 64 * 2**20
"""Of a document that is read."""

Positive = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the document's types: a reader passes over fields of a newer minor version."""


class Version(Part, frozen=True):
    """Which schema a document follows; a reader refuses another major."""

    name: str
    major: Count
    minor: Count


class Figure(Part, frozen=True):
    """Several runs of one thing; all null where there was none, and then `reason` says why."""

    median: Positive | None
    p10: Positive | None
    p90: Positive | None
    min: Positive | None
    runs: Count
    reason: str = ""


class BundleInfo(Part, frozen=True):
    """What was measured."""

    name: str
    checkpoint: str
    family: str
    variant: str
    target: str
    quant: str
    engine: str
    context_length: Count
    bytes: Count
    bytes_by_kind: dict[str, Count]
    """By the bundle's folders, e.g. `graphs`; weights apart where they are files of their own."""
    manifest_sha256: str


class Machine(Part, frozen=True):
    """What it was measured on."""

    cpu: str | None
    architecture: str
    cores: Count | None
    usable_cores: Count
    features: tuple[str, ...] | None
    """Those that decide how fast an engine multiplies, as the kernel spells them."""
    memory_bytes: Count | None
    os: str
    python: str
    packages: dict[str, str]
    """Versions of lorgnette, numpy and what the engine consists of."""
    reasons: dict[str, str]


class Settings(Part, frozen=True):
    """How it was measured."""

    device: str
    threads: Count
    runs: Count
    """The most runs of one figure."""
    seconds: Positive
    """After which no run of a figure is begun, if there are three."""
    picture: str
    """The file's name, or `drawn`."""
    picture_size: tuple[Count, Count]
    """Width and height in pixels."""
    sweep: tuple[Count, ...]
    cold: bool
    sweep_left_out: str = ""
    """Why no other number of threads is tried, where that was not asked for."""


class Battery(Part, frozen=True):
    """A battery as the system tells of it."""

    name: str
    percent: Positive | None
    status: str | None
    watts: Positive | None
    reasons: dict[str, str]


class Conditions(Part, frozen=True):
    """The machine's state at one moment."""

    load_average: Positive | None
    """Processes that want a core, over the last minute."""
    cpu_mhz: tuple[Positive, ...] | None
    thermal_c: dict[str, float] | None
    """Degrees by thermal zone."""
    batteries: tuple[Battery, ...] | None
    reasons: dict[str, str]


class Energy(Part, frozen=True):
    """Energy of the processor packages, by the counters of RAPL."""

    joules_per_run: dict[str, Positive] | None
    """By phase; what else the machine did is in it."""
    reason: str = ""


class Noise(Part, frozen=True):
    """Whether something else used the machine meanwhile."""

    noisy: bool
    notes: tuple[str, ...]
    """Why it was called noisy, with the number."""
    load_average: Positive | None
    """Before the first run."""
    steal_share: Share | None
    """Time that the hypervisor gave to others."""
    calibration_ms: Figure
    """A fixed piece of work, timed between the runs."""
    calibration_spread: Positive | None
    """Its p90 over its p10."""
    widest: str | None
    """The figure with the largest spread."""
    widest_spread: Positive | None
    reasons: dict[str, str]


class Start(Part, frozen=True):
    """New processes: some that only open the bundle, some that answer about one tile."""

    ready_ms: Figure
    """From the start of the process until every graph is loaded, where nothing is asked."""
    first_token_ms: Figure
    """From the start of the process until the first token; graphs load while others run."""
    python_ms: Figure
    """Of `ready_ms`, until Python runs our first line."""
    imports_ms: Figure
    """Of that, importing the runtime."""
    load_ms: Figure
    """Of that, opening the bundle."""
    cached_share: Share | None
    """How much of the bundle was in the system's file cache before: the largest of the runs."""
    reason: str = ""


class Answer(Part, frozen=True):
    """The first token about a fresh picture, and of the next turn about the same picture."""

    tiles: Count | None
    prompt_tokens: Count | None
    ttft_ms: Figure
    preprocess_ms: Figure
    vision_ms: Figure
    prefill_ms: Figure
    """Embedding included."""
    rest_ms: Figure
    """What of the first token's time is in none of these."""
    second_turn_ms: Figure
    """TTFT of a second question."""
    reason: str = ""


class Prefill(Part, frozen=True):
    """New positions behind an empty KV cache, embeddings ready."""

    ms: Figure
    tokens_per_s: Figure


class Decode(Part, frozen=True):
    """One token that makes the context so many positions long."""

    token_ms: Figure
    embedding_ms: Figure
    decoder_ms: Figure
    sampling_ms: Figure
    tokens_per_s: Figure


class Phases(Part, frozen=True):
    """Each phase alone, in one process, warm."""

    preprocess_tile_ms: Figure
    preprocess_full_ms: Figure
    vision_tile_ms: Figure
    vision_full_ms: Figure
    projector_ms: Figure
    embedding_token_ms: Figure
    embedding_256_ms: Figure
    prefill: dict[str, Prefill]
    """By new positions."""
    decode: dict[str, Decode]
    """By positions of the context."""


class Memory(Part, frozen=True):
    """Resident memory of a process of its own during one of its phases."""

    peak_bytes: Count | None
    steady_bytes: Count | None
    """At the phase's end."""
    steady_private_bytes: Count | None
    """Of that, what is no part of a file."""
    reasons: dict[str, str]


class OperatorGroup(Part, frozen=True):
    """Nodes of one operator type at the same place of each layer."""

    module: str | None
    """With `*` for the number of a layer."""
    operator: str
    nodes: Count
    ms: Positive
    """Of one run of the phase."""
    share: Share
    reason: str = ""


class OperatorNode(Part, frozen=True):
    """One node of a graph as the engine ran it."""

    node: str
    module: str | None
    operator: str
    ms: Positive
    """Of one run of the phase."""
    share: Share
    reason: str = ""


class OperatorPhase(Part, frozen=True):
    """Where the time of one entry point goes; shares are of `operators_ms`."""

    component: str
    what: str
    """What one run was, e.g. `256 positions`."""
    runs: Count
    wall_ms: Positive
    """One run from outside, with the engine's profiler on."""
    operators_ms: Positive
    groups: tuple[OperatorGroup, ...]
    nodes: tuple[OperatorNode, ...]


class Operators(Part, frozen=True):
    """What the engine's own profiler tells, by entry point."""

    entry_points: dict[str, OperatorPhase] | None
    reason: str = ""


class Threads(Part, frozen=True):
    """The main figures with another number of threads, in a process of its own."""

    ttft_tile_ms: Figure
    vision_tile_ms: Figure
    prefill_256_tokens_per_s: Figure
    decode_256_tokens_per_s: Figure


class Profile(Part, frozen=True):
    """The whole document."""

    schema: Version
    measured_at: str
    """UTC, ISO 8601."""
    bundle: BundleInfo
    machine: Machine
    settings: Settings
    before: Conditions
    after: Conditions
    noise: Noise
    energy: Energy
    start: dict[str, Start]
    """`cold` and `warm`."""
    answers: dict[str, Answer]
    """`one_tile` and `full_tiling`."""
    phases: Phases
    memory: dict[str, Memory]
    operators: Operators
    sweep: dict[str, Threads]
    """By threads."""


class _Head(msgspec.Struct):
    """What documents of every version hold."""

    schema: Version


def encode_profile(profile: Profile) -> bytes:
    """The document as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n"


def decode_profile(data: bytes, where: object) -> Profile:
    """Reads a document, telling another version from a damaged one.

    Raises:
        ProfileError: It is of another version or not a profile.
    """
    try:
        version = msgspec.json.decode(data, type=_Head).schema
    except DAMAGE as error:
        raise ProfileError("not a profile", where=where, got=error) from error
    if (version.name, version.major) != (NAME, MAJOR):
        raise ProfileError(
            "the profile is of another version",
            where=where,
            got=f"{version.name} {version.major}.{version.minor}",
            wanted=f"{NAME} {MAJOR}.x",
            hint="measure again, or use the lorgnette that measured it",
        )
    try:
        return msgspec.json.decode(data, type=Profile)
    except DAMAGE as error:
        raise ProfileError("the profile is damaged", where=where, got=error) from error


def read_profile(path: Path) -> Profile:
    """Reads a document from a file.

    Raises:
        ProfileError: The file is missing, too large, of another version or not a profile.
    """
    try:
        if path.exists() and not path.is_file():
            raise ProfileError("cannot read the profile", where=path, got="not a plain file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or error
        raise ProfileError("cannot read the profile", where=path, got=reason) from error
    if len(data) > MAX_BYTES:
        raise ProfileError(
            "the profile is too large", where=path, wanted=f"at most {MAX_BYTES} bytes"
        )
    return decode_profile(data, path)


def json_schema() -> dict[str, Any]:
    """The JSON schema of the document, which lies under `docs/schemas`."""
    built = msgspec.json.schema(Profile)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **built}
