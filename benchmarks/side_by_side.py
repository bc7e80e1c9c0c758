"""Our runtime beside its peers: one machine, one shape, the same threads, taken in turns.

    python -m benchmarks.side_by_side [--shape SmolVLM-256M] [--peers ours,llamacpp,openvino,...]
        [--threads 4] [--rounds 5]
        [--measure vision,prefill,decode,ttft,second-turn,cold,ttft-full]
        [--folder build/peers] [--json FILE] [--bundle OUR.lorg]

Builds an environment for each peer, converts the same random weights for it and measures all of
them in turns (A B A B), one worker running while the others are stopped. Ratios are peer time over
our time, taken within a round: above 1, ours is the faster. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.limits import cached_limits
from benchmarks.peers.build import Contestant, prepare
from benchmarks.peers.peer import Case, Peer
from benchmarks.peers.rounds import MEASURES, Figures, run_all, steps_for
from benchmarks.peers.table import render, summarise
from benchmarks.peers.work import work_of

PEERS = ("ours", "llamacpp", "openvino", "ortgenai", "executorch", "torch", "onnx-plain", "mnn")
ROOT = Path(__file__).parent.parent


def find_peer(name: str) -> Peer:
    """The peer of a name on the command line."""
    module = importlib.import_module(f"benchmarks.peers.{name.replace('-', '_')}")
    peer: Peer = module.PEER
    return peer


def chosen(text: str, known: tuple[str, ...], what: str) -> list[str]:
    """Names out of a list separated by commas.

    Raises:
        SystemExit: One of them is unknown.
    """
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SystemExit(f"unknown {what}: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def compare(
    case: Case,
    contestants: list[Contestant],
    failures: dict[str, str],
    settings: argparse.Namespace,
) -> dict[str, Any]:
    """Measures and gathers everything that is printed."""
    steps = steps_for(case, settings.measure, settings.rounds)
    figures: Figures = run_all(case, contestants, steps, settings.threads)
    failures |= figures.failures
    limits = cached_limits(settings.folder, settings.threads)
    return {
        "version": 1,
        "shape": case.shape,
        "threads": settings.threads,
        "rounds": settings.rounds,
        "prompts": {tiles: len(ids) for tiles, ids in case.prompts.items()},
        "load_average": [figures.load_before, os.getloadavg()[0]],
        "limits": limits,
        "work": work_of(case),
        "rows": {one.row: one.formats for one in contestants},
        "disk_bytes": {one.row: one.disk_bytes for one in contestants},
        "memory": figures.memory,
        "failures": failures,
        "samples": figures.samples,
        "cores": figures.cores,
        "others": figures.others,
        "summary": summarise(figures.samples),
    }


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="SmolVLM-256M")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rows", help="only these models of the peers, ours aside")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", default=",".join(MEASURES))
    parser.add_argument("--folder", type=Path, default=ROOT / "build/peers")
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--bundle", type=Path, help="ours; without it, one is exported")
    settings = parser.parse_args(arguments)
    settings.peers = chosen(settings.peers, PEERS, "peers")
    settings.measure = chosen(settings.measure, MEASURES, "measures")
    settings.folder = settings.folder.resolve()
    if min(settings.threads, settings.rounds) < 1:
        raise SystemExit("--threads and --rounds must be 1 or more")
    return settings


def main(arguments: list[str] | None = None) -> None:
    """Builds, measures, prints."""
    from benchmarks.peers.shapes import SHAPES, make_case

    settings = arguments_of(arguments)
    # Stopped workers would outlive a driver that is terminated without closing them, and what was
    # measured until then is worth printing.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen(settings.shape, tuple(SHAPES), "shape")
    place = settings.folder / settings.shape
    case = make_case(SHAPES[settings.shape], place, settings.bundle)
    contestants: list[Contestant] = []
    failures: dict[str, str] = {}
    rows = settings.rows.split(",") if settings.rows else None
    for name in settings.peers:
        built, failed = prepare(find_peer(name), case, place, settings.folder, rows)
        contestants += built
        failures |= failed
    document = compare(case, contestants, failures, settings)
    print(render(document))
    if settings.json is not None:
        settings.json.write_text(json.dumps(document, indent=1))
    if not contestants:
        sys.exit(1)


if __name__ == "__main__":
    main()
