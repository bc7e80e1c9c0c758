"""What quantisation costs the zoo's answers, on plain checkpoints and on their outlier twins.

    python -m benchmarks.quality [--count 200] [--checkpoint DIR ...] [--plan NAME ...] [--json]

First table: bundles, through the engine. KL is the mean divergence of the next token from that of
the original in float32, teacher-forced on the original's greedy answers; `same` the share of
greedy answers that are the original's; `exact` the share of right ones. Samples are of a split that
neither training nor calibration saw.

Second table: the matrices of the decoder's layers alone, everything else in float32, run eagerly:
llama.cpp's formats beside round to nearest and the plan `int4`, with the bits that a weight takes.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import lorgnette
from benchmarks.ggml_formats import Array, q4_0, q4_k, q4_k_m
from lorgnette.export.answers import OriginalAnswers, original_answers
from lorgnette.export.check import Parts
from lorgnette.export.families import open_checkpoint
from lorgnette.export.pipeline import export, quantize_parts, read_parts
from lorgnette.export.quality import Measured, measure_bundle, measure_reference, summarise
from lorgnette.export.reference import Reference
from lorgnette.export.sample_set import Pictures
from lorgnette.export.weights import WeightSource
from lorgnette.quantize.plan import PLANS, QuantPlan, Rule
from lorgnette.quantize.samples import Sample, default_samples, read_samples, split_samples
from lorgnette.quantize.scheme import FLOAT32, QuantScheme
from lorgnette.recipe import Recipe
from tests.zoo.calibration_set import quality_samples
from tests.zoo.checkpoint import CHECKPOINTS
from tests.zoo.families import FAMILIES, family_of
from tests.zoo.outliers import write_twin

ZOO = [CHECKPOINTS / family.name for family in FAMILIES.values()]
BUNDLES = ("int8", "int4", "int4-fast", "mixed", RTN := "rtn4")
Row = dict[str, float]

INT4 = QuantScheme(bits=4, group_size=32, scale_bits=16)
PLAIN = QuantPlan("rtn", "", (Rule("decoder/layers.*", INT4), Rule("*", FLOAT32)))
CALIBRATED = QuantPlan(
    "int4", "", (Rule("decoder/layers.*", INT4, "gptq", "outliers"), Rule("*", FLOAT32))
)
LAYER = re.compile(r"layers\.(\d+)\..*_proj\.weight")


class Replaced:
    """A source of weights that changes the matrices of the decoder's layers."""

    def __init__(self, source: WeightSource, change: Callable[[str, Array], Array]) -> None:
        """Takes the change: name and matrix to matrix."""
        self.shapes = source.shapes
        self._source = source
        self._change = change

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter after the change."""
        value = self._source.tensor(name)
        if not LAYER.fullmatch(name):
            return value
        return torch.from_numpy(self._change(name, value.numpy()))


def measuring_samples(checkpoint: Path, count: int, folder: Path) -> list[Sample]:
    """Pictures with questions of the kinds that a checkpoint learnt, as files."""
    folder.mkdir()
    found = []
    for number, asked in enumerate(quality_samples(family_of(checkpoint).exam, count)):
        path = folder / f"{number}.png"
        asked.picture.save(path)
        found.append(Sample(path, asked.question, asked.answer, path.name))
    return found


def row(measured: Measured, answers: OriginalAnswers, size: float) -> Row:
    """The figures of one line."""
    summary = summarise(measured, answers)
    return {
        "KL": summary.kl_mean,
        "same": summary.same_answer,
        "top1": summary.top1,
        "exact": summary.exact_match if summary.exact_match is not None else float("nan"),
        "cosine": summary.image_token_cosine_min,
        "size": size,
    }


def bundle_rows(
    checkpoint: Path, plans: list[str], answers: OriginalAnswers, folder: Path
) -> dict[str, Row]:
    """Every plan as a bundle; `size` in MB."""
    rows = {}
    for name in plans:
        recipe = rtn_recipe() if name == RTN else Recipe(quant=name)
        out = folder / f"{name}.lorg"
        bundle, _ = export(checkpoint, out, recipe, pictures=Pictures(measure=0))
        size = sum(entry.bytes for entry in bundle.manifest.files) / 1e6
        rows[name] = row(measure_bundle(lorgnette.open(bundle.path), answers), answers, size)
    return rows


def rtn_recipe() -> Recipe:
    """The forms of `int4`, every matrix rounded to nearest and nothing calibrated."""
    from lorgnette.recipe import PlanRule, PlanText

    by_channel = PlanRule(
        select="vision_encoder/*", bits=8, group="channel", activations="int8_token"
    )
    grouped = PlanRule(select="*", bits=4, activations="int8_group")
    pixels = PlanRule(select="vision_encoder/tower.embed.*", bits=8)
    return Recipe(quant=RTN, plan=PlanText(name=RTN, rule=(pixels, by_channel, grouped)))


def decoder_rows(parts: Parts, answers: OriginalAnswers, folder: Path) -> dict[str, Row]:
    """The decoder's layers alone; `size` in bits a weight."""
    text = parts.spec.text
    values = text.kv_heads * text.head_size

    def mixture(name: str, weight: Array) -> Array:
        found = LAYER.fullmatch(name)
        layer = int(found[1]) if found else 0
        return q4_k_m(name, layer, text.layers, weight, values)

    changes: dict[str, tuple[Callable[[str, Array], Array], float]] = {
        "Q4_0": (lambda _, weight: q4_0(weight), 4.5),
        "Q4_K": (lambda _, weight: q4_k(weight), 4.5),
        "Q4_K_M": (mixture, 4.85),
    }
    components = {component.name: component for component in parts.components}
    rows = {}
    for name, (change, bits) in changes.items():
        sources = {**parts.sources, "decoder": Replaced(parts.sources["decoder"], change)}
        measured = measure_reference(Reference(components, sources), answers)
        rows[name] = row(measured, answers, bits)
    calibrating, _ = split_samples(read_samples(default_samples()))
    for plan in (PLAIN, CALIBRATED):
        model = quantize_parts(parts, plan, folder / plan.name, calibrating, lambda step: None)
        measured = measure_reference(Reference(components, model.sources), answers)
        rows[plan.name] = row(measured, answers, 4.5)
    return rows


def table(rows: dict[str, Row], unit: str) -> str:
    """Lines for people."""
    lines = [f"{'':10}{'KL':>10}{'same':>8}{'top1':>8}{'exact':>8}{'cosine':>9}{unit:>8}"]
    for name, r in rows.items():
        lines.append(
            f"{name:10}{r['KL']:10.2e}{r['same']:8.1%}{r['top1']:8.2%}{r['exact']:8.1%}"
            f"{r['cosine']:9.5f}{r['size']:8.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Reads the command line and prints two tables for each checkpoint and its twin."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=ZOO)
    parser.add_argument("--plan", nargs="+", choices=[*PLANS, *BUNDLES], default=list(BUNDLES))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one object instead of tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for original in arguments.checkpoint:
        for kind in ("", " outlier twin"):
            with tempfile.TemporaryDirectory() as made:
                folder = Path(made)
                path = write_twin(original, folder / "twin") if kind else original
                parts = read_parts(open_checkpoint(path), Recipe())
                samples = measuring_samples(original, arguments.count, folder / "samples")
                answers = original_answers(parts, samples, 48)
                bundles = bundle_rows(path, arguments.plan, answers, folder)
                decoders = decoder_rows(parts, answers, folder)
            name = original.name + kind
            found[name] = {"bundles": bundles, "decoder layers": decoders}
            if not arguments.json:
                heads = (table(bundles, "MB"), table(decoders, "bits"))
                print(f"{name}, {len(answers.answers)} questions", *heads, "", sep="\n", flush=True)
    if arguments.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
