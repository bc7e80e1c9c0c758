"""Two profiles: planted differences are found, equal ones are not, and others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lorgnette.errors import ProfileError
from lorgnette.runtime.profile import document
from lorgnette.runtime.profile.compare import compare
from lorgnette.runtime.profile.document import Figure, Profile
from lorgnette.runtime.profile.flat import bytes_of, figures_of
from tests.runtime.profile_support import small_profile

Json = Any
SPREAD = {"p10": 0.95, "median": 1.0, "p90": 1.05, "min": 0.94}


@pytest.fixture(scope="module")
def plain(fp32: Path) -> Json:
    """A profile whose figures all have a spread of 5 % either way, without noise."""
    values = json.loads(document.encode_profile(small_profile(fp32)))

    def steady(part: Any) -> None:
        for name, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, dict) and value.get("median") is not None:
                part[name] = {k: value["median"] * f for k, f in SPREAD.items()}
                part[name] |= {"runs": 10, "reason": ""}
            else:
                steady(value)

    steady(values)
    values["noise"] |= {"noisy": False, "notes": []}
    return values


def profile_of(values: Json) -> Profile:
    return document.decode_profile(json.dumps(values).encode(), "x")


def times(figure: Json, factor: float) -> None:
    for name in SPREAD:
        figure[name] *= factor


def changed(values: Json, *path: str, factor: float) -> Profile:
    copy = json.loads(json.dumps(values))
    part = copy
    for name in path:
        part = part[name]
    times(part, factor)
    return profile_of(copy)


def test_equal_documents_differ_nowhere(plain: Json) -> None:
    found = compare(profile_of(plain), profile_of(plain))
    assert {row.verdict for row in found.rows} == {"inside the noise"}
    assert {row.ratio for row in found.rows} == {1.0}
    assert found.warnings == ()
    names = {row.name for row in found.rows}
    whole = profile_of(plain)
    known = {n for n, f in (figures_of(whole) | bytes_of(whole)).items() if f.median is not None}
    assert names == known


@pytest.mark.parametrize(
    ("path", "factor", "verdict"),
    [
        (("phases", "vision_tile_ms"), 2.0, "B is better"),
        (("phases", "vision_tile_ms"), 0.5, "A is better"),
        (("phases", "prefill", "256", "tokens_per_s"), 2.0, "A is better"),
        (("answers", "one_tile", "ttft_ms"), 1.2, "B is better"),
        (("answers", "one_tile", "ttft_ms"), 1.08, "inside the noise"),
    ],
)
def test_a_planted_difference_is_found_and_nothing_else(
    plain: Json, path: tuple[str, ...], factor: float, verdict: str
) -> None:
    found = compare(changed(plain, *path, factor=factor), profile_of(plain))
    rows = {row.name: row for row in found.rows}
    planted = rows.pop(".".join(path))
    assert planted.ratio == pytest.approx(factor)
    assert planted.low == pytest.approx(factor * 0.95 / 1.05)
    assert planted.high == pytest.approx(factor * 1.05 / 0.95)
    assert planted.verdict == verdict
    assert {row.verdict for row in rows.values()} == {"inside the noise"}


def test_memory_and_sizes_are_compared(plain: Json) -> None:
    copy = json.loads(json.dumps(plain))
    copy["bundle"]["bytes"] = plain["bundle"]["bytes"] * 3
    copy["memory"]["open"]["peak_bytes"] = int(plain["memory"]["open"]["peak_bytes"] * 1.01)
    rows = {row.name: row for row in compare(profile_of(copy), profile_of(plain)).rows}
    assert rows["bundle.bytes"].verdict == "B is better"
    assert rows["memory.open.peak_bytes"].verdict == "inside the noise"


def test_what_one_lacks_is_told_with_the_reason(plain: Json) -> None:
    copy = json.loads(json.dumps(plain))
    copy["phases"]["vision_full_ms"] = {
        **dict.fromkeys(SPREAD), "runs": 0, "reason": "one tile only"
    }  # fmt: skip
    copy["sweep"] = {}
    for pair in ((copy, plain), (plain, copy)):
        found = compare(*(profile_of(each) for each in pair))
        rows = {row.name: row for row in found.rows}
        assert rows["phases.vision_full_ms"].verdict == "not in both"
        assert rows["phases.vision_full_ms"].reason == "one tile only"
        assert rows["sweep.1.vision_tile_ms"].verdict == "not in both"
        assert "does not have it" in rows["sweep.1.vision_tile_ms"].reason


def test_one_run_each_needs_more_than_a_few_per_cent(plain: Json) -> None:
    def once(values: Json, value: float) -> Profile:
        copy = json.loads(json.dumps(values))
        figure = {**dict.fromkeys(SPREAD, value), "runs": 1, "reason": ""}
        copy["phases"]["vision_tile_ms"] = figure
        return profile_of(copy)

    for value, verdict in ((1.08, "inside the noise"), (1.2, "B is better")):
        found = compare(once(plain, value), once(plain, 1.0))
        (row,) = [row for row in found.rows if row.name == "phases.vision_tile_ms"]
        assert row.verdict == verdict


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("machine", "cpu"), "Slow CPU", "machines differ: Slow CPU and "),
        (("settings", "threads"), 3, "threads differ: 3 and 1"),
        (("machine", "features"), ["sve"], "CPU features differ: sve and "),
        (("noise", "notes"), ["too loud"], "A was measured on a noisy machine: too loud"),
        (("bundle", "engine"), "coreai", "engines differ: coreai and onnxruntime"),
        (("settings", "picture"), "cat.png", "pictures differ: cat.png of "),
    ],
)
def test_what_makes_them_hard_to_compare_is_told(
    plain: Json, path: tuple[str, str], value: object, words: str
) -> None:
    copy = json.loads(json.dumps(plain))
    copy[path[0]][path[1]] = value
    found = compare(profile_of(copy), profile_of(plain))
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith(words)


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e15])
def test_extreme_numbers_are_compared_and_drawn(plain: Json, value: float) -> None:
    from lorgnette.report.profile_html import render_comparison

    copy = json.loads(json.dumps(plain))
    figure = copy["phases"]["vision_tile_ms"]
    figure |= {"min": value, "p10": value, "median": value, "p90": 1e15}
    for pair in ((copy, plain), (plain, copy)):
        found = compare(*(profile_of(each) for each in pair))
        assert render_comparison(found).endswith(b"</html>\n")


def test_a_machine_that_ran_slower_is_told(plain: Json) -> None:
    found = compare(changed(plain, "noise", "calibration_ms", factor=1.5), profile_of(plain))
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("a fixed piece of work took ")


def test_a_newer_minor_version_is_read(plain: Json) -> None:
    copy = json.loads(json.dumps(plain))
    copy["schema"]["minor"] = 9
    copy["phases"]["telepathy_ms"] = 3
    assert isinstance(profile_of(copy).phases.vision_tile_ms, Figure)


@pytest.mark.parametrize("version", [{"major": 2}, {"name": "else"}])
def test_another_version_is_refused(plain: Json, version: Json, tmp_path: Path) -> None:
    copy = json.loads(json.dumps(plain))
    copy["schema"] |= version
    copy.pop("noise")  # another version may lack anything
    path = tmp_path / "a.json"
    path.write_text(json.dumps(copy))
    with pytest.raises(ProfileError, match=r"of another version in .*a.json: got .*wanted"):
        document.read_profile(path)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"schema": 1}', b"null"]
)
def test_what_is_no_profile_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(ProfileError, match="not a profile"):
        document.read_profile(path)


def test_a_cut_off_document_is_refused(plain: Json, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(plain).encode()[:-200])
    with pytest.raises(ProfileError):
        document.read_profile(path)


def test_a_file_beyond_the_limit_is_not_read(
    plain: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(plain))
    monkeypatch.setattr(document, "MAX_BYTES", 1000)
    with pytest.raises(ProfileError, match="too large"):
        document.read_profile(path)


def test_a_comparison_can_be_written(plain: Json) -> None:
    found = compare(profile_of(plain), profile_of(plain))
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found
