"""Builds a peer's environment and converts the weights for it, once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.peer import Case, Peer

ROOT = Path(__file__).parent.parent.parent
STAMP = "made-for.json"
NOWHERE = "http://127.0.0.1:9"
OFFLINE = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE),
    "HF_HUB_OFFLINE": "1",
    "PIP_NO_INDEX": "1",
    "PIP_REQUIRE_VIRTUALENV": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set while peers are converted and measured. Some of them send telemetry or install packages by
themselves (MNN's converter does both): the first have no way out, the second are refused. Nothing
here tells idle threads how to wait: workers
keep their engines' defaults, and those that are not measured are stopped."""


@dataclass(frozen=True)
class Contestant:
    """A model of a peer that is ready to be measured.

    Attributes:
        row: Its name in the tables.
        command: What starts its worker, but for the number of threads.
        environment: Variables of its worker.
        disk_bytes: What an app would ship: the model's files.
        formats: What it runs, in words.
    """

    row: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    disk_bytes: int
    formats: str


def prepare(
    peer: Peer, case: Case, place: Path, folder: Path, rows: Sequence[str] | None = None
) -> tuple[list[Contestant], dict[str, str]]:
    """Builds what is missing.

    Args:
        peer: Which.
        case: The shape, saved as `case.json` in `place`.
        place: Folder of the shape.
        folder: Folder of the environments and logs.
        rows: Only these of the peer's models; None for all.

    Returns:
        The models that can be measured, and the last line of the log for each that cannot.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    wanted = [row for row in peer.rows if rows is None or row in rows or peer.name == "ours"]
    if not wanted:
        return [], {}
    python, failed = _environment(peer, folder, logs / f"{peer.name}.log")
    if failed is not None:
        return [], dict.fromkeys(wanted, f"cannot be built: {failed}")
    built: list[Contestant] = []
    failures: dict[str, str] = {}
    for row in wanted:
        target = place / row
        log = logs / f"{case.shape}-{row}.log"
        command = (str(python), "-m", peer.module)
        failed = _convert(peer, row, case, (*command, "convert", row), target, log)
        if failed is not None:
            failures[row] = f"cannot be converted: {failed}"
            continue
        disk = _size(Path(case.bundle) if peer.name == "ours" else target)
        serve = (*command, "serve", row, str(place / "case.json"), str(target))
        formats = peer.formats.get(row, "")
        built.append(Contestant(row, serve, dict(peer.run), disk, formats))
    return built, failures


def _environment(peer: Peer, folder: Path, log: Path) -> tuple[Path, str | None]:
    """The interpreter of a peer, and why there is none."""
    if not peer.requirements:
        return Path(sys.executable), None
    place = folder / f"env-{peer.name}"
    python = place / "bin/python"
    wanted = [list(peer.requirements), list(peer.unpinned), dict(peer.build)]
    stamp = place / STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return python, None
    print(f"building the environment of {peer.name}: {log}", file=sys.stderr, flush=True)
    shutil.rmtree(place, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install"]
    if peer.build:
        pip.append("--no-cache-dir")  # pip keeps what it has built without regard to variables
    steps = [[sys.executable, "-m", "venv", str(place)], [*pip, "-v", *peer.requirements]]
    if peer.unpinned:
        steps.append([*pip, "--no-deps", *peer.unpinned])
    failed = _logged(steps, log, peer.build)
    if failed is None:
        stamp.write_text(json.dumps(wanted))
    return python, failed


def _convert(
    peer: Peer, row: str, case: Case, command: Sequence[str], target: Path, log: Path
) -> str | None:
    """Converts the weights, which a shape's name decides; returns why that failed."""
    stamp = target / STAMP
    wanted = [list(peer.requirements), list(peer.unpinned), case.shape, case.context]
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return None
    print(f"converting for {row}: {log}", file=sys.stderr, flush=True)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    started = time.perf_counter()
    step = [*command, str(target.parent / "case.json"), str(target)]
    failed = _logged([step], log, OFFLINE | dict(peer.run))
    if failed is None:
        stamp.write_text(json.dumps(wanted))
        print(f"  {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return failed


def _logged(
    steps: Sequence[Sequence[str]], log: Path, environment: Mapping[str, str]
) -> str | None:
    """Runs commands into a log; returns its last line where one failed."""
    with log.open("w") as output:
        for step in steps:
            done = subprocess.run(
                step,
                cwd=ROOT,
                # Lines in the order in which they were written: the last one is told of a failure.
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                check=False,
            )
            if done.returncode != 0:
                lines = [line for line in log.read_text(errors="replace").splitlines() if line]
                last = lines[-1].strip() if lines else "no output"
                return f"{last} (exit {done.returncode}, {log})"
    return None


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, each counted once."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != STAMP]
    return sum({file.stat().st_ino: file.stat().st_size for file in files}.values())
