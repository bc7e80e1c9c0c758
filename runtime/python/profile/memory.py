"""Resident memory of this process, phase by phase; meant for a process that does nothing else."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

from lorgnette.runtime.profile.document import Memory

SELF = Path("/proc/self")
RESET_PEAK = "5"
"""What /proc/self/clear_refs takes for the peak. Source: proc(5)."""


def of_phase(run: Callable[[], object], folder: Path = SELF) -> Memory:
    """What a phase needed at most, and what is left of it."""
    reset = _reset(folder)
    kept = run()
    gc.collect()
    values = _status(folder)
    steady = values.get("VmRSS")
    del kept  # it may be the model itself, which counts
    peak = None if reset else values.get("VmHWM")
    private = values.get("RssAnon")
    untold = f"{folder / 'status'} does not tell"
    reasons = {
        "peak_bytes": (reset or untold) if peak is None else "",
        "steady_bytes": untold if steady is None else "",
        "steady_private_bytes": untold if private is None else "",
    }
    return Memory(
        peak_bytes=peak,
        steady_bytes=steady,
        steady_private_bytes=private,
        reasons={name: reason for name, reason in reasons.items() if reason},
    )


def no_memory(reason: str) -> Memory:
    """A phase whose memory could not be measured."""
    fields = ("peak_bytes", "steady_bytes", "steady_private_bytes")
    return Memory(
        peak_bytes=None,
        steady_bytes=None,
        steady_private_bytes=None,
        reasons=dict.fromkeys(fields, reason),
    )


def _reset(folder: Path) -> str:
    """Lets the peak begin anew; the reason where the system does not, else empty."""
    try:
        (folder / "clear_refs").write_text(RESET_PEAK, "ascii")
    except OSError as error:
        return f"the peak cannot be reset: {error.strerror or error}"
    return ""


def _status(folder: Path) -> dict[str, int]:
    """Bytes by name."""
    try:
        lines = (folder / "status").read_text("ascii", "replace").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[0].isdigit() and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found
