"""The manifest of a bundle: everything that a runtime must know, in one JSON file.

No timestamps and no machine's paths: the same inputs give the same bytes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from lorgnette.errors import BundleError
from lorgnette.recipe import Recipe
from lorgnette.spec import Frozen, ModelSpec, Preprocess, PromptSpec

FORMAT_MAJOR = 2
FORMAT_MINOR = 4
CACHE8 = "cache8"
KNOWN_REQUIREMENTS: frozenset[str] = frozenset({"tiles", "square", CACHE8})
"""What a bundle may ask of its reader: kinds of preprocessing, and a KV cache of 8 bits; one that
asks for more is refused."""

DTYPE_NAMES = Literal["float32", "float16", "int8", "uint8", "int32", "int64"]


DAMAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding bytes that are no manifest may raise."""


class Format(Frozen, frozen=True):
    """Version of the bundle format; a reader refuses another major."""

    major: int
    minor: int


class FileEntry(Frozen, frozen=True):
    """A file of the bundle."""

    path: str
    bytes: int
    sha256: str


class TensorEntry(Frozen, frozen=True):
    """An input or output of a graph; a str in the shape names a dynamic axis."""

    name: str
    dtype: DTYPE_NAMES
    shape: tuple[int | str, ...]


class FunctionEntry(Frozen, frozen=True):
    """A function of a graph, where what it takes is not the component's contract word for word."""

    name: str
    """What an engine calls it by."""
    entry_point: str
    """`encode`, `embed`, `prefill` or `decode`."""
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    states: tuple[TensorEntry, ...] = ()
    """Tensors that it reads and writes in place."""
    graph: str = ""
    """The file that it alone is in, where that is not the component's own graph."""
    positions: int = 0
    """The least new positions of a call for which it is there; fewer take the component's graph."""
    weights: str = ""
    """The file of a graph whose outputs it takes as further inputs, the same for every call."""


class Fallback(Frozen, frozen=True):
    """An operator that the delegate or accelerator of a target does not take."""

    operator: str
    source: str
    """Where it was written, such as `export/layers/vision.py:32`; empty where unknown."""
    count: int
    reason: str


class ComponentEntry(Frozen, frozen=True):
    """A graph: what it takes, what it gives, what is in it."""

    name: str
    entry_points: tuple[str, ...]
    graph: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    cache_inputs: tuple[TensorEntry, ...]
    cache_outputs: tuple[TensorEntry, ...]
    operators: dict[str, int]
    weight_bytes: dict[str, int]
    kept_in_float: dict[str, str]
    functions: tuple[FunctionEntry, ...] = ()
    """What its functions really take, where the target has shapes or states of its own."""
    exceptions: tuple[str, ...] = ()
    """What is carried otherwise than the plan says, a line each."""
    fallbacks: tuple[Fallback, ...] = ()
    """Operators that run outside the target's delegate."""
    advice: tuple[str, ...] = ()
    """What would hinder the accelerator that the target is for, a line each; not measured."""


class Bounds(Frozen, frozen=True):
    """How far a bundle may be from the reference, which has the same weights in float32."""

    image_tokens: float
    """Largest norm of the difference over the norm of the reference, tile by tile."""
    logits: float
    """The same for the logits behind the prompt."""
    greedy_ids_equal: bool
    """Whether the greedy answer must be the original's, token for token."""


class GoldenEntry(Frozen, frozen=True):
    """Where the golden data lies and which bounds it is held to."""

    folder: str
    bounds: Bounds


class PromiseEntry(Frozen, frozen=True):
    """What the plan promised of the answers, and whether it came true."""

    max_kl: float | None
    """Largest mean KL divergence that was promised, None where any would do."""
    min_same_answer: float
    """Smallest share of same answers that was promised."""
    kept: bool
    accepted_loss: bool = False
    """Whether the bundle was made although the promise was broken, because that was asked for."""


class QualitySummary(Frozen, frozen=True):
    """How the bundle's answers about pictures differ from those of the original in float32.

    The original answers greedily; both are compared at every token of that answer, the bundle
    being fed the original's tokens. Shares are from 0 to 1.
    """

    sample_set: str
    """Name of the set of pictures and questions."""
    sample_set_sha256: str
    """Digest of its questions, answers and pictures."""
    samples: int
    """Questions that were compared."""
    skipped: int
    """Questions left out because prompt and answer do not fit the context."""
    positions: int
    """Tokens of all answers together, at which distributions were compared."""
    max_new_tokens: int
    """Tokens at which an answer was cut off."""
    kl_mean: float
    """Mean over positions of the KL divergence from the original, in nats."""
    kl_p95: float
    """The value that 95 % of the positions stay under."""
    kl_max: float
    top1: float
    """Share of positions at which both find the same token likeliest."""
    same_answer: float
    """Share of greedy answers that are the original's token for token."""
    image_token_cosine_mean: float
    """Mean cosine between image tokens and the original's."""
    image_token_cosine_min: float
    exact_match: float | None = None
    """Share of the bundle's own answers that are the given ones, None where none are given."""
    original_exact_match: float | None = None
    """The same of the original's."""
    promise: PromiseEntry | None = None


class Manifest(Frozen, frozen=True):
    """The root of `manifest.json`."""

    format: Format
    requires: tuple[str, ...]
    producer: dict[str, str]
    """Names and versions of what made the bundle."""
    checkpoint: str
    """Name of the checkpoint's folder."""
    recipe: Recipe
    spec: ModelSpec
    engine: str
    context_length: int
    components: tuple[ComponentEntry, ...]
    preprocess: Preprocess
    prompt: PromptSpec
    golden: GoldenEntry
    files: tuple[FileEntry, ...]
    quality: QualitySummary | None = None
    """What rounding cost, where it was measured."""
    not_run: str = ""
    """Why nothing here could run it, so that its answers were never checked; empty where they
    were."""

    def component(self, name: str) -> ComponentEntry:
        """The component of a name.

        Raises:
            BundleError: There is none.
        """
        for entry in self.components:
            if entry.name == name:
                return entry
        raise BundleError(f"component '{name}' is missing", where="manifest.json")


def requirements(preprocess: Preprocess, cache_bits: int = 32) -> tuple[str, ...]:
    """What a bundle asks of its reader."""
    kind = str(type(preprocess).__struct_config__.tag)
    return (kind, CACHE8) if cache_bits == 8 else (kind,)


class _Head(msgspec.Struct):
    """The part that every version of the format can be asked for."""

    format: Format
    requires: tuple[str, ...] = ()


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode_manifest(data: bytes, where: object) -> Manifest:
    """Reads a manifest strictly, telling a newer one from a broken one.

    Raises:
        BundleError: It is newer than this reader, or not a manifest.
    """
    try:
        head = msgspec.json.decode(data, type=_Head)
    except DAMAGE as error:
        raise BundleError("manifest is not valid", where=where, got=error) from error
    if head.format.major != FORMAT_MAJOR:
        raise BundleError(
            "bundle format is not supported",
            where=where,
            got=f"version {head.format.major}.{head.format.minor}",
            wanted=f"{FORMAT_MAJOR}.x",
            hint="update lorgnette" if head.format.major > FORMAT_MAJOR else "export it again",
        )
    unknown = sorted(set(head.requires) - KNOWN_REQUIREMENTS)
    if unknown:
        raise BundleError(
            "bundle needs a newer reader",
            where=where,
            got=", ".join(unknown),
            hint="update lorgnette",
        )
    try:
        return msgspec.json.decode(data, type=Manifest)
    except DAMAGE as error:
        raise BundleError("manifest is not valid", where=where, got=error) from error
