"""What a peer is: an environment, a conversion, and a worker that speaks JSON lines.

A peer's file is read twice: by the driver, for `PEER`, and inside the peer's own environment, as a
program that converts or serves. So nothing but the standard library is imported at the top of it.

A worker answers one line of JSON with one line of JSON:

    {"do": "load"}                                   opens the model
    {"do": "encode"}                                 one tile through the vision tower
    {"do": "prefill", "tokens": 256}                 into an empty KV cache
    {"do": "decode", "context": 300, "steps": 32}    greedy steps behind that many positions
    {"do": "answer", "tiles": 17}                    tiles, prompt, first token
    {"do": "second"}                                 a further question behind such an answer
    {"do": "memory"}

Each reply holds `ms` (what the engine took, timed inside the worker), `cores` (processor time a
second of it), `cpu_s` (processor time of the whole request) and memory; one that failed holds
`error`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

Reply = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One shape and the ids that every peer gets.

    Attributes:
        shape: Its name.
        checkpoint: Folder with the random checkpoint as published.
        text: Folder with the decoder alone, as transformers stores a Llama or Qwen2.
        vision: Folder with the vision tower and projector: `vision.safetensors`, `vision.json`.
        tile: Side of a tile, in pixels.
        tokens_per_tile: Image tokens of a tile.
        image_id: The id of an image token.
        vocab_size: Ids are drawn below it.
        prompts: Prompt ids by the number of tiles.
        second: Ids of a further question.
        question: The question in the prompts.
        further: The further question.
        context: Positions that a KV cache must hold.
        bundle: Our own bundle.
    """

    shape: str
    checkpoint: str
    text: str
    vision: str
    tile: int
    tokens_per_tile: int
    image_id: int
    vocab_size: int
    prompts: dict[str, list[int]]
    second: list[int]
    question: str
    further: str
    context: int
    bundle: str = ""

    def save(self, file: Path) -> None:
        """Writes it as JSON."""
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, file: Path) -> Case:
        """Reads what `save` wrote."""
        return cls(**json.loads(file.read_text()))

    def drawn_ids(self, count: int) -> list[int]:
        """Ids of plain text, the same for every peer."""
        draw = random.Random(count)
        return [draw.randrange(100, min(40000, self.vocab_size)) for _ in range(count)]


@dataclass(frozen=True)
class Peer:
    """How a peer's environment is built, and which rows it gives.

    Attributes:
        name: Its name on the command line.
        module: Its file, as a module.
        rows: Names of the models that it makes and measures, each by a worker of its own.
        requirements: Exact versions for pip; none means the environment of the driver.
        build: Variables set while pip runs.
        run: Variables set while a worker runs.
        unpinned: Requirements installed with --no-deps, because they pin what is not wanted.
        formats: What each row runs, for the table's legend.
    """

    name: str
    module: str
    rows: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    build: Mapping[str, str] = field(default_factory=dict)
    run: Mapping[str, str] = field(default_factory=dict)
    unpinned: tuple[str, ...] = ()
    formats: Mapping[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """What a worker drives. Prompts of pictures go through `answer`."""

    def encode(self) -> None:
        """Runs one tile through the vision tower."""

    def start(self) -> None:
        """Empties the KV cache."""

    def prefill(self, ids: list[int]) -> int:
        """Appends ids to the KV cache; returns the likeliest next one."""

    def decode(self, token: int) -> int:
        """Appends one id; returns the likeliest next one."""

    def answer(self, tiles: int) -> float | None:
        """From prepared tiles to the first token; returns what it took in ms if it knows better."""

    def second(self) -> float | None:
        """A further question behind an answer, to its first token."""


class PlainEngine:
    """What most peers share: the image tokens' ids stand for the image tokens.

    A decoder with ids as its input then does the work of one that has image tokens spliced in,
    less one copy, so this is never slower than the real path.
    """

    def __init__(self, case: Case) -> None:
        """Keeps the case."""
        self.case = case

    def encode(self) -> None:
        """Runs one tile through the vision tower."""
        raise NotImplementedError

    def start(self) -> None:
        """Empties the KV cache."""
        raise NotImplementedError

    def prefill(self, ids: list[int]) -> int:
        """Appends ids to the KV cache; returns the likeliest next one."""
        raise NotImplementedError

    def decode(self, token: int) -> int:
        """Appends one id; returns the likeliest next one."""
        return self.prefill([token])

    def answer(self, tiles: int) -> float | None:
        """Encodes tile by tile, then prefills the whole prompt."""
        for _ in range(tiles):
            self.encode()
        self.start()
        self.prefill(self.case.prompts[str(tiles)])
        return None

    def second(self) -> float | None:
        """Prefills the further question."""
        self.prefill(self.case.second)
        return None


def memory() -> Reply:
    """Resident set of this process, now and at most, and its threads."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "peak_rss_bytes": int(status["VmHWM"].split()[0]) * 1024,
        "rss_bytes": int(status["VmRSS"].split()[0]) * 1024,
        "threads": int(status["Threads"]),
    }


def timed(action: Callable[[], float | None]) -> Reply:
    """Milliseconds of an action and the cores that it kept busy."""
    busy, started = time.process_time(), time.perf_counter()
    own = action()
    wall = time.perf_counter() - started
    cores = (time.process_time() - busy) / wall if wall else 0.0
    return {"ms": wall * 1e3 if own is None else own, "cores": cores}


def measure(engine: Engine, case: Case, request: Mapping[str, Any]) -> Reply:
    """Runs one request."""
    kind = request["do"]
    if kind == "encode":
        return timed(engine.encode)
    if kind == "prefill":
        ids = case.drawn_ids(request["tokens"])
        engine.start()
        return timed(lambda: _nothing(engine.prefill(ids)))
    if kind == "decode":
        return _decode(engine, case.drawn_ids(request["context"]), request["steps"])
    if kind == "answer":
        return timed(lambda: engine.answer(request["tiles"]))
    if kind == "second":
        engine.answer(request["tiles"])
        return timed(engine.second)
    raise ValueError(f"unknown request {kind!r}")


def _decode(engine: Engine, ids: list[int], steps: int) -> Reply:
    engine.start()
    token = engine.prefill(ids)
    token = engine.decode(token)  # the first step may allocate

    def run() -> None:
        nonlocal token
        for _ in range(steps):
            token = engine.decode(token)

    return timed(run) | {"steps": steps}


def _nothing(_: object) -> None:
    """Drops a value."""


def serve(
    load: Callable[[], Engine],
    case: Case,
    requests: TextIO = sys.stdin,
    replies: TextIO | None = None,
) -> None:
    """Answers requests until the input ends.

    What libraries print goes to the standard error, so that replies stay whole.
    """
    if replies is None:
        replies = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
    engine: Engine | None = None
    for line in requests:
        request = json.loads(line)
        busy = time.process_time()
        reply: Reply = {}
        try:
            if request["do"] == "quit":
                break
            if request["do"] == "load":
                started = time.perf_counter()
                engine = load()
                reply = {"ms": (time.perf_counter() - started) * 1e3}
            elif request["do"] != "memory":
                if engine is None:
                    raise RuntimeError("nothing is loaded")
                reply = measure(engine, case, request)
            reply |= memory() | {"cpu_s": time.process_time() - busy}
        except Exception as error:
            # Whatever a peer raises is its report, and the run goes on without it.
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main(
    convert: Callable[[str, Case, Path], None],
    load: Callable[[str, Case, Path, int], Engine],
) -> None:
    """Runs a peer's file as a program.

    `convert ROW CASE FOLDER` makes what `serve ROW CASE FOLDER THREADS` opens.
    """
    command, row, case_file, folder = sys.argv[1:5]
    case, place = Case.load(Path(case_file)), Path(folder)
    if command == "convert":
        convert(row, case, place)
    else:
        threads = int(sys.argv[5])
        serve(lambda: load(row, case, place, threads), case)
