"""The number of threads that was found fastest is kept for a bundle and a machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorgnette.bundle import open_bundle
from lorgnette.runtime import model as model_module
from lorgnette.runtime import threads as threads_module
from lorgnette.runtime.engines.engine import WholeEngine
from lorgnette.runtime.model import open_model
from lorgnette.runtime.profile.document import Figure, Threads
from lorgnette.runtime.profile.measure import fastest
from lorgnette.runtime.profile.stats import unknown
from lorgnette.runtime.threads import keep_threads, kept_threads


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder of caches, whatever the system."""
    folder = tmp_path / "cache" / "lorgnette"
    monkeypatch.setattr(threads_module, "_folder", lambda: folder)
    return folder


def test_what_was_kept_is_used_where_no_number_is_given(
    fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def note(bundle: object, threads: int) -> WholeEngine:
        asked.append(threads)
        return WholeEngine()

    monkeypatch.setattr(model_module, "open_engine", note)
    monkeypatch.setattr(model_module, "usable_cores", lambda: 7)
    open_model(fp32)
    path = keep_threads(open_bundle(fp32), 3)
    assert path.is_file()
    open_model(fp32)
    open_model(fp32, threads=2)
    assert asked == [7, 3, 2]


def test_a_number_is_for_one_bundle_and_one_machine(
    bundle_of: object, fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_bundle(bundle_of("int8"))  # type: ignore[operator]
    keep_threads(open_bundle(fp32), 3)
    assert kept_threads(open_bundle(fp32)) == 3
    assert kept_threads(other) is None
    monkeypatch.setattr(threads_module, "usable_cores", lambda: 99)
    assert kept_threads(open_bundle(fp32)) is None


def test_the_newest_number_counts_and_the_oldest_bundles_are_forgotten(
    fp32: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads_module, "MOST_KEPT", 2)
    cache.mkdir(parents=True)
    (cache / "threads.json").write_text(json.dumps({"a": 1, "b": 2}))
    keep_threads(open_bundle(fp32), 4)
    keep_threads(open_bundle(fp32), 5)
    assert kept_threads(open_bundle(fp32)) == 5
    assert next(iter(json.loads((cache / "threads.json").read_text()))) == "b"
    assert [path.name for path in cache.iterdir()] == ["threads.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"a": "b"}', "[" * 100_000, '{"KEY": 0}', '{"KEY": 99999}', " " * 2**21],
)
def test_a_damaged_file_is_as_good_as_none(fp32: Path, cache: Path, text: str) -> None:
    bundle = open_bundle(fp32)
    cache.mkdir(parents=True)
    (cache / "threads.json").write_text(text.replace("KEY", threads_module._key(bundle)))
    assert kept_threads(bundle) is None
    keep_threads(bundle, 2)
    assert kept_threads(bundle) == 2


def figures(ttft_ms: float | None, tokens_per_s: float | None) -> Threads:
    def figure(value: float | None) -> Figure:
        if value is None:
            return unknown("not measured")
        return Figure(median=value, p10=value, p90=value, min=value, runs=3)

    return Threads(
        ttft_tile_ms=figure(ttft_ms),
        vision_tile_ms=figure(1.0),
        prefill_256_tokens_per_s=figure(1.0),
        decode_256_tokens_per_s=figure(tokens_per_s),
    )


def test_the_fastest_number_gives_a_short_answer_soonest() -> None:
    # Two threads see the picture sooner, four write it down sooner: 64 tokens are 640 or 320 ms.
    sweep = {"1": figures(2000, 50), "2": figures(900, 100), "4": figures(1000, 200)}
    assert fastest(sweep) == 4
    assert fastest(sweep | {"4": figures(1300, 200)}) == 2
    assert fastest(sweep | {"8": figures(None, 900), "16": figures(1, None)}) == 4
    assert fastest({}) is None
