"""`lorgnette profile`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest

from lorgnette.cli import profile as command
from lorgnette.errors import LorgnetteError
from lorgnette.runtime.profile.document import Profile, read_profile
from tests.unit.cli_helpers import bundle, call, changed_bundle, document, hide, picture, start
from tests.unit.cli_helpers import refused as one_line

QUICK = ("--threads", 1, "--sweep", "1", "--runs", 2, "--seconds", 0.2)
XHTML = "{http://www.w3.org/1999/xhtml}"


class Made:
    """One run of the command with everything it writes."""

    def __init__(self, folder: Path) -> None:
        """Measures."""
        self.out, self.html = folder / "a.json", folder / "a.html"
        asked = (bundle("fp32"), *QUICK, "--image", picture(folder))
        self.result = call("profile", *asked, "--out", self.out, "--html", self.html)

    @property
    def profile(self) -> Profile:
        """What was written."""
        return read_profile(self.out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("profile"))


def parsed(path: Path) -> ElementTree.Element:
    """A report as XML, once it has passed a parser of HTML too."""
    data = path.read_bytes()
    HTMLParser().feed(data.decode("utf-8"))
    return ElementTree.fromstring(data)


def rows(text: str, title: str) -> list[list[str]]:
    """Cells of the table whose first line begins with a title."""
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.strip().startswith(title))
    table = lines[first + 1 :]
    end = next((n for n, line in enumerate(table) if not line.strip()), len(table))
    return [re.split(r"\s{2,}", line.strip()) for line in table[:end]]


def test_it_tells_what_a_person_feels_first(made: Made) -> None:
    assert made.result.exit_code == 0, made.result.stderr
    assert made.result.stderr == ""
    text, found = made.result.stdout, made.profile
    assert text.startswith("fp32.lorg (smolvlm-tiny, fp32, onnx-cpu), 1 thread, ")
    table = {row[0]: row[1:] for row in rows(text, "median")}
    ttft, peak = found.answers["one_tile"].ttft_ms, found.memory["prefill"].peak_bytes
    assert ttft.median is not None
    assert peak is not None
    assert table["first token, 1 tile"][0].split()[1] == "ms"
    assert float(table["first token, 1 tile"][0].split()[0]) == pytest.approx(ttft.median, rel=0.01)
    assert list(table)[:2] == ["cold start, to the first token", "warm start, to the first token"]
    assert "decode, context 256" in table
    assert table["peak memory"][0].endswith(" MB")
    for name, entry in (found.operators.entry_points or {}).items():
        title = f"{name} ({entry.component}, {entry.what}): "
        below = text.partition(title)[2].splitlines()[1]
        share = sum(g.share for g in entry.groups if g.operator == below.split()[0])
        assert f"{share:.1%}" in below
    assert "projector: not measured: the projector is inside the graph" in text


def test_the_picture_is_the_one_given(made: Made) -> None:
    settings, answer = made.profile.settings, made.profile.answers["full_tiling"]
    assert (settings.picture, settings.picture_size) == ("picture.png", (96, 64))
    # 128 pixels wide, in tiles of 64: two rows of two and the thumbnail.
    assert answer.tiles == 5


def test_the_report_is_whole_and_loads_nothing(made: Made) -> None:
    root = parsed(made.html)
    body = root.find(f"{XHTML}body")
    assert body is not None
    told = "\n".join(body.itertext())
    for part in ("Profile of fp32.lorg", "Until the first token", "Memory", "Threads", "avx"):
        assert part in told
    for name in made.profile.operators.entry_points or {}:
        assert f"{name} (" in told
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith("data:image/svg+xml;base64,")
    images = list(root.iter(f"{XHTML}img"))
    assert len(images) == 9


def test_json_is_the_document_and_nothing_else(tmp_path: Path) -> None:
    asked = (bundle("fp32"), "--threads", 1, "--sweep", "none", "--seconds", 0, "--no-cold")
    out = tmp_path / "a.json"
    told = document("profile", *asked, "--out", out)
    assert told == json.loads(out.read_text())
    assert told["schema"] == {"name": "lorgnette.profile", "major": 1, "minor": 0}
    assert told["sweep"] == {}
    assert told["start"]["cold"]["reason"] == "left out by --no-cold"
    assert told["start"]["warm"]["ready_ms"]["runs"] == 1
    assert list(tmp_path.iterdir()) == [out]


def test_the_fastest_number_of_threads_is_kept(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorgnette.bundle import open_bundle
    from lorgnette.runtime import threads
    from lorgnette.runtime.profile import measure

    monkeypatch.setattr(threads, "_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(measure, "measure", lambda *_: made.profile)
    path = bundle("fp32")
    result = call("profile", path, "--keep-threads", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["sweep"].keys() == {"1"}
    assert result.stderr == f"1 thread from now on, kept in {tmp_path / 'cache' / 'threads.json'}\n"
    assert threads.kept_threads(open_bundle(path)) == 1
    (tmp_path / "cache" / "threads.json").unlink()
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("in the way")
    line = one_line(call("profile", path, "--keep-threads"))
    assert "cannot keep the number of threads" in line


def test_comparing_equal_documents_finds_nothing(made: Made) -> None:
    result = call("profile", "--compare", made.out, made.out)
    assert result.exit_code == 0
    verdicts = {row[-1] for row in rows(result.stdout, "A ")}
    assert verdicts == {"inside the noise"}


def test_comparing_finds_what_was_planted(made: Made, tmp_path: Path) -> None:
    values = json.loads(made.out.read_text())
    figure = values["answers"]["one_tile"]["vision_ms"]
    for name in ("median", "p10", "p90", "min"):
        figure[name] *= 1000
    values["settings"]["threads"] = 8
    other, html, out = tmp_path / "b.json", tmp_path / "b.html", tmp_path / "c.json"
    other.write_text(json.dumps(values))
    asked = ("--compare", other, made.out, "--html", html, "--out", out)
    result = call("profile", *asked)
    table = {row[0]: row[1:] for row in rows(result.stdout, "A ")}
    assert table["answers.one_tile.vision_ms"][2] == "1000.00"
    better = [name for name, cells in table.items() if cells[-1].endswith("is better")]
    assert better == ["answers.one_tile.vision_ms"]
    assert "warning: threads differ: 8 and 1" in result.stdout
    told = "\n".join(parsed(html).itertext())
    assert "B is better" in told
    assert "threads differ" in told
    assert json.loads(out.read_text()) == document("profile", "--compare", other, made.out)


def test_names_from_files_steer_neither_terminal_nor_browser(made: Made, tmp_path: Path) -> None:
    values = json.loads(made.out.read_text())
    values["bundle"]["name"] = "a\x1b[2J</title><script>alert(1)</script>"
    values["machine"]["cpu"] = "$\\frac$ \ud800"
    values["memory"]["<b>\x07"] = values["memory"].pop("open")
    other, html = tmp_path / "b.json", tmp_path / "b.html"
    other.write_text(json.dumps(values).replace("\\ud800", "x"))
    result = call("profile", "--compare", other, made.out, "--html", html)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\x07" not in result.stdout
    assert not list(parsed(html).iter(f"{XHTML}script"))
    from lorgnette.report.profile_html import render_profile

    html.write_bytes(render_profile(read_profile(other)))
    assert not list(parsed(html).iter(f"{XHTML}script"))


def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr("lorgnette.runtime.profile.measure.measure_starts", never)
    monkeypatch.setattr("lorgnette.runtime.profile.measure.run_job", never)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--threads", 0), "threads is out of range: got 0, wanted 1 or more"),
        (("--runs", 0), "runs is out of range"),
        (("--runs", -1), "runs is out of range"),
        (("--seconds", -1), "seconds is out of range"),
        (("--seconds", "nan"), "seconds is out of range"),
        (("--sweep", "1,0"), "sweep is out of range"),
        (("--image", "none.png"), "cannot read the picture in none.png"),
        (("--out", "none/a.json"), "cannot write the file in none/a.json"),
        (("--html", "none/a.html"), "cannot write the file in none/a.html"),
        (("--out", "."), "not a plain file"),
        (("--out", "/dev/null"), "not a plain file"),
        (("--out", "a", "--html", "a"), "the same file"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: tuple[object, ...], words: str
) -> None:
    path = bundle("fp32")
    nothing_is_measured(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert words in one_line(call("profile", path, *given))
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = bundle("fp32")
    nothing_is_measured(monkeypatch)
    (tmp_path / "a.png").write_text("no picture")
    assert "not a picture" in one_line(call("profile", path, "--image", tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine": "abacus"}, "unknown engine"),
        ({"not_run": "needs a phone"}, "cannot be run here"),
        ({"format": {"major": 99, "minor": 0}}, "bundle format is not supported"),
    ],
)
def test_a_bundle_that_nothing_here_runs_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("tests.unit.cli_helpers.bundle", lambda: bundle("fp32"))
    path = changed_bundle(tmp_path, lambda manifest: manifest.update(change))
    nothing_is_measured(monkeypatch)
    assert words in one_line(call("profile", path))


def test_no_bundle_is_refused(tmp_path: Path) -> None:
    assert "bundle does not exist" in one_line(call("profile", tmp_path / "none.lorg"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "BUNDLE is missing"),
        (("a.lorg", "--compare", "a", "b"), "no BUNDLE"),
        (("--compare", "a", "b", "--runs", 10), "no --runs"),
        (("--compare", "a", "b", "--no-cold"), "no --no-cold"),
        (("--compare", "a", "b", "--keep-threads"), "no --keep-threads"),
        (("a.lorg", "--keep-threads", "--sweep", "none"), "--keep-threads wants a --sweep"),
        (("a.lorg", "--sweep", "two"), "--sweep wants numbers"),
        (("a.lorg", "--sweep", ""), "--sweep wants numbers"),
        (("a.lorg", "--device", "moon"), "'host'"),
    ],
)
def test_what_says_nothing_is_a_usage_error(given: tuple[object, ...], words: str) -> None:
    result = call("profile", *given)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_report_needs_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = bundle("fp32")
    nothing_is_measured(monkeypatch)
    hide(monkeypatch, "matplotlib")
    asked = ("profile", path, "--html", tmp_path / "a.html")
    assert "pip install 'lorgnette[report]'" in one_line(call(*asked))


def test_a_damaged_document_is_refused_with_json_too(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(made.out.read_bytes()[:5000])
    one_line(call("profile", "--compare", path, made.out))
    result = call("profile", "--compare", path, made.out, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "ProfileError"


def test_a_file_is_written_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text("older")
    link = tmp_path / "link.json"
    link.symlink_to(path)
    command._write(link, b"newer")
    assert link.is_symlink()
    assert path.read_bytes() == b"newer"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(LorgnetteError, match="No space left"):
        command._write(path, b"newest")
    assert path.read_bytes() == b"newer"
    assert sorted(tmp_path.iterdir()) == [path, link]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_interrupt_ends_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    made = ("--out", tmp_path / "a.json", "--html", tmp_path / "a.html")
    child = start(("profile", bundle("fp32"), "--runs", 5, *made))
    try:
        me = psutil.Process(child.pid)
        deadline = time.monotonic() + 60
        while not (measuring := me.children()) and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert measuring, "no process was started"
    assert (child.returncode, out, err) == (130, b"", b"")
    _, alive = psutil.wait_procs(measuring, timeout=10)
    assert alive == []
    assert list(tmp_path.iterdir()) == []
