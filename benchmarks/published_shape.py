"""Export and run of a published shape with random weights: time, memory, size, speed.

    python -m benchmarks.published_shape [--config tests/golden/configs/SmolVLM-256M-Instruct.json]
        [--target onnx-cpu] [--quant int4] [--threads N] [--keep DIR]

Configs of every family are under tests/golden/configs. Makes the checkpoint in the form it is
published in, exports it (SmolVLM at the full tiling and at one tile), and asks each bundle about
the same 640 x 480 picture, all through the command line in processes of their own. Speeds are
medians of the runs; the machine's load is printed beside them, since it decides what they mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers import make_random_published
from tests.make_mobilevlm import CLIP_L_336, make_mobilevlm
from tests.make_omnivlm import make_published_pair

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "tests/golden/configs/SmolVLM-256M-Instruct.json"
NEW_TOKENS = 65


def lorgnette(*arguments: object) -> dict[str, Any]:
    """Runs a command with --json and returns its document."""
    command = [sys.executable, "-m", "lorgnette", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def make(folder: Path, config_file: Path) -> None:
    """Writes a checkpoint as its family publishes them."""
    config = json.loads(config_file.read_text())
    if config["model_type"] == "mobilevlm":
        make_mobilevlm(folder, config, CLIP_L_336, dtype="bfloat16")
    elif config["model_type"] == "omnivlm":
        make_published_pair(folder, config_file)
    else:
        make_random_published(folder, config_file)


def run(bundle: Path, picture: Path, threads: int, runs: int) -> dict[str, float]:
    """Medians over several cold processes."""
    documents = [
        lorgnette(
            *("run", bundle, "--image", picture, "--prompt", "What do you see?"),
            *("--max-new-tokens", NEW_TOKENS, "--threads", threads),
        )
        for _ in range(runs)
    ]
    times = {
        f"{name} ms": statistics.median(document["timings_ms"][name] for document in documents)
        for name in documents[0]["timings_ms"]
    }
    return {
        "tiles": documents[0]["tiles"],
        "prompt tokens": documents[0]["prompt_tokens"],
        **times,
        "decode tokens/s": statistics.median(d["decode_tokens_per_s"] for d in documents),
        "peak RSS MB": max(document["peak_rss_bytes"] for document in documents) / 1e6,
    }


def main() -> None:
    """Reads the command line and prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--target", default="onnx-cpu")
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--context", type=int, help="KV cache capacity, where not the model's")
    parser.add_argument("--plan", type=Path, help="a plan file, in place of --quant")
    parser.add_argument("--tiles", type=int, nargs="+", help="only these of --max-tiles")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder to leave checkpoint and bundles in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        checkpoint = folder / arguments.config.stem
        if not checkpoint.exists():
            checkpoint.mkdir(parents=True)
            make(checkpoint, arguments.config)
        generator = np.random.default_rng(0)
        picture = folder / "picture.png"
        Image.fromarray(generator.integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(picture)
        print(", ".join((arguments.config.stem, arguments.target, arguments.quant)))
        print(f"{arguments.threads} threads")
        tiled = "scale_factor" in json.loads(arguments.config.read_text())
        for tiles in arguments.tiles or ((17, 1) if tiled else (1,)):
            name = f"{arguments.config.stem}-{arguments.target}-{arguments.quant}-{tiles}.lorg"
            bundle = folder / name
            options = ["--target", arguments.target, "--max-tiles", tiles, "--out", bundle]
            if arguments.context is not None:
                options += ["--context", arguments.context]
            # Random weights have no answers that could be kept.
            how = (
                ("--quant", arguments.quant)
                if arguments.plan is None
                else ("--plan", arguments.plan)
            )
            made = lorgnette("export", checkpoint, *how, *options, "--force", "--measure", 0)
            print(f"\n--max-tiles {tiles} (load average {os.getloadavg()[0]:.1f})")
            print(f"  {'export s':18}{made['seconds']:10.1f}")
            print(f"  {'export RSS MB':18}{made['peak_rss_bytes'] / 1e6:10.0f}")
            print(f"  {'bundle MB':18}{made['bytes'] / 1e6:10.1f}")
            for name, value in run(bundle, picture, arguments.threads, arguments.runs).items():
                print(f"  {name:18}{value:10.1f}")


if __name__ == "__main__":
    main()
