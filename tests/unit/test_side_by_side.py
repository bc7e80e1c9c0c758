"""The driver of the comparison with peers that are made up, its workers and its protocol."""

from __future__ import annotations

import io
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import peer as peer_module
from benchmarks.peers.build import Contestant, prepare
from benchmarks.peers.peer import Case, Peer, PlainEngine, serve
from benchmarks.peers.rounds import MEASURES, Step, run_all, steps_for
from benchmarks.peers.table import render, summarise
from benchmarks.peers.worker import PATIENCE_S, PeerFailed, Worker
from benchmarks.side_by_side import PEERS, arguments_of, chosen, find_peer

STEP = Step("prefill 256, tok/s", {"do": "prefill", "tokens": 256}, 3)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    made = Case(
        shape="tiny",
        checkpoint="",
        text="",
        vision="",
        tile=8,
        tokens_per_tile=2,
        image_id=7,
        vocab_size=1000,
        prompts={"1": [1, 7, 7, 2], "5": [1, *[7] * 10, 2]},
        second=[3, 4],
        question="What?",
        further="And?",
        context=64,
    )
    made.save(tmp_path / "case.json")
    return made


def contestant(row: str) -> Contestant:
    return Contestant(row, (), {}, 1000, f"what {row} runs")


class FakeWorker:
    """Answers with the milliseconds it is told, and writes down who was asked what."""

    def __init__(self, row: str, ms: Iterator[float], seen: list[tuple[str, str]]) -> None:
        self.row, self.ms, self.seen, self.closed = row, ms, seen, False

    def ask(self, request: Mapping[str, Any], timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        self.seen.append((self.row, request["do"]))
        reply = {"peak_rss_bytes": 5_000_000, "rss_bytes": 4_000_000}
        if request["do"] in ("load", "memory"):
            return reply
        try:
            return reply | {"ms": next(self.ms), "cores": 2.0}
        except StopIteration:
            raise PeerFailed("died (exit -9): out of memory") from None

    def close(self) -> None:
        self.closed = True


def run_fakes(
    case: Case, times: Mapping[str, list[float]], steps: list[Step]
) -> tuple[Any, list[tuple[str, str]], list[FakeWorker]]:
    seen: list[tuple[str, str]] = []
    workers: list[FakeWorker] = []
    series = {row: iter(ms) for row, ms in times.items()}

    def start(one: Contestant, threads: int) -> FakeWorker:
        workers.append(FakeWorker(one.row, series[one.row], seen))
        return workers[-1]

    figures = run_all(case, [contestant(row) for row in times], steps, 4, start)
    return figures, seen, workers


def test_rounds_are_taken_in_turns_and_turn_around(case: Case) -> None:
    times = {"ours": [1.0] * 9, "a": [2.0] * 9, "b": [3.0] * 9}
    _, seen, _ = run_fakes(case, times, [STEP])
    asked = [row for row, kind in seen if kind == "prefill"]
    there, back = ["ours", "a", "b"], ["b", "a", "ours"]
    assert asked == there + back + there + back


def test_the_first_round_warms_up_and_ratios_are_of_the_same_round(case: Case) -> None:
    times = {"ours": [99.0, 10.0, 20.0, 40.0], "a": [99.0, 30.0, 40.0, 40.0]}
    figures, _, _ = run_fakes(case, times, [STEP])
    assert figures.samples[STEP.name] == {"ours": [10, 20, 40], "a": [30, 40, 40]}
    entry = summarise(figures.samples)[STEP.name]["a"]
    # 3, 2 and 1; the ratio of the medians would be 2 as well, but its p10 and p90 would not.
    assert entry["ratio"]["median"] == 2.0
    assert entry["ratio"]["p10"] == pytest.approx(1.2)
    assert entry["ratio"]["p90"] == pytest.approx(2.8)


def test_a_peer_that_dies_midway_is_reported_and_the_run_goes_on(case: Case) -> None:
    later = Step("decode at 300, tok/s", {"do": "decode"}, 3)
    times = {"ours": [1.0] * 8, "a": [2.0, 2.0, 2.0]}
    figures, _, workers = run_fakes(case, times, [STEP, later])
    assert figures.failures == {"a": "died (exit -9): out of memory"}
    assert figures.samples[STEP.name]["a"] == [2.0, 2.0, None]
    assert figures.samples[later.name] == {"ours": [1.0] * 3, "a": [None] * 3}
    assert "a" not in summarise(figures.samples)[later.name]
    assert all(worker.closed for worker in workers)


def test_what_was_measured_before_an_interruption_is_kept(case: Case) -> None:
    def until_interrupted() -> Iterator[float]:
        yield from [1.0, 2.0, 3.0]
        raise KeyboardInterrupt

    workers: list[FakeWorker] = []

    def start(one: Contestant, threads: int) -> FakeWorker:
        workers.append(FakeWorker(one.row, until_interrupted(), []))
        return workers[-1]

    figures = run_all(case, [contestant("ours")], [STEP], 4, start)
    assert figures.samples[STEP.name]["ours"] == [2.0, 3.0]
    assert figures.failures == {"the rest": "interrupted"}
    assert workers[0].closed


def test_a_cold_start_is_a_process_of_its_own_each_time(case: Case) -> None:
    cold = steps_for(case, ["cold"], 2)
    figures, seen, workers = run_fakes(case, {"ours": [1.0] * 3, "a": [1.0] * 3}, cold)
    assert len(workers) == 2 + 2 * 3  # a standing one each, and one a round with the warm-up
    assert seen.count(("a", "answer")) == 3
    assert figures.memory["a"]["cold_peak_rss_bytes"] == 5_000_000
    assert [len(v) for v in figures.samples[cold[0].name].values()] == [2, 2]


def test_every_measure_gives_a_figure(case: Case) -> None:
    names = [step.name for step in steps_for(case, MEASURES, 5)]
    assert names == [
        "vision, ms a tile",
        "prefill 256, tok/s",
        "prefill 1024, tok/s",
        "decode at 300, tok/s",
        "decode at 1024, tok/s",
        "TTFT, 1 tile, ms",
        "second turn, TTFT ms",
        "cold start, ms",
        "TTFT, 5 tiles, ms",
    ]


def test_a_peer_that_cannot_be_built_is_reported_with_its_log(case: Case, tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing-1.0-py3-none-any.whl")
    broken = Peer("broken", "benchmarks.peers.ours", ("broken-a", "broken-b"), (missing,))
    built, failures = prepare(broken, case, tmp_path, tmp_path / "folder")
    assert built == []
    assert set(failures) == {"broken-a", "broken-b"}
    assert "cannot be built" in failures["broken-a"]
    assert "nothing-1.0" in failures["broken-a"]
    assert (tmp_path / "folder/logs/broken.log").is_file()


def write_peer(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    """A peer's module on the path of workers."""
    (folder / "fake_peer.py").write_text(textwrap.dedent(text))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "fake_peer"


def test_a_peer_that_cannot_be_converted_is_reported(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = write_peer(tmp_path, monkeypatch, "print('so far')\nraise SystemExit('no such layer')")
    built, failures = prepare(Peer("fake", module, ("fake",)), case, tmp_path, tmp_path / "f")
    assert built == []
    assert failures["fake"].startswith("cannot be converted: no such layer (exit 1")


def test_a_converted_model_is_used_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
        import pathlib, sys
        pathlib.Path(sys.argv[4], "model.bin").write_bytes(b"12345")
        with open("{log}", "a") as log:
            log.write("converted ")
    """
    log = tmp_path / "log"
    module = write_peer(tmp_path, monkeypatch, program.format(log=log))
    for _ in range(2):
        built, failures = prepare(Peer("fake", module, ("fake",)), case, tmp_path, tmp_path / "f")
        assert failures == {}
        assert [(one.row, one.disk_bytes) for one in built] == [("fake", 5)]
    assert log.read_text() == "converted "


def worker_of(program: str, log: Path) -> Worker:
    return Worker((sys.executable, "-c", textwrap.dedent(program)), {}, log.parent, log)


ECHO = """
    import sys
    for line in sys.stdin:
        print('{"ms": 1}', flush=True)
"""


def test_a_worker_is_stopped_while_it_is_not_asked(tmp_path: Path) -> None:
    worker = worker_of(ECHO, tmp_path / "log")
    try:
        assert worker.ask({"do": "load"}) == {"ms": 1}
        assert worker.ask({"do": "encode"}) == {"ms": 1}
        status = Path(f"/proc/{worker.process.pid}/stat")
        if status.exists():  # Linux
            states = {status.read_text().rsplit(")", 1)[1].split()[0] for _ in range(1000)}
            assert "T" in states
    finally:
        worker.close()


def test_a_worker_that_dies_says_its_last_line(tmp_path: Path) -> None:
    worker = worker_of("import sys; sys.stdin.readline(); sys.exit('bad weights')", tmp_path / "l")
    with pytest.raises(PeerFailed, match=r"died \(exit 1\): bad weights"):
        worker.ask({"do": "load"})
    with pytest.raises(PeerFailed, match="bad weights"):
        worker.ask({"do": "load"})
    worker.close()


def test_a_worker_that_is_silent_is_given_up(tmp_path: Path) -> None:
    worker = worker_of("import time; time.sleep(60)", tmp_path / "log")
    with pytest.raises(PeerFailed, match="no reply within 0 s"):
        worker.ask({"do": "load"}, timeout_s=0.2)
    worker.close()
    assert worker.process.poll() is not None


class CountingEngine(PlainEngine):
    """Writes down what it is asked to do."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.done: list[str] = []

    def encode(self) -> None:
        self.done.append("encode")

    def start(self) -> None:
        self.done.append("start")

    def prefill(self, ids: list[int]) -> int:
        if ids == [13]:
            raise RuntimeError("unlucky\nand more")
        self.done.append(f"prefill {len(ids)}")
        return 5


def ask_served(case: Case, *requests: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    engine = CountingEngine(case)
    lines = io.StringIO("".join(json.dumps(request) + "\n" for request in requests))
    replies = io.StringIO()
    serve(lambda: engine, case, lines, replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()], engine.done


def test_requests_do_the_work_that_they_name(case: Case) -> None:
    load = {"do": "load"}
    _, done = ask_served(case, load, {"do": "decode", "context": 30, "steps": 4})
    assert done == ["start", "prefill 30", *["prefill 1"] * 5]  # one step before those counted
    _, done = ask_served(case, load, {"do": "answer", "tiles": 5})
    assert done == [*["encode"] * 5, "start", "prefill 12"]
    replies, done = ask_served(case, load, {"do": "second", "tiles": 1})
    assert done == ["encode", "start", "prefill 4", "prefill 2"]
    assert replies[1]["ms"] >= 0


def test_a_reply_tells_memory_and_errors_in_one_line(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Case, "drawn_ids", lambda self, count: [13])
    requests = ({"do": "encode"}, {"do": "load"}, {"do": "prefill", "tokens": 1}, {"do": "memory"})
    replies, _ = ask_served(case, *requests)
    assert replies[0] == {"error": "RuntimeError: nothing is loaded"}
    assert replies[2] == {"error": "RuntimeError: unlucky"}
    assert replies[3]["peak_rss_bytes"] >= replies[3]["rss_bytes"] > 1_000_000


def test_the_table_shows_speeds_ratios_limits_and_failures(case: Case) -> None:
    times = {"ours": [100.0] * 4, "a": [200.0] * 4}
    figures, _, _ = run_fakes(case, times, [STEP])
    document = {
        "shape": "tiny",
        "threads": 4,
        "rounds": 3,
        "prompts": {"1": 4},
        "load_average": [0.0, 1.0],
        "limits": {"int8 GEMM GOP/s": 100.0, "DRAM GB/s": 10.0},
        "work": {"prefill_flop": {"256": 5_000_000_000}},
        "rows": {"ours": "what ours runs", "a": "what a runs"},
        "disk_bytes": {"ours": 2_000_000, "a": 3_000_000},
        "memory": figures.memory,
        "failures": {"b": "cannot be built: no compiler"},
        "cores": figures.cores,
        "others": {STEP.name: [0.0, 1.5, 9.0]},
        "summary": summarise(figures.samples),
    }
    text = render(document)
    ours, theirs = (
        line
        for line in text.splitlines()
        if line.startswith(("  ours ", "  a ")) and "limit" in line
    )
    assert "2560.0" in ours  # 256 tokens in 100 ms
    assert "50 % of the limit" in ours  # 5 GOP at 100 GOP/s are 50 ms
    assert "1280.0" in theirs
    assert "2.00x (2.00 to 2.00)" in theirs
    assert "2.0 cores" in theirs
    assert "prefill 256, tok/s   (other processes kept 1.5 cores busy)" in text
    assert "not measured: b: cannot be built: no compiler" in text


def test_names_on_the_command_line_are_checked() -> None:
    assert arguments_of(["--peers", "ours,torch"]).peers == ["ours", "torch"]
    with pytest.raises(SystemExit, match="unknown peers: tflite"):
        arguments_of(["--peers", "ours,tflite"])
    with pytest.raises(SystemExit, match="unknown measures"):
        arguments_of(["--measure", ""])
    with pytest.raises(SystemExit, match="1 or more"):
        arguments_of(["--rounds", "0"])
    assert chosen("a,b", ("a", "b"), "letters") == ["a", "b"]


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_is_described_and_pins_its_versions(name: str) -> None:
    peer = find_peer(name)
    assert peer.name == name
    assert set(peer.formats) == set(peer.rows)
    assert all("==" in requirement for requirement in (*peer.requirements, *peer.unpinned))


def test_peers_load_nothing_but_the_standard_library_before_they_are_asked() -> None:
    import subprocess

    modules = [find_peer(name).module for name in PEERS]
    program = f"import sys, {', '.join(modules)}\nprint(sorted(sys.modules))"
    root = Path(peer_module.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    loaded = eval(done.stdout)
    assert "benchmarks.peers.llamacpp" in loaded
    assert not {"numpy", "torch", "lorgnette", "onnxruntime"} & set(loaded)
