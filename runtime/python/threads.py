"""How many threads an engine gets: every core, or what was measured to be fastest and kept."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lorgnette.files import write_whole

if TYPE_CHECKING:
    from lorgnette.bundle import Bundle

FILE = "threads.json"
MOST_BYTES = 1 << 20
MOST_KEPT = 1000
"""Bundles whose numbers are kept; the oldest are forgotten."""
MOST_THREADS = 1024


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def kept_threads(bundle: Bundle) -> int | None:
    """The number that was kept for a bundle on a machine like this one, None where none was.

    A file that is damaged or was written by something else is as good as none.
    """
    found = _read().get(_key(bundle))
    return found if found is not None and 1 <= found <= MOST_THREADS else None


def keep_threads(bundle: Bundle, threads: int) -> Path:
    """Keeps the number for later openings of the bundle; gives the file that holds it.

    Raises:
        OSError: The file cannot be written.
    """
    kept = _read()
    kept.pop(_key(bundle), None)
    kept[_key(bundle)] = threads
    newest = dict(list(kept.items())[-MOST_KEPT:])
    path = _folder() / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, msgspec.json.encode(newest))
    return path


def _read() -> dict[str, int]:
    path = _folder() / FILE
    try:
        if path.stat().st_size > MOST_BYTES:
            return {}
        return msgspec.json.decode(path.read_bytes(), type=dict[str, int])
    except (OSError, RecursionError, msgspec.MsgspecError):
        return {}


def _key(bundle: Bundle) -> str:
    """What a number is right for: the bundle, the kind of machine, and the cores it may use."""
    graphs = [e.sha256 for e in bundle.manifest.files if e.path.startswith("graphs/")]
    parts = (
        *graphs,
        platform.machine(),
        platform.node(),
        str(usable_cores()),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _folder() -> Path:
    """Where a user's programs keep what they can do without."""
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/lorgnette"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "lorgnette"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorgnette"
