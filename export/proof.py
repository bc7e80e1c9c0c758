"""Proving bundles: the ladder, what was promised of answers, and each against the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from lorgnette.bundle import Bundle, open_bundle, write_manifest
from lorgnette.export.answers import OriginalAnswers
from lorgnette.export.check import treatment
from lorgnette.export.quality import measure_bundle, require_promise, summarise
from lorgnette.export.sample_set import Pictures, Progress
from lorgnette.manifest import Bounds, Manifest
from lorgnette.quantize.plan import QuantPlan
from lorgnette.runtime.golden import read_golden
from lorgnette.runtime.model import Model
from lorgnette.runtime.parity import Comparison, compare_ladders
from lorgnette.runtime.verify import Ladder, verify
from lorgnette.targets.target import Target


def prove(
    folder: Path,
    manifest: Manifest,
    target: Target,
    out: str | Path,
    asked: tuple[QuantPlan, OriginalAnswers | None, Pictures],
    progress: Progress,
) -> Ladder:
    """Climbs the ladder with a bundle, and measures its answers where those are known.

    Args:
        folder: Where the bundle lies for now.
        manifest: Its manifest.
        target: What it is made for.
        out: Where it will lie.
        asked: The plan, the original's answers, and what is to be done with them.
        progress: Told about each step.

    Raises:
        VerifyError: It does not agree with the original, or breaks its plan's promise.
    """
    if manifest.not_run:
        progress(f"{target.name} is not verified: {manifest.not_run}")
        return Ladder(())
    progress(f"verify {target.name}")
    plan, answers, pictures = asked
    how = treatment(plan, target.capabilities)
    if how.rounds:
        _verify_exact(folder, manifest, target, how.exact_bound, out)
    model = Model(open_bundle(folder))
    ladder = verify(model)
    ladder.require(out)
    if answers is not None:
        progress("measure quality")
        measured = measure_bundle(model, answers)
        summary = summarise(measured, answers, plan.promise, accepted_loss=pictures.accept_loss)
        require_promise(summary, out)
        write_manifest(folder, msgspec.structs.replace(manifest, quality=summary))
    return ladder


def compare(
    names: Sequence[str],
    folders: Sequence[Path],
    manifests: Sequence[Manifest],
    ladders: Sequence[Ladder],
) -> Comparison:
    """Compares the bundles of several targets with each other."""
    climbed = [
        (name, ladder, read_golden(open_bundle(folder)), manifest.golden.bounds)
        for name, folder, manifest, ladder in zip(names, folders, manifests, ladders, strict=True)
        if ladder.rungs
    ]
    return compare_ladders(climbed)


def _verify_exact(
    folder: Path, manifest: Manifest, target: Target, bound: float, out: object
) -> None:
    """Climbs the ladder with a twin that rounds no activations, held to a tight bound.

    Rounded activations need a bound under which another epsilon or activation function would
    pass. A target without a twin is held to that alone.
    """
    before = {path for path in folder.rglob("*") if path.is_file()}
    twin = target.exact_twin(folder, manifest)
    if twin is None:
        return
    bounds = Bounds(image_tokens=bound, logits=bound, greedy_ids_equal=False)
    golden = msgspec.structs.replace(manifest.golden, bounds=bounds)
    verify(Model(Bundle(folder, msgspec.structs.replace(twin, golden=golden)))).require(out)
    for path in folder.rglob("*"):
        if path.is_file() and path not in before:
            path.unlink()
