"""MobileVLM and OmniVLM of published sizes, random weights, through the command line.

Each takes ten minutes or more and up to 10 GiB: run by `make test-slow`.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.family_cases import MobileVlm, OmniVlm, picture

CASES: dict[str, MobileVlm | OmniVlm] = {
    "MobileVLM_V2-1.7B": MobileVlm("ldpnetv2", published="MobileVLM_V2-1.7B"),
    "OmniVLM-968M": OmniVlm(kind="F16", published="OmniVLM-968M"),
}
QUESTION = "What is in this picture?"
ANSWER = 32
MOST_RESIDENT_BYTES = 12 * 2**30
"""Of an export to int4."""


def lorgnette(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "lorgnette", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_published_size_exports_and_answers_as_the_oracle_does(tmp_path: Path, name: str) -> None:
    case, pixels = CASES[name], picture(320, 200)
    checkpoint, image = case.make(tmp_path / name), tmp_path / "picture.png"
    Image.fromarray(pixels).save(image)
    oracle = case.oracle(checkpoint)
    wanted = oracle.greedy(case.ids(QUESTION), case.tile(pixels), ANSWER)
    del oracle  # one model in memory at a time
    gc.collect()
    ends = [at + 1 for at, token in enumerate(wanted) if token in case.stops]
    for scheme in ("fp32", "int4"):
        bundle = tmp_path / f"{scheme}.lorg"
        made = lorgnette(
            *("export", checkpoint, "--quant", scheme, "--out", bundle),
            *("--measure", 2, "--accept-loss"),  # random weights keep no promise
        )
        asked = ("--image", image, "--prompt", QUESTION, "--max-new-tokens", ANSWER)
        answer = lorgnette("run", bundle, *asked)
        if scheme == "fp32":
            assert answer["token_ids"] == wanted[: min(ends, default=ANSWER)]
            (bundle / "graphs" / "weights.bin").unlink()  # gigabytes
        else:
            assert made["peak_rss_bytes"] <= MOST_RESIDENT_BYTES
            assert len(answer["token_ids"]) >= 1
