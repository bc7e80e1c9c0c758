"""What a measuring process is asked; light, since importing it counts as part of a cold start."""

from __future__ import annotations

import msgspec

STEP = b"\x1estep "
"""What a line on stdout begins with that tells the name of a step."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One job of `child`: see `jobs` and `start`."""

    kind: str
    """`start`, `ready`, `memory`, `operators`, `sweep` or `phases`."""
    bundle: str
    threads: int
    picture: str | None
    """A file, None for a drawn one."""
    runs: int
    seconds: float


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error of ours that a job met: the parts of its line."""

    what: str
    where: str | None
    got: str | None
    wanted: str | None
    hint: str | None
    exit_code: int


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """Moments of a start, by `time.monotonic`."""

    entered: float
    imported: float
    ready: float
    first_token: float | None
    """Nothing was asked where only being ready counts."""
