"""Bundles on disk: written whole or not at all, and trusted only after a check."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lorgnette.errors import BundleError, LorgnetteError
from lorgnette.manifest import FileEntry, Manifest, decode_manifest, encode_manifest

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest is read and whose files are there in the right size."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists.

        Raises:
            BundleError: The manifest does not list it.
        """
        if name not in {entry.path for entry in self.manifest.files}:
            raise BundleError(f"file '{name}' is not part of the bundle", where=self.path)
        return self.path / name

    def check_digests(self) -> None:
        """Reads every file and compares it with its digest.

        Raises:
            BundleError: Naming the first file that differs.
        """
        with ThreadPoolExecutor(max_workers=4) as pool:
            files = self.manifest.files
            digests = pool.map(sha256_of, (self.path / entry.path for entry in files))
            for entry, digest in zip(files, digests, strict=True):
                if digest != entry.sha256:
                    raise BundleError(
                        f"file '{entry.path}' was changed or damaged",
                        where=self.path,
                        got=f"sha256 {digest[:12]}…",
                        wanted=f"{entry.sha256[:12]}…",
                        hint="copy or export the bundle again",
                    )


def open_bundle(path: str | Path) -> Bundle:
    """Reads a bundle's manifest and checks paths, links and sizes of its files.

    The contents are not read here: see `Bundle.check_digests`.

    Raises:
        BundleError: Anything about it is not as it must be.
    """
    root = Path(path)
    if not root.is_dir():
        what = "bundle is not a directory" if root.exists() else "bundle does not exist"
        raise BundleError(what, where=root, hint="make one with 'lorgnette export'")
    manifest_path = root / MANIFEST
    _check_regular(root, PurePosixPath(MANIFEST))
    size = manifest_path.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise BundleError(
            "manifest is too large",
            where=manifest_path,
            got=size,
            wanted=f"<= {MAX_MANIFEST_BYTES}",
        )
    manifest = decode_manifest(manifest_path.read_bytes(), manifest_path)
    for entry in manifest.files:
        _check_regular(root, safe_relative(entry.path, manifest_path))
        actual = (root / entry.path).stat().st_size
        if actual != entry.bytes:
            raise BundleError(
                f"file '{entry.path}' was changed or cut off",
                where=root,
                got=f"{actual} bytes",
                wanted=f"{entry.bytes} bytes",
                hint="copy or export the bundle again",
            )
    return Bundle(root, manifest)


def safe_relative(name: str, where: object) -> PurePosixPath:
    """A path that stays inside its folder on every system.

    Raises:
        BundleError: It is absolute, climbs with `..`, or holds characters that some system reads
            as a separator or a drive.
    """
    path = PurePosixPath(name)
    bad = path.is_absolute() or not path.parts or set(path.parts) & {"..", "."}
    if bad or str(path) != name or re.search(r"[\\:\x00-\x1f]", name):
        raise BundleError("path leaves the bundle", where=where, got=repr(name))
    return path


def _check_regular(root: Path, relative: PurePosixPath) -> None:
    """Refuses links anywhere on the way, and anything that is not a plain file."""
    current = root
    for part in relative.parts:
        current = current / part
        try:
            mode = current.lstat().st_mode
        except OSError as error:
            raise BundleError(
                f"file '{relative}' is missing", where=root, hint="copy or export the bundle again"
            ) from error
        if stat.S_ISLNK(mode):
            raise BundleError(f"'{relative}' goes through a link", where=root)
    if not stat.S_ISREG(mode):
        raise BundleError(f"'{relative}' is not a plain file", where=root)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Every file below a folder but the manifest, sorted by path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return tuple(
        FileEntry(
            path=path.relative_to(folder).as_posix(),
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
        )
        for path in paths
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, the last file of a bundle."""
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))


def final_path(target: str | Path, *, replace: bool = False) -> Path:
    """The absolute path of a bundle that is to be made.

    Raises:
        LorgnetteError: The name is wrong or taken.
    """
    final = Path(os.path.abspath(target))
    if final.suffix != ".lorg":
        raise LorgnetteError(
            "a bundle's name must end in .lorg", got=final.name, wanted=f"{final.stem}.lorg"
        )
    if os.path.lexists(final) and not replace:
        raise LorgnetteError("bundle exists already", where=final, hint="--force replaces it")
    if os.path.lexists(final) and (final.is_symlink() or not (final / MANIFEST).is_file()):
        raise LorgnetteError("what stands there is not a bundle", where=final)
    return final


@contextlib.contextmanager
def writing(target: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write a bundle in, which takes its final name only if all went well.

    Leftovers of an earlier run that was killed are removed.

    Args:
        target: The final name; ends in `.lorg`.
        replace: Whether a bundle that stands there may be replaced.

    Raises:
        LorgnetteError: The name is wrong or taken, or the disk refuses.
    """
    final = final_path(target, replace=replace)
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        partial.mkdir()
        yield partial
        if final.exists():
            old = final.with_name(f".{final.name}.partial-old-{os.getpid()}")
            final.rename(old)
            try:
                partial.rename(final)
            except OSError:
                old.rename(final)
                raise
            shutil.rmtree(old)
        else:
            partial.rename(final)
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else None
        raise LorgnetteError(
            "cannot write the bundle",
            where=final,
            got=error.strerror or str(error),
            hint=hint,
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_leftovers(final: Path) -> None:
    for path in _leftovers(final):
        shutil.rmtree(path, ignore_errors=True)


def _leftovers(final: Path) -> Iterable[Path]:
    """Partial folders of this bundle whose process is gone.

    Our own process id is no sign of life: in a container each run may get the same one.
    """
    for path in list(final.parent.iterdir()):
        pid = path.name.rpartition("-")[2]
        ours = path.name.startswith(f".{final.name}.partial-") and pid.isdecimal()
        if ours and (int(pid) == os.getpid() or not _alive(int(pid))):
            yield path


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
