"""Measures contestants in turns, round by round."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.peers.build import OFFLINE, ROOT, Contestant
from benchmarks.peers.peer import Case
from benchmarks.peers.worker import PATIENCE_S, PeerFailed, Worker

MEASURES = ("vision", "prefill", "decode", "ttft", "second-turn", "cold", "ttft-full")
PREFILL_TOKENS = (256, 1024)
DECODE_CONTEXTS = (300, 1024)
DECODE_STEPS = 16
LONG_ROUNDS = 2
"""Rounds of what takes many seconds, a picture of many tiles: after all the rest, nothing needs to
warm up for it."""


@dataclass(frozen=True)
class Step:
    """One figure.

    Attributes:
        name: In the tables.
        request: What workers are asked; None for a cold start.
        rounds: How often.
        warm_up: Rounds before those that count.
    """

    name: str
    request: Mapping[str, Any] | None
    rounds: int
    warm_up: int = 1


@dataclass
class Figures:
    """What came out.

    Attributes:
        samples: Milliseconds by figure, row and round; None where a row had failed by then.
        cores: Cores that were kept busy, in the same places.
        others: Cores that other processes kept busy meanwhile, by figure; empty where the system
            does not tell.
        memory: Peak and present resident set by row, after everything; of cold starts beside.
        failures: Why a row is missing or stopped being measured.
        load_before: The machine's load average at the start.
    """

    samples: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    cores: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    others: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    load_before: float = 0.0


class Asked(Protocol):
    """What rounds need of a worker."""

    def ask(self, request: Mapping[str, Any], timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Sends a request and waits for the reply."""

    def close(self) -> None:
        """Ends it."""


def steps_for(case: Case, measures: Iterable[str], rounds: int) -> list[Step]:
    """The figures of a shape.

    Args:
        case: The shape.
        measures: Some of MEASURES.
        rounds: How often each is taken.
    """
    most = max(int(tiles) for tiles in case.prompts)
    full = Step(
        f"TTFT, {most} tiles, ms",
        {"do": "answer", "tiles": most},
        min(rounds, LONG_ROUNDS),
        warm_up=0,
    )
    steps = {
        "vision": [Step("vision, ms a tile", {"do": "encode"}, rounds)],
        "prefill": [
            Step(f"prefill {count}, tok/s", {"do": "prefill", "tokens": count}, rounds)
            for count in PREFILL_TOKENS
        ],
        "decode": [
            Step(
                f"decode at {context}, tok/s",
                {"do": "decode", "context": context, "steps": DECODE_STEPS},
                rounds,
            )
            for context in DECODE_CONTEXTS
        ],
        "ttft": [Step("TTFT, 1 tile, ms", {"do": "answer", "tiles": 1}, rounds)],
        "second-turn": [Step("second turn, TTFT ms", {"do": "second", "tiles": 1}, rounds)],
        "cold": [Step("cold start, ms", None, rounds)],
        "ttft-full": [full] if most > 1 else [],
    }
    wanted = set(measures)
    return [step for name in MEASURES if name in wanted for step in steps[name]]


def run_all(
    case: Case,
    contestants: Sequence[Contestant],
    steps: Sequence[Step],
    threads: int,
    start: Callable[[Contestant, int], Asked] | None = None,
) -> Figures:
    """Starts every worker and takes every figure in turns.

    The order turns around from one round to the next. A worker that fails is reported, and its
    later figures are left out. Interrupted (Ctrl-C), it returns what it has.

    Args:
        case: The shape.
        contestants: Who takes part.
        steps: The figures.
        threads: Threads of each engine.
        start: Starts a worker; None starts a process.
    """
    begin = start or _start
    figures = Figures(load_before=os.getloadavg()[0])
    workers: dict[str, Asked] = {}
    by_row = {one.row: one for one in contestants}
    try:
        for row, one in by_row.items():
            workers[row] = begin(one, threads)
            _attempt(figures, workers, row, lambda w: w.ask({"do": "load"}))
        for step in steps:
            _take(figures, workers, by_row, step, lambda one: begin(one, threads))
        for row in list(workers):
            _attempt(figures, workers, row, lambda w: w.ask({"do": "memory"}), keep=True)
    except KeyboardInterrupt:
        figures.failures["the rest"] = "interrupted"
    finally:
        for worker in workers.values():
            worker.close()
    return figures


def _take(
    figures: Figures,
    workers: dict[str, Asked],
    by_row: Mapping[str, Contestant],
    step: Step,
    begin: Callable[[Contestant], Asked],
) -> None:
    """One figure of everybody: a round to warm up, then those that count."""
    samples = figures.samples.setdefault(step.name, {row: [] for row in by_row})
    cores = figures.cores.setdefault(step.name, {row: [] for row in by_row})
    print(step.name, end="", file=sys.stderr, flush=True)
    for number in range(step.warm_up + step.rounds):
        order = list(by_row) if number % 2 == 0 else list(by_row)[::-1]
        for row in order:
            reply: dict[str, Any] | None = None
            if row in workers:
                if step.request is None:
                    reply = _cold(figures, workers, row, lambda r=row: begin(by_row[r]))  # type: ignore[misc]
                else:
                    reply = _timed_attempt(figures, workers, row, step)
            if number >= step.warm_up:
                samples[row].append(reply["ms"] if reply else None)
                cores[row].append(reply.get("cores") if reply else None)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr, flush=True)


def _timed_attempt(
    figures: Figures, workers: dict[str, Asked], row: str, step: Step
) -> dict[str, Any] | None:
    """A worker's reply, and what the machine's other processes did meanwhile."""
    busy, started = machine_busy_s(), time.perf_counter()
    reply = _attempt(figures, workers, row, lambda worker: worker.ask(step.request or {}))
    wall, after = time.perf_counter() - started, machine_busy_s()
    if reply is not None and "cpu_s" in reply and busy is not None and after is not None:
        spent = max(0.0, (after - busy - reply["cpu_s"]) / wall)
        figures.others.setdefault(step.name, []).append(spent)
    return reply


def machine_busy_s() -> float | None:
    """Processor seconds that all cores have worked since the machine was started.

    Source: proc(5): user, nice, system, then idle and iowait, then irq and softirq, in ticks.
    """
    try:
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    except OSError:
        return None
    spent = [int(count) for count in ticks]
    return (sum(spent) - spent[3] - spent[4]) / os.sysconf("SC_CLK_TCK")


def _attempt(
    figures: Figures,
    workers: dict[str, Asked],
    row: str,
    action: Callable[[Asked], dict[str, Any]],
    *,
    keep: bool = False,
) -> dict[str, Any] | None:
    """A worker's reply; one that fails is written down and closed."""
    try:
        reply = action(workers[row])
    except PeerFailed as failure:
        figures.failures[row] = str(failure)
        workers.pop(row).close()
        return None
    if keep:
        figures.memory.setdefault(row, {}).update(
            {key: reply[key] for key in ("peak_rss_bytes", "rss_bytes") if key in reply}
        )
    return reply


def _cold(
    figures: Figures, workers: dict[str, Asked], row: str, begin: Callable[[], Asked]
) -> dict[str, Any] | None:
    """From starting a process to its first token behind one tile."""
    started = time.perf_counter()
    fresh = begin()
    try:
        fresh.ask({"do": "load"})
        reply = fresh.ask({"do": "answer", "tiles": 1})
    except PeerFailed as failure:
        figures.failures[row] = f"cold start: {failure}"
        workers.pop(row).close()
        return None
    finally:
        wall = (time.perf_counter() - started) * 1e3
        fresh.close()
    memory = figures.memory.setdefault(row, {})
    peak = reply.get("peak_rss_bytes", 0)
    memory["cold_peak_rss_bytes"] = max(peak, memory.get("cold_peak_rss_bytes", 0))
    return {"ms": wall}


def _start(one: Contestant, threads: int) -> Worker:
    """A worker process, every threading library of it told the same number."""
    counts = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = dict(OFFLINE) | {name: str(threads) for name in counts} | dict(one.environment)
    log = Path(one.command[-1]).with_suffix(".log")
    return Worker((*one.command, str(threads)), environment, ROOT, log)
