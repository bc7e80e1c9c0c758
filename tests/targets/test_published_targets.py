"""SmolVLM-256M of its published shape, random weights, made for every target that runs here.

Minutes each, and up to 6 GiB: run by `make test-slow`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.family_cases import picture
from tests.helpers import make_random_published

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests/golden/configs/SmolVLM-256M-Instruct.json"
MOST_RESIDENT_BYTES = 6 * 2**30
MOST_BYTES = 230_000_000
"""Of a bundle with a decoder of 4 bits and a vision encoder of 8."""


def lorgnette(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "lorgnette", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "SmolVLM-256M"
    folder.mkdir()
    make_random_published(folder, CONFIG)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("target", ["coreai", "coreml", "executorch-xnnpack"])
def test_a_published_size_climbs_the_ladder_and_answers(
    checkpoint: Path, tmp_path: Path, target: str
) -> None:
    bundle, image = tmp_path / "bundle.lorg", tmp_path / "picture.png"
    Image.fromarray(picture(320, 200)).save(image)
    made = lorgnette(
        *("export", checkpoint, "--target", target, "--quant", "int4-fast", "--out", bundle),
        *("--context", 1024, "--max-tiles", 1, "--measure", 0),
    )
    assert [rung["name"] for rung in made["ladder"]][-1] == "greedy_ids"
    assert all(rung["passed"] for rung in made["ladder"])
    assert made["peak_rss_bytes"] <= MOST_RESIDENT_BYTES
    assert made["bytes"] <= MOST_BYTES
    asked = ("--image", image, "--prompt", "What do you see?", "--max-new-tokens", 3)
    assert len(lorgnette("run", bundle, *asked)["token_ids"]) >= 1
