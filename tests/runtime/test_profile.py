"""The document of a profile: valid, consistent, and with a reason for everything it lacks."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from lorgnette.bundle import open_bundle
from lorgnette.errors import BundleError, LorgnetteError, ProfileError
from lorgnette.runtime.chat import PREFILL_CHUNK
from lorgnette.runtime.model import Model, open_model
from lorgnette.runtime.pictures import content_key
from lorgnette.runtime.preprocess import longest_edge_for_max_tiles, prepare
from lorgnette.runtime.profile import document, parent, stats
from lorgnette.runtime.profile.answers import measure_answers
from lorgnette.runtime.profile.bench import Bench
from lorgnette.runtime.profile.document import Profile
from lorgnette.runtime.profile.flat import figures_in, figures_of
from lorgnette.runtime.profile.measure import Asked, measure
from lorgnette.runtime.profile.phases import decode, measure_phases, prefill
from lorgnette.runtime.profile.picture import FreshPictures, one_tile, tile_count, with_preprocess
from lorgnette.runtime.profile.request import STEP, Job, Started
from lorgnette.runtime.profile.start import measure_starts
from lorgnette.spec import SquarePreprocess, TilePreprocess
from tests.runtime.profile_support import (
    SCHEMA,
    Clock,
    SlowEngine,
    mistakes,
    nulls,
    small_profile,
)
from tests.runtime.support import copy_bundle, edit_manifest, picture, redigest

COSTS = {"encode": 400.0, "embed": 3.0, "prefill": 0.5, "decode": 20.0}
"""What entry points take on the clock of a test, in milliseconds."""


@pytest.fixture(scope="module")
def profile(fp32: Path) -> Profile:
    return small_profile(fp32)


@pytest.fixture(scope="module")
def plain(profile: Profile) -> Any:
    return json.loads(document.encode_profile(profile))


def test_it_is_valid_by_the_schema_in_the_repository(plain: Any) -> None:
    schema = json.loads(SCHEMA.read_text())
    assert list(mistakes(plain, schema, schema)) == []


def test_the_schema_is_what_the_types_give() -> None:
    assert json.loads(SCHEMA.read_text()) == document.json_schema()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema", "major"), "1"),
        (("noise", "noisy"), None),
        (("noise", "steal_share"), 1.5),
        (("settings", "picture_size"), [64]),
        (("phases", "vision_tile_ms", "median"), -1.0),
        (("phases", "prefill", "64"), {}),
        (("memory",), []),
    ],
)
def test_the_check_by_schema_sees_what_is_wrong(
    plain: Any, path: tuple[str, ...], value: object
) -> None:
    broken = json.loads(json.dumps(plain))
    part = broken
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    schema = json.loads(SCHEMA.read_text())
    assert list(mistakes(broken, schema, schema))
    with pytest.raises(ProfileError, match=r"damaged|not a profile"):
        document.decode_profile(json.dumps(broken).encode(), "x")


def test_reading_gives_what_was_written(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(document.encode_profile(profile))
    assert document.read_profile(path) == profile


def test_every_null_has_a_reason(plain: Any) -> None:
    found = dict(nulls(plain))
    assert "$.phases.projector_ms.median" in found
    assert [where for where, reason in found.items() if not reason] == []


def test_every_figure_is_measured_or_known_to_be_out_of_reach(profile: Profile) -> None:
    missing = {name for name, figure in figures_of(profile).items() if figure.median is None}
    assert missing <= {"phases.projector_ms"} | {
        name for name in figures_of(profile) if name.startswith("start.cold")
    }


def test_figures_are_in_order(profile: Profile) -> None:
    for name, figure in figures_of(profile).items():
        if figure.runs:
            values = (figure.min, figure.p10, figure.median, figure.p90)
            known = [value for value in values if value is not None]
            assert len(known) == 4, name
            assert known == sorted(known), name


def test_the_parts_of_a_first_token_sum_to_it(profile: Profile) -> None:
    for answer in profile.answers.values():
        parts = (answer.preprocess_ms, answer.vision_ms, answer.prefill_ms, answer.rest_ms)
        total = sum(part.median or 0 for part in parts)
        # Of two runs medians are means, which sum exactly.
        assert total == pytest.approx(answer.ttft_ms.median, rel=1e-6)


def test_a_start_is_the_sum_of_its_parts(profile: Profile) -> None:
    start = profile.start["warm"]
    parts = (start.python_ms, start.imports_ms, start.load_ms)
    assert sum(part.median or 0 for part in parts) == pytest.approx(start.ready_ms.median)


def test_the_bundle_and_how_it_was_measured_are_told(profile: Profile, fp32: Path) -> None:
    found = profile.bundle
    manifest = (fp32 / "manifest.json").read_bytes()
    assert (found.name, found.checkpoint, found.family) == ("fp32.lorg", "smolvlm-tiny", "smolvlm")
    assert found.manifest_sha256 == hashlib.sha256(manifest).hexdigest()
    files = [path for path in fp32.rglob("*") if path.is_file()]
    assert found.bytes == sum(path.stat().st_size for path in files)
    assert sum(found.bytes_by_kind.values()) == found.bytes
    weights = fp32 / "graphs" / "weights.bin"
    assert found.bytes_by_kind["weights"] == weights.stat().st_size
    assert profile.settings.threads == 1
    assert profile.settings.sweep == (1,)
    assert profile.machine.packages["numpy"] == np.__version__
    assert "onnxruntime" in profile.machine.packages


def test_operators_of_every_entry_point_are_told(profile: Profile) -> None:
    entries = profile.operators.entry_points
    assert entries is not None
    assert list(entries) == ["encode", "embed", "prefill", "decode"]
    for entry in entries.values():
        for parts in (entry.nodes, entry.groups):
            assert sum(part.share for part in parts) == pytest.approx(1)
            assert sum(part.ms for part in parts) == pytest.approx(entry.operators_ms)
        assert sum(group.nodes for group in entry.groups) == len(entry.nodes)
        assert entry.operators_ms <= entry.wall_ms
        assert len({node.node for node in entry.nodes}) == len(entry.nodes)
    encode = {group.operator for group in entries["encode"].groups}
    decode = {group.operator for group in entries["decode"].groups}
    assert "MultiHeadAttention" in encode
    assert "GroupQueryAttention" in decode - encode
    assert ("layers.*.attention", "GroupQueryAttention", 4) in {
        (group.module, group.operator, group.nodes) for group in entries["decode"].groups
    }
    assert "tower.layers.0.mlp.fc1" in {node.module for node in entries["encode"].nodes}
    named = sum(group.share for group in entries["encode"].groups if group.module)
    assert named == pytest.approx(1)


def slow_model(model: Model, clock: Clock, **costs: float) -> Model:
    """The model with an engine that takes its time on a clock."""
    slow = with_preprocess(model, model.manifest.preprocess)
    slow.engine = SlowEngine(model.engine, clock, COSTS | costs)
    return slow


def medians(
    model: Model, monkeypatch: pytest.MonkeyPatch, preprocess_ms: float = 50.0, **costs: float
) -> dict[str, float]:
    """Times of each phase and of first tokens, on a clock that costs alone move."""
    with monkeypatch.context() as patch:
        clock = Clock(patch)
        module = "lorgnette.runtime.preprocess"
        real = prepare.__globals__["split_picture"]

        def split(*args: Any) -> Any:
            clock.ms += preprocess_ms
            return real(*args)

        patch.setattr(f"{module}.split_picture", split)
        slow = slow_model(model, clock, **costs)
        pictures = FreshPictures(None, slow.manifest.preprocess.tile_size)
        bench = Bench(runs=2, seconds=60.0)
        phases = measure_phases(slow, bench, pictures)
        answers = measure_answers(slow, bench, pictures)
    found = dict(figures_of_part("phases", phases)) | dict(figures_of_part("answers", answers))
    return {name: value for name, value in found.items() if value is not None}


def figures_of_part(name: str, part: object) -> dict[str, float | None]:
    return {where: figure.median for where, figure in figures_in(name, part).items()}


def test_each_phase_is_measured_as_what_it_takes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = medians(model, monkeypatch)
    assert found["phases.preprocess_tile_ms"] == pytest.approx(50)
    assert found["phases.preprocess_full_ms"] == pytest.approx(50)
    assert found["phases.vision_tile_ms"] == pytest.approx(400)
    assert found["phases.vision_full_ms"] == pytest.approx(5 * 400)
    assert found["phases.embedding_token_ms"] == pytest.approx(3)
    assert found["phases.prefill.256.ms"] == pytest.approx(128)
    assert found["phases.prefill.1024.ms"] == pytest.approx(512)
    assert found["phases.prefill.1024.tokens_per_s"] == pytest.approx(2000)
    assert found["phases.decode.256.token_ms"] == pytest.approx(23)
    assert found["phases.decode.256.decoder_ms"] == pytest.approx(20)
    assert found["phases.decode.256.embedding_ms"] == pytest.approx(3)
    assert found["phases.decode.1024.tokens_per_s"] == pytest.approx(1000 / 23)
    one = "answers.one_tile"
    prompt = 37  # positions, as `test_the_document` of the command tells
    assert found[f"{one}.ttft_ms"] == pytest.approx(50 + 400 + 3 + prompt * 0.5)
    assert found[f"{one}.vision_ms"] == pytest.approx(400)
    assert found["answers.full_tiling.vision_ms"] == pytest.approx(2000)
    # A second turn neither preprocesses nor encodes.
    assert found[f"{one}.second_turn_ms"] < 50


def test_decode_is_measured_at_its_context_and_prefill_from_the_beginning(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        slow = slow_model(model, Clock(patch))
        assert isinstance(slow.engine, SlowEngine)
        decode(slow, Bench(2, 60.0), 700)
        steps = [run for run in slow.engine.runs if run[1] == 1]
        filled = slow.engine.runs[: -len(steps)]
        slow.engine.runs.clear()
        prefill(slow, Bench(2, 60.0), 600)
    assert sum(count for _, count in filled) == 699
    assert len(steps) > 10
    assert set(steps) == {(699, 1)}
    chunks = [(at, min(PREFILL_CHUNK, 600 - at)) for at in range(0, 600, PREFILL_CHUNK)]
    assert slow.engine.runs == 3 * chunks


@pytest.mark.parametrize(
    ("slow", "shown"),
    [
        ({"preprocess_ms": 1000.0}, "preprocess"),
        ({"encode": 4000.0}, "vision"),
        ({"embed": 300.0}, "embedding"),
        ({"prefill": 50.0}, "prefill"),
        ({"decode": 900.0}, "decoder"),
    ],
)
def test_what_is_slowed_down_shows_up_as_that_phase_and_no_other(
    model: Model, monkeypatch: pytest.MonkeyPatch, slow: dict[str, float], shown: str
) -> None:
    before, after = medians(model, monkeypatch), medians(model, monkeypatch, **slow)
    # Sums of phases change too, and the prefill of an answer has the embedding in it.
    sums = ("token_ms", "ttft_ms", "second_turn_ms", "per_s")
    sums += (".prefill_ms",) if shown == "embedding" else ()
    changed = {name for name in before if after[name] > before[name] * 1.5 + 1}
    assert {name for name in changed if name.startswith("phases.")}
    for name in changed:
        assert shown in name or name.endswith(sums), name
    expected = {n for n in before if shown in n and n.startswith("phases.") and "per_s" not in n}
    assert expected <= changed


def test_a_picture_that_a_cache_answers_is_refused(model: Model) -> None:
    pictures = FreshPictures(None, model.manifest.preprocess.tile_size)
    same = pictures.take()
    pictures.take = lambda: same  # type: ignore[method-assign]
    with pytest.raises(ProfileError, match="not encoded afresh"):
        measure_answers(model, Bench(2, 1.0), pictures)


def test_what_does_not_fit_the_context_is_null_with_the_reason(fp32: Path, tmp_path: Path) -> None:
    def shorten(manifest: dict[str, Any]) -> None:
        manifest["context_length"] = 40

    path = edit_manifest(copy_bundle(fp32, tmp_path / "a.lorg"), shorten)
    model = open_model(path, threads=1)
    pictures = FreshPictures(None, model.manifest.preprocess.tile_size)
    phases = measure_phases(model, Bench(1, 0.0), pictures)
    answers = measure_answers(model, Bench(1, 0.0), pictures)
    for part in (phases.prefill["64"].ms, phases.decode["1024"].token_ms):
        assert part.median is None
        assert part.reason == "the bundle's context ends at 40 positions"
    assert answers["one_tile"].ttft_ms.median is not None
    assert "does not fit the context" in answers["one_tile"].second_turn_ms.reason
    assert "does not fit the context" in answers["full_tiling"].reason
    assert answers["full_tiling"].tiles == 5
    for plain in (msgspec.to_builtins(phases), msgspec.to_builtins(answers)):
        assert [where for where, reason in nulls(plain) if not reason] == []


def specs(tile: int) -> list[TilePreprocess | SquarePreprocess]:
    pixels: Any = {"rescale": 1 / 255, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return [
        TilePreprocess(
            tile_size=tile, longest_edge=4 * tile, split=True, resample="lanczos", **pixels
        ),
        SquarePreprocess(
            tile_size=tile, fit="pad", background=(1, 2, 3), resample="bicubic", **pixels
        ),
        SquarePreprocess(
            tile_size=tile, fit="stretch", background=(0, 0, 0), resample="bicubic", **pixels
        ),
    ]


@pytest.mark.parametrize("tile", [27, 64])
@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("shape", [(7, 5), (64, 64), (40, 333)])
def test_every_picture_is_another_one_in_its_tiles(
    tile: int, kind: int, shape: tuple[int, int], tmp_path: Path
) -> None:
    from PIL import Image

    spec, single = specs(tile)[kind], one_tile(specs(tile)[kind])
    file = tmp_path / "a.png"
    Image.fromarray(np.full((*shape, 3), 90, np.uint8)).save(file)
    pictures = FreshPictures(file, tile)
    for each in (spec, single):
        made = [prepare(pictures.take(), each) for _ in range(40)]
        assert len({content_key(tiles) for tiles in made}) == 40
        assert {len(tiles.pixels) for tiles in made} == {tile_count(pictures, each)}
    assert tile_count(pictures, single) == 1


@pytest.mark.parametrize("shape", [(64, 64), (40, 333), (200, 90)])
def test_one_tile_is_what_an_export_for_one_tile_makes(shape: tuple[int, int]) -> None:
    spec = specs(64)[0]
    assert isinstance(spec, TilePreprocess)
    edge = longest_edge_for_max_tiles(1, spec.tile_size, spec.longest_edge)
    exported = msgspec.structs.replace(spec, longest_edge=edge)
    pixels = picture(*shape)
    made, wanted = prepare(pixels, one_tile(spec)), prepare(pixels, exported)
    assert (made.rows, made.cols) == (wanted.rows, wanted.cols) == (0, 0)
    np.testing.assert_array_equal(made.pixels, wanted.pixels)


def test_percentiles_are_those_of_the_sorted_runs() -> None:
    found = stats.figure([5.0, 1.0, 2.0, 3.0, 4.0, 11.0, 7.0, 8.0, 9.0, 10.0, 6.0])
    assert (found.min, found.p10, found.median, found.p90, found.runs) == (1, 2, 6, 10, 11)
    assert stats.rates([10.0, 20.0], 2).median == pytest.approx(150)
    assert stats.spread(found) == 5


@pytest.mark.parametrize(
    ("each_ms", "runs", "counting", "all_"),
    [
        (1, 10, 10, 11),
        (600, 10, 3, 4),
        (600, 2, 2, 3),
        (250, 10, 5, 6),
        (1_500, 10, 3, 3),
        (9_000, 2, 2, 2),
        (11_000, 10, 1, 1),
    ],
)
def test_runs_stop_at_their_number_or_after_their_seconds(
    monkeypatch: pytest.MonkeyPatch, each_ms: float, runs: int, counting: int, all_: int
) -> None:
    clock = Clock(monkeypatch)

    def run() -> float:
        clock.ms += each_ms
        return each_ms

    assert stats.repeat(run, runs, 1.0) == [each_ms] * counting
    assert clock.ms == each_ms * all_


def job(bundle: Path, kind: str = "start") -> Job:
    return Job(kind=kind, bundle=str(bundle), threads=1, picture=None, runs=1, seconds=0.0)


def test_what_a_process_cannot_open_is_told_as_here(fp32: Path, tmp_path: Path) -> None:
    path = copy_bundle(fp32, tmp_path / "a.lorg")
    (path / "graphs" / "decoder.onnx").write_bytes(b"no graph")
    redigest(path)
    with pytest.raises(BundleError) as here:
        open_model(path)
    with pytest.raises(LorgnetteError) as told:
        measure(path, Asked(threads=1, runs=1))
    assert str(told.value) == str(here.value)
    assert told.value.exit_code == 2


def test_a_process_that_dies_is_one_clear_error(
    fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parent._wait

    def dies(command: list[str], *rest: Any) -> int:
        return real([command[0], "-c", "import os; os.abort()"], *rest)

    monkeypatch.setattr(parent, "_wait", dies)
    with pytest.raises(ProfileError, match="a measuring process failed in start: got exit code -6"):
        parent.run_job(job(fp32), dict)


def test_an_interrupt_ends_the_process_of_a_job(
    fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    real: Callable[..., Any] = subprocess.Popen
    code = f"import sys, time; sys.stdout.buffer.write({STEP!r} + b'one\\n'); sys.stdout.flush()"

    def begin(command: list[str], **options: Any) -> Any:
        begun.append(real([command[0], "-c", f"{code}; time.sleep(30)"], **options))
        return begun[0]

    def interrupt(step: str) -> None:
        assert step == "one"
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", begin)
    with pytest.raises(KeyboardInterrupt):
        parent.run_job(job(fp32), dict, interrupt)
    assert [process.returncode for process in begun] == [-signal.SIGKILL]


@pytest.mark.parametrize(
    ("share", "refused", "cold", "words"),
    [
        (None, "", True, "does not tell what is in its file cache"),
        (0.0, "", True, ""),
        (0.9, "", False, "the system keeps 90% of the bundle in memory"),
        (1.0, "it cannot", False, "it cannot"),
    ],
)
def test_a_cold_start_is_told_where_files_can_be_forgotten(
    fp32: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float | None,
    refused: str,
    cold: bool,
    words: str,
) -> None:
    module = "lorgnette.runtime.profile.start"
    told = Started(entered=1.0, imported=2.0, ready=4.0, first_token=7.0)
    monkeypatch.setattr(f"{module}.cached_share", lambda files: share)
    monkeypatch.setattr(f"{module}.evict", lambda files: refused)
    ready = Started(entered=1.0, imported=2.0, ready=5.0, first_token=None)
    replies = {"start": (told, 0.5), "ready": (ready, 0.75)}
    monkeypatch.setattr(f"{module}.run_job", lambda asked, *_: replies[asked.kind])
    found = measure_starts(open_bundle(fp32), Bench(2, 60.0), job(fp32), cold=True)["cold"]
    assert found.first_token_ms.median == (6500.0 if cold else None)
    assert found.ready_ms.median == (4250.0 if cold else None)
    assert found.load_ms.median == (3000.0 if cold else None)
    assert words in found.reason
    assert bool(words) == bool(found.reason)
    assert [where for where, reason in nulls(msgspec.to_builtins(found)) if not reason] == []


def test_what_only_a_part_needs_is_null_where_it_fails(
    fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = parent.run_job

    def fails(asked: Job, *rest: Any) -> Any:
        if asked.kind != "phases":
            raise ProfileError("no memory left", where=asked.kind)
        return real(asked, *rest)

    monkeypatch.setattr("lorgnette.runtime.profile.measure.run_job", fails)
    asked = Asked(threads=1, sweep=(1,), runs=1, seconds=0.0, cold=False)
    steps: list[str] = []
    found = measure(fp32, asked, steps.append)
    assert steps[:4] == ["warm start", "memory", "operators", "1 thread"]
    assert {"vision, a tile", "first token, 5 tiles", "decode, context 1024"} <= set(steps)
    plain = json.loads(document.encode_profile(found))
    assert found.operators.reason == "no memory left in operators"
    assert [where for where, reason in nulls(plain) if not reason] == []
    assert found.start["cold"].reason == "left out by --no-cold"
    assert found.phases.vision_tile_ms.median is not None
