"""Puts together what a quality report tells: samples, matrices, and what stayed float."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from lorgnette.bundle import Bundle
from lorgnette.errors import BundleError
from lorgnette.export.answers import OriginalAnswer, OriginalAnswers
from lorgnette.export.check import Parts
from lorgnette.export.matrices import matrices_of
from lorgnette.export.quality import Measured, SampleMeasure
from lorgnette.manifest import Manifest, QualitySummary
from lorgnette.quantize.methods import load_method
from lorgnette.quantize.plan import QuantPlan
from lorgnette.quantize.quality import (
    FloatTensor,
    QualityReport,
    SampleQuality,
    TensorQuality,
    sqnr_db,
)
from lorgnette.quantize.scheme import QuantTensor
from lorgnette.quantize.store import QuantizedModel

TENSORS_FILE = "quality/tensors.json"
"""Where a bundle keeps the errors of its matrices; the manifest has room for sums alone."""
MAX_TENSORS_BYTES = 16 << 20


def make_report(
    manifest: Manifest,
    answers: OriginalAnswers,
    measured: Measured,
    summary: QualitySummary,
    tensors: Sequence[TensorQuality],
    tensors_left_out: str | None = None,
) -> QualityReport:
    """The report of a bundle.

    Args:
        manifest: Its manifest.
        answers: What the original says.
        measured: How far the bundle is from it.
        summary: The same in numbers.
        tensors: What rounding did to each matrix.
        tensors_left_out: Why that is not known, where it is not.
    """
    weight_bytes: dict[str, int] = {}
    for entry in manifest.components:
        for form, count in entry.weight_bytes.items():
            weight_bytes[form] = weight_bytes.get(form, 0) + count
    pairs = zip(measured.samples, answers.answers, strict=True)
    return QualityReport(
        checkpoint=manifest.checkpoint,
        target=manifest.recipe.target,
        plan=manifest.recipe.quant,
        summary=summary,
        samples=tuple(_sample(sample, answer, answers) for sample, answer in pairs),
        tensors=tuple(tensors),
        tensors_left_out=tensors_left_out,
        weight_bytes=weight_bytes,
        kept_in_float=kept_in_float(manifest),
    )


def kept_in_float(manifest: Manifest) -> tuple[FloatTensor, ...]:
    """Matrices that stayed float although the plan wanted integers, with the reasons."""
    return tuple(
        FloatTensor(component=entry.name, name=name, reason=reason)
        for entry in manifest.components
        for name, reason in entry.kept_in_float.items()
    )


def tensor_quality(
    component: str, name: str, weight: NDArray[np.float32], made: QuantTensor, method: str
) -> TensorQuality:
    """What rounding did to a matrix.

    Args:
        component: Its component.
        name: Its name there.
        weight: As it was before, float32 `[rows, columns]`: published, or rescaled already where
            the plan rescales first.
        made: Its codes.
        method: The method that chose them.
    """
    rows, columns = weight.shape
    return TensorQuality(
        component=component,
        name=name,
        scheme=made.scheme.full_name,
        method=method,
        sqnr_db=sqnr_db(weight, made.dequantize()),
        bytes=made.scheme.stored_bytes(rows, columns),
    )


def plan_tensors(
    parts: Parts, plan: QuantPlan, manifest: Manifest
) -> tuple[tuple[TensorQuality, ...], str | None]:
    """Rounds every matrix anew and measures what that does.

    Args:
        parts: The checkpoint.
        plan: How matrices are rounded.
        manifest: Tells which stayed float after all.

    Returns:
        The matrices, or none and the reason: codes that depend on calibration are not made again.
    """
    calibrated = plan.rotate or any(
        rule.scaling != "none" or load_method(rule.method).NEEDS_INPUTS
        for rule in plan.rules
        if rule.scheme.is_integer
    )
    if calibrated:
        return (), "the plan calibrates, and the bundle does not record its matrices' errors"
    left = {(tensor.component, tensor.name) for tensor in kept_in_float(manifest)}
    found = []
    for matrix in matrices_of(parts.components):
        rule = plan.rule_for(matrix.component, matrix.name)
        if rule.scheme.is_integer and (matrix.component, matrix.name) not in left:
            weight = parts.sources[matrix.component].tensor(matrix.name).numpy()
            made = plan.quantize(matrix.component, matrix.name, weight)
            found.append(tensor_quality(matrix.component, matrix.name, weight, made, rule.method))
    return tuple(found), None if found else "no matrix is rounded to integers"


def rounded_tensors(model: QuantizedModel) -> list[TensorQuality]:
    """What rounding did to each matrix, rescaled ones compared with themselves before rounding."""
    return [
        tensor_quality(
            source.component,
            name,
            source.unrounded(name),
            source.codes(name),
            source.method(name),
        )
        for source in model.sources.values()
        for name in sorted(source.matrices)
        if source.rule(name).scheme.is_integer
    ]


def write_tensors(folder: Path, tensors: Sequence[TensorQuality]) -> None:
    """Writes the errors of a bundle's matrices into its folder, one line each."""
    path = folder / TENSORS_FILE
    path.parent.mkdir(exist_ok=True)
    lines = b",\n".join(msgspec.json.encode(tensor) for tensor in tensors)
    path.write_bytes(b"[\n" + lines + b"\n]\n")


def read_tensors(bundle: Bundle) -> tuple[TensorQuality, ...] | None:
    """The errors of a bundle's matrices, None where it does not record them.

    Raises:
        BundleError: The file is damaged.
    """
    if TENSORS_FILE not in {entry.path for entry in bundle.manifest.files}:
        return None
    path = bundle.file(TENSORS_FILE)
    if path.stat().st_size > MAX_TENSORS_BYTES:
        raise BundleError("file is too large", where=path, wanted=f"<= {MAX_TENSORS_BYTES}")
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[TensorQuality, ...])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError("errors of matrices are damaged", where=path, got=error) from error


def _sample(
    sample: SampleMeasure, answer: OriginalAnswer, answers: OriginalAnswers
) -> SampleQuality:
    said = answer.greedy_ids if sample.answer_ids is None else sample.answer_ids
    return SampleQuality(
        name=answer.sample.name,
        question=answer.sample.question,
        given=answer.sample.answer,
        original=answers.text(answer.greedy_ids).strip(),
        answer=answers.text(said).strip(),
        same=sample.same,
        top1=float(sample.top1.mean()),
        kl=tuple(sample.kl.tolist()),
        image_token_cosine=float(sample.cosines.min()),
    )
