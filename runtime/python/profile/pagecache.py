"""What of a bundle lies in the system's file cache, and taking it out for a cold start."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lorgnette.bundle import MANIFEST, Bundle


def files_of(bundle: Bundle) -> list[Path]:
    """Every file of a bundle."""
    return [bundle.path / MANIFEST, *(bundle.path / entry.path for entry in bundle.manifest.files)]


def evict(files: Sequence[Path]) -> str:
    """Asks the system to forget files; the reason where it cannot, else empty.

    Other processes that have a file open keep what they use of it.
    """
    if not hasattr(os, "posix_fadvise"):
        return "the system has no posix_fadvise"
    try:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # what is not yet on the disk is not forgotten
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    except OSError as error:
        return f"the system does not forget files: {error.strerror or error}"
    return ""


def cached_share(files: Sequence[Path]) -> float | None:
    """How much of files is in memory, by pages; None where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    held = total = 0
    for file in files:
        if file.stat().st_size == 0:
            continue
        pages = _resident(file)
        if pages is None:
            return None
        held, total = held + sum(pages), total + len(pages)
    return held / total if total else None


def _resident(file: Path) -> list[bool] | None:
    """Of each page of a file, whether it is in memory; none is brought in by asking."""
    with file.open("rb") as opened:
        # Private, since ctypes tells the address of writable memory alone; nothing is written.
        mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    count = -(-len(mapping) // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * count)()
    first = ctypes.c_char.from_buffer(mapping)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        start = ctypes.c_void_p(ctypes.addressof(first))
        failed = libc.mincore(start, ctypes.c_size_t(len(mapping)), flags)
    except (OSError, AttributeError):
        return None
    finally:
        del first  # the mapping cannot be closed while something points into it
        mapping.close()
    return None if failed else [bool(flag & 1) for flag in flags]
