"""export(recipe) -> bundle: the steps, in order."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch

import lorgnette
from lorgnette.bundle import Bundle, final_path, list_files, open_bundle, write_manifest, writing
from lorgnette.errors import CheckpointError, ConfigError, MissingExtraError
from lorgnette.export.check import (
    Parts,
    bounds_for,
    golden_picture,
    golden_prompt,
    make_goldens,
    treatment,
)
from lorgnette.export.checkpoint import Checkpoint
from lorgnette.export.component import with_cache_bits
from lorgnette.export.entries import component_entry
from lorgnette.export.families import find_family, open_checkpoint
from lorgnette.export.matrices import matrices_of, matrix_names
from lorgnette.export.prepared import prepare_samples
from lorgnette.export.proof import compare, prove
from lorgnette.export.quality_report import rounded_tensors, write_tensors
from lorgnette.export.sample_set import DEFAULT_PICTURES, Pictures, Progress, SampleSet
from lorgnette.export.tokenizer_files import read_tokenizer_json
from lorgnette.export.trace import build_module
from lorgnette.export.weights import WeightSource, check_all_used, module_shapes
from lorgnette.manifest import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    Format,
    GoldenEntry,
    Manifest,
    requirements,
)
from lorgnette.quantize.calibrate import calibrate, check_methods
from lorgnette.quantize.plan import MIXED, QuantPlan
from lorgnette.quantize.plan_file import check_rules, plan_for
from lorgnette.quantize.residual import rotate_residual
from lorgnette.quantize.samples import Sample, default_samples, read_samples
from lorgnette.quantize.store import QuantizedModel
from lorgnette.recipe import Recipe
from lorgnette.runtime.golden import Golden, write_golden
from lorgnette.runtime.model import TOKENIZER
from lorgnette.runtime.parity import Comparison
from lorgnette.runtime.tokenizer import Tokenizer
from lorgnette.runtime.verify import Ladder
from lorgnette.spec import ModelSpec
from lorgnette.targets import find_target
from lorgnette.targets.target import LoweredComponent, Target

DEFAULT_CONTEXT = 8192
GOLDEN = "golden"


def export(
    checkpoint_path: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    vision: str | Path | None = None,
    pictures: Pictures = DEFAULT_PICTURES,
    replace: bool = False,
    progress: Progress = lambda step: None,
) -> tuple[Bundle, Ladder]:
    """Makes a bundle, and refuses to if it does not give the original's answer.

    Args:
        checkpoint_path: A checkpoint in a published form: a directory or a GGUF file.
        out: Where the bundle goes; ends in `.lorg`.
        recipe: What is asked for.
        vision: The vision tower where it is published apart, as `open_checkpoint` takes it.
        pictures: What is calibrated with and measured on.
        replace: Whether a bundle at `out` may be replaced.
        progress: Told about each step.

    Returns:
        The finished bundle and the parity ladder that it climbed.

    Raises:
        LorgnetteError: Wrong input; nothing is left behind.
        VerifyError: The bundle was made and does not agree, or breaks its plan's promise; nothing
            is left behind.
    """
    made = export_all(
        checkpoint_path,
        {recipe.target: out},
        recipe,
        vision=vision,
        pictures=pictures,
        replace=replace,
        progress=progress,
    )
    return made.bundles[0], made.ladders[0]


@dataclass(frozen=True)
class Exported:
    """Bundles of one checkpoint for several targets.

    Attributes:
        bundles: The bundles, in the order of the targets.
        ladders: The ladder that each climbed; empty where nothing here can run it, and the
            manifest says why.
        comparison: How far they are from each other.
    """

    bundles: tuple[Bundle, ...]
    ladders: tuple[Ladder, ...]
    comparison: Comparison


def export_all(
    checkpoint_path: str | Path,
    outs: Mapping[str, str | Path],
    recipe: Recipe,
    *,
    vision: str | Path | None = None,
    pictures: Pictures = DEFAULT_PICTURES,
    replace: bool = False,
    progress: Progress = lambda step: None,
) -> Exported:
    """Makes a bundle for each of several targets, from weights that are rounded once.

    Args:
        checkpoint_path: As in `export`.
        outs: Targets, and where the bundle of each goes.
        recipe: What is asked for; its `target` is not looked at.
        vision: As in `export`.
        pictures: As in `export`.
        replace: As in `export`.
        progress: As in `export`.

    Raises:
        LorgnetteError: Wrong input; nothing is left behind, of no target.
        VerifyError: A bundle does not agree with the original or with another one, or breaks its
            plan's promise; nothing is left behind, of no target.
    """
    if recipe.quant == MIXED and recipe.plan is None:
        recipe = _with_found_plan(
            checkpoint_path, vision, outs, recipe, pictures, replace, progress
        )
    progress("read checkpoint")
    plan, targets = plan_for(recipe), [find_target(name) for name in outs]
    sample_set = SampleSet.choose(plan, pictures)
    parts = read_parts(open_checkpoint(checkpoint_path, vision), recipe)
    _check(parts, plan, targets)
    with ExitStack() as stack:
        folders = [stack.enter_context(writing(out, replace=replace)) for out in outs.values()]
        recipes = [msgspec.structs.replace(recipe, target=name) for name in outs]
        manifests = _make(parts, sample_set, (plan, targets, recipes), folders, progress)
        answers = sample_set.answers(parts, progress)
        # The checkpoint is mapped into memory, and so are the codes, whose files are gone: both go
        # before the engine's copy of them comes.
        del parts
        ladders = [
            prove(folder, manifest, target, out, (plan, answers, pictures), progress)
            for folder, manifest, target, out in zip(
                folders, manifests, targets, outs.values(), strict=True
            )
        ]
        comparison = compare(list(outs), folders, manifests, ladders)
        comparison.require(" and ".join(outs))
    bundles = tuple(open_bundle(out) for out in outs.values())
    return Exported(bundles, tuple(ladders), comparison)


def _make(
    parts: Parts,
    sample_set: SampleSet,
    asked: tuple[QuantPlan, Sequence[Target], Sequence[Recipe]],
    folders: Sequence[Path],
    progress: Progress,
) -> list[Manifest]:
    """Fills the folders: weights are rounded once and lowered for each target.

    Args:
        parts: The parsed checkpoint.
        sample_set: What is calibrated with.
        asked: The plan, the targets, and the recipe of each bundle.
        folders: A folder for each target.
        progress: Told about each step.
    """
    plan, targets, recipes = asked
    with TemporaryDirectory(prefix="codes-", dir=folders[0]) as codes:
        place = Path(codes) / "model"
        quantized = quantize_parts(parts, plan, place, sample_set.calibrating, progress)
        lowered = [
            _lower(parts, quantized, target, recipe, folder, progress)
            for target, recipe, folder in zip(targets, recipes, folders, strict=True)
        ]
        treatments = [treatment(plan, target.capabilities) for target in targets]
        goldens = make_goldens(parts, quantized, treatments, progress)
        for folder in folders:
            write_tensors(folder, rounded_tensors(quantized))
    progress("write manifest")
    return [
        _write(folder, parts, recipe, target, made, golden)
        for folder, recipe, target, made, golden in zip(
            folders, recipes, targets, lowered, goldens, strict=True
        )
    ]


def _check(parts: Parts, plan: QuantPlan, targets: Sequence[Target]) -> None:
    """Refuses what cannot be made, before a weight is read.

    Raises:
        ConfigError: Naming every scheme that the target cannot carry, or the first other reason.
        MissingExtraError: This machine lacks what lowering to a target needs.
    """
    golden_prompt(parts, golden_picture())  # refuses a context that is too small
    matrices = matrices_of(parts.components)
    check_rules(plan, matrices)
    check_methods(plan, matrices)
    for target in targets:
        if missing := target.missing():
            raise MissingExtraError(f"cannot lower to {target.name}", got=missing)
        problems = target.check(matrices, plan)
        if problems:
            raise ConfigError(f"cannot lower to {target.name}", got="; ".join(problems))


def _with_found_plan(
    checkpoint_path: str | Path,
    vision: str | Path | None,
    outs: Mapping[str, str | Path],
    recipe: Recipe,
    pictures: Pictures,
    replace: bool,
    progress: Progress,
) -> Recipe:
    """The recipe with the rules that a search finds, on the samples that calibrate.

    Raises:
        ConfigError: There are several targets, whose capabilities differ.
    """
    from lorgnette.export.search import search_mixed

    if len(outs) > 1:
        raise ConfigError(
            f"the plan '{MIXED}' is found for one target at a time",
            got=", ".join(outs),
            hint="find it with 'lorgnette search' and give it to all as --plan",
        )
    ((name, out),) = outs.items()
    final = final_path(out, replace=replace)
    progress("read checkpoint")
    parts = read_parts(open_checkpoint(checkpoint_path, vision), recipe)
    golden_prompt(parts, golden_picture())  # refuses a context that is too small
    samples = read_samples(pictures.path or default_samples())
    folder = next(path for path in final.parents if path.is_dir())
    found = search_mixed(parts, find_target(name), samples, folder, progress)
    return msgspec.structs.replace(recipe, quant=found.name, plan=found)


def quantize_parts(
    parts: Parts,
    plan: QuantPlan,
    folder: Path,
    samples: Sequence[Sample],
    progress: Progress,
) -> QuantizedModel:
    """The weights as a plan rounds them, with calibration where it asks for it.

    Args:
        parts: The parsed checkpoint.
        plan: How weights are rounded.
        folder: A folder to be made, where codes are kept until the model is lowered.
        samples: What is calibrated with, where the plan asks for it.
        progress: Told about each step.

    Raises:
        ConfigError: No sample fits the context length.
    """
    model = QuantizedModel(parts.sources, matrix_names(parts.components), plan, folder)
    if plan.rotate:
        rotate_residual({component.name: component for component in parts.components}, model)
    if plan.needs_samples:
        calibrate(parts.components, model, prepare_samples(parts, samples), progress)
    return model


def _write(
    folder: Path,
    parts: Parts,
    recipe: Recipe,
    target: Target,
    lowered: Sequence[LoweredComponent],
    golden: Golden,
) -> Manifest:
    """Writes what is not lowered, the manifest last."""
    tokenizer_file = folder / TOKENIZER
    tokenizer_file.parent.mkdir()
    tokenizer_file.write_bytes(parts.tokenizer_json)
    write_golden(golden, folder / GOLDEN)
    plan = plan_for(recipe)
    manifest = Manifest(
        format=Format(major=FORMAT_MAJOR, minor=FORMAT_MINOR),
        requires=requirements(parts.preprocess, plan.cache_bits),
        producer=_producer(target),
        checkpoint=parts.checkpoint.path.resolve().name,
        recipe=recipe,
        spec=parts.spec,
        engine=target.capabilities.engine,
        context_length=parts.context_length,
        components=tuple(
            component_entry(with_cache_bits(component, plan.cache_bits), result)
            for component, result in zip(parts.components, lowered, strict=True)
        ),
        preprocess=parts.preprocess,
        prompt=parts.prompt,
        golden=GoldenEntry(folder=GOLDEN, bounds=bounds_for(plan, golden.text)),
        files=list_files(folder),
        not_run=target.capabilities.not_run,
    )
    write_manifest(folder, manifest)
    return manifest


def read_parts(checkpoint: Checkpoint, recipe: Recipe) -> Parts:
    """Parses everything but the weights, whose names and shapes are checked.

    Raises:
        LorgnetteError: Anything about the checkpoint or the recipe that does not fit.
    """
    _, family = find_family(checkpoint.config.get("model_type"))
    spec = family.parse(checkpoint)
    tokenizer_json = read_tokenizer_json(checkpoint)
    tokenizer = _read_tokenizer(checkpoint, tokenizer_json, spec)
    preprocess = family.preprocess(checkpoint, spec, recipe)
    tokens = {text: tokenizer.token_id(text) for text in tokenizer.special_strings}
    prompt = family.prompt(checkpoint, spec, tokens)
    context_length = _context_length(spec, recipe)
    components = family.components(spec, preprocess, context_length)
    sources = {
        component.name: WeightSource(
            checkpoint, module_shapes(build_module(component)), component.rules
        )
        for component in components
    }
    check_all_used(checkpoint, list(sources.values()), family.IGNORED_TENSORS)
    return Parts(
        checkpoint=checkpoint,
        spec=spec,
        preprocess=preprocess,
        prompt=prompt,
        tokenizer=tokenizer,
        tokenizer_json=tokenizer_json,
        context_length=context_length,
        components=components,
        sources=sources,
    )


def _context_length(spec: ModelSpec, recipe: Recipe) -> int:
    most = spec.text.max_positions
    if recipe.context_length is None:
        return min(most, DEFAULT_CONTEXT)
    if not 2 <= recipe.context_length <= most:
        raise ConfigError(
            "context length is out of range",
            got=recipe.context_length,
            wanted=f"2 to {most}, what the model was trained for",
        )
    return recipe.context_length


def _read_tokenizer(checkpoint: Checkpoint, tokenizer_json: bytes, spec: ModelSpec) -> Tokenizer:
    path = checkpoint.place("tokenizer.json")
    tokenizer = Tokenizer.from_bytes(tokenizer_json, where=path)
    if tokenizer.vocab_size > spec.text.vocab_size:
        raise CheckpointError(
            "the tokenizer has more tokens than the model",
            where=path,
            got=tokenizer.vocab_size,
            wanted=f"<= {spec.text.vocab_size}",
        )
    return tokenizer


def _lower(
    parts: Parts,
    quantized: QuantizedModel,
    target: Target,
    recipe: Recipe,
    folder: Path,
    progress: Progress,
) -> list[LoweredComponent]:
    """Lowers a model, and refuses more fallbacks than were allowed.

    Raises:
        ConfigError: More operators than `recipe.max_fallback` run outside the delegate.
    """
    lowered = target.lower(parts, quantized, folder, progress)
    fallbacks = [fallback for component in lowered for fallback in component.fallbacks]
    count = sum(fallback.count for fallback in fallbacks)
    if recipe.max_fallback is not None and count > recipe.max_fallback:
        most = sorted(fallbacks, key=lambda fallback: -fallback.count)
        named = ", ".join(f"{each.count} {each.operator} ({each.source})" for each in most)
        raise ConfigError(
            f"operators run outside the delegate of {target.name}",
            got=f"{count}: {named}",
            wanted=f"at most {recipe.max_fallback}",
            hint="allow more with --max-fallback",
        )
    return lowered


def _producer(target: Target) -> dict[str, str]:
    """Names and versions of what made a bundle."""
    return {
        "lorgnette": lorgnette.__version__,
        "torch": torch.__version__.split("+")[0],
        **{name: importlib.metadata.version(name) for name in target.capabilities.packages},
    }
