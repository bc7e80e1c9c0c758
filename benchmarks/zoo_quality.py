"""Exact match of the zoo's checkpoint, scheme by scheme, through bundles and the runtime.

    python -m benchmarks.zoo_quality [--count 600] [--checkpoint DIR] [--json]

Every scheme answers the same freshly drawn held-out pictures. `same answer` is the share of
answers that are letter for letter those of fp32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from PIL import Image

import lorgnette
from lorgnette.export.pipeline import export
from lorgnette.quantize.plan import PLANS
from lorgnette.recipe import Recipe
from tests.zoo.evaluate import score

CHECKPOINT = Path(__file__).parent.parent / "tests/zoo/checkpoints/smolvlm-tiny"


def measure(
    checkpoint: Path, scheme: str, count: int, folder: Path
) -> tuple[dict[str, float], list[str]]:
    """Exports one scheme and asks it everything.

    Returns:
        Shares of exact matches by name (`all`, `kind colour`, ...), and all answers in order.
    """
    bundle, _ = export(checkpoint, folder / f"{scheme}.lorg", Recipe(quant=scheme))
    model = lorgnette.open(bundle.path)
    answers: list[str] = []

    def answer(picture: Image.Image, question: str) -> str:
        answers.append(model.generate(picture, question, max_new_tokens=16).result().text)
        return answers[-1]

    tally = score(answer, count)
    shares = {name: right / asked for name, (right, asked) in tally.items()}
    shares["megabytes"] = sum(entry.bytes for entry in bundle.manifest.files) / 1e6
    return shares, answers


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    original: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for scheme in PLANS:
            shares, answers = measure(arguments.checkpoint, scheme, arguments.count, Path(folder))
            original = original or answers
            same = sum(a == b for a, b in zip(answers, original, strict=True))
            results[scheme] = {"same answer": same / len(answers), **shares}
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{'':18}" + "".join(f"{scheme:>9}" for scheme in results))
    for name in next(iter(results.values())):
        cells = [shares[name] for shares in results.values()]
        text = (f"{cell:9.1f}" if name == "megabytes" else f"{cell:9.1%}" for cell in cells)
        print(f"{name:18}" + "".join(text))


if __name__ == "__main__":
    main()
