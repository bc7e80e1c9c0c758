"""Exact match of the zoo's checkpoints, scheme by scheme, through bundles and the runtime.

    python -m benchmarks.zoo_quality [--count 600] [--checkpoint DIR ...] [--scheme NAME ...]

Every scheme answers the same freshly drawn held-out pictures, of the kinds that the checkpoint
learnt. `same answer` is the share of answers that are letter for letter those of fp32.
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
from tests.zoo.checkpoint import CHECKPOINTS
from tests.zoo.evaluate import score
from tests.zoo.families import FAMILIES, family_of

ZOO = [CHECKPOINTS / family.name for family in FAMILIES.values()]
Shares = dict[str, float]


def measure(checkpoint: Path, scheme: str, count: int, folder: Path) -> tuple[Shares, list[str]]:
    """Exports one scheme and asks it everything.

    Returns:
        Shares of exact matches by name (`all`, `kind colour`, ...), and all answers in order.
    """
    bundle, _ = export(checkpoint, folder / f"{scheme}.lorg", Recipe(quant=scheme))
    model = lorgnette.open(bundle.path)
    answers: list[str] = []

    def answer(picture: Image.Image, question: str) -> str:
        answers.append(model.generate(picture, question, max_new_tokens=48).result().text)
        return answers[-1]

    tally = score(answer, count, exam=family_of(checkpoint).exam)
    shares = {name: right / asked for name, (right, asked) in tally.items()}
    shares["megabytes"] = sum(entry.bytes for entry in bundle.manifest.files) / 1e6
    return shares, answers


def measure_all(checkpoint: Path, schemes: list[str], count: int) -> dict[str, Shares]:
    """Every scheme of one checkpoint, fp32 first."""
    results: dict[str, Shares] = {}
    original: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for scheme in schemes:
            shares, answers = measure(checkpoint, scheme, count, Path(folder))
            original = original or answers
            same = sum(a == b for a, b in zip(answers, original, strict=True))
            results[scheme] = {"same answer": same / len(answers), **shares}
    return results


def table(results: dict[str, Shares]) -> str:
    """A column for each scheme."""
    lines = [f"{'':18}" + "".join(f"{scheme:>9}" for scheme in results)]
    for name in next(iter(results.values())):
        cells = [shares[name] for shares in results.values()]
        text = (f"{cell:9.1f}" if name == "megabytes" else f"{cell:9.1%}" for cell in cells)
        lines.append(f"{name:18}" + "".join(text))
    return "\n".join(lines)


def main() -> None:
    """Reads the command line and prints a table for each checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=ZOO)
    parser.add_argument("--scheme", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--json", action="store_true", help="print one object instead of tables")
    arguments = parser.parse_args()
    # Answers are compared with those of fp32, which therefore comes first.
    schemes = ["fp32", *(s for s in arguments.scheme if s != "fp32")]
    found: dict[str, dict[str, Shares]] = {}
    for checkpoint in arguments.checkpoint:
        found[checkpoint.name] = measure_all(checkpoint, schemes, arguments.count)
        if not arguments.json:
            print(f"{checkpoint.name}\n{table(found[checkpoint.name])}\n", flush=True)
    if arguments.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
