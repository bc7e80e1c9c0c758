"""The calibration set that comes with the package, and the pictures to measure on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from tests.zoo.calibration_set import EVERYONE, calibration_samples, quality_samples, write
from tests.zoo.families import FAMILIES
from tests.zoo.questions import HELD_OUT, KINDS, draw_sample

SHIPPED = Path(__file__).parents[2] / "quantize" / "default_samples"


def lines(folder: Path) -> list[dict[str, str]]:
    text = (folder / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_set_that_comes_with_the_package_is_the_drawn_one() -> None:
    listed, drawn = lines(SHIPPED), calibration_samples()
    assert len(listed) == len(drawn) == 48
    for line, asked in zip(listed, drawn, strict=True):
        assert set(line) == {"image", "question", "answer"}
        assert (line["question"], line["answer"]) == (asked.question, asked.answer)
        with Image.open(SHIPPED / line["image"]) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(asked.picture))
    assert {p.name for p in SHIPPED.iterdir()} == {"samples.jsonl", *(li["image"] for li in listed)}


def test_the_set_is_small_and_holds_every_kind_and_shape() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 1_500_000
    drawn = calibration_samples()
    kinds = Counter(asked.kind for asked in drawn)
    assert set(kinds) == set(KINDS)
    assert max(kinds.values()) - min(kinds.values()) <= 1
    ratios = [asked.picture.width / asked.picture.height for asked in drawn]
    assert min(ratios) < 0.6
    assert max(ratios) > 1.9
    assert max(max(r, 1 / r) for r in ratios) < 2.1
    assert all(128 <= max(asked.picture.size) <= 200 for asked in drawn)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, count=4)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [p.name for p in one] == ["000.png", "001.png", "002.png", "003.png", "samples.jsonl"]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_no_picture_is_measured_on_that_was_seen_before() -> None:
    seen = {asked.picture.tobytes() for asked in calibration_samples(14)}
    seen |= {draw_sample(HELD_OUT, i, EVERYONE).scene.image.tobytes() for i in range(14)}
    measured = {asked.picture.tobytes() for asked in quality_samples(EVERYONE, 14)}
    assert not seen & measured
    assert len(measured) == 14


def test_quality_samples_follow_the_exam_of_a_family() -> None:
    for family in FAMILIES.values():
        asked = quality_samples(family.exam, len(family.exam.kinds))
        assert [one.kind for one in asked] == list(family.exam.kinds)
        assert [one.question for one in quality_samples(family.exam, 2, first=4)] == [
            one.question for one in asked[4:6]
        ]
