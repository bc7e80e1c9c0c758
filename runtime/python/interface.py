"""What the graphs of a bundle must take and give, as its model's numbers say.

A bundle comes from anywhere. Its manifest is compared with itself here and with the graphs by the
engine, so that a lie in it is one clear error at opening and not a crash in the middle of an
answer.
"""

from __future__ import annotations

from lorgnette.bundle import Bundle
from lorgnette.errors import BundleError, ConfigError
from lorgnette.manifest import CACHE8, ComponentEntry, Manifest, TensorEntry
from lorgnette.runtime.preprocess import check_spec
from lorgnette.spec import TilePreprocess

Tensors = list[tuple[str, str, tuple[int | str, ...]]]


def check_interface(bundle: Bundle) -> None:
    """Compares every tensor of the manifest with the model's numbers.

    Raises:
        BundleError: Numbers are impossible or disagree, or a component is missing.
    """
    manifest = bundle.manifest
    _check_numbers(bundle)
    _check_prompt(bundle)
    for name, (inputs, outputs) in _wanted(manifest).items():
        entry = manifest.component(name)
        for got, wanted in ((_listed(entry.inputs), inputs), (_listed(entry.outputs), outputs)):
            if got != wanted:
                raise _lie(bundle, f"tensors of {name}", got, wanted)
    _check_caches(bundle, manifest.component("decoder"))


def _check_numbers(bundle: Bundle) -> None:
    """Refuses numbers that no model has, and pairs of numbers that must be equal."""
    manifest = bundle.manifest
    vision, text = manifest.spec.vision, manifest.spec.text
    fold = manifest.spec.projector.patches_per_token
    counts = (vision.image_size, vision.patch_size, fold, text.vocab_size, text.hidden_size)
    if min(*counts, text.layers, text.kv_heads, text.head_size) < 1:
        raise _lie(bundle, "sizes of the model", min(counts), "1 or more")
    if not 2 <= manifest.context_length <= text.max_positions:
        wanted = f"2 to {text.max_positions}"
        raise _lie(bundle, "context length", manifest.context_length, wanted)
    per_tile = manifest.spec.image_tokens_per_tile
    if per_tile < 1:
        raise _lie(bundle, "image tokens of a tile", per_tile, "1 or more")
    if manifest.preprocess.tile_size != vision.image_size:
        raise _lie(bundle, "tile size", manifest.preprocess.tile_size, vision.image_size)
    try:
        check_spec(manifest.preprocess)
    except ConfigError as error:
        raise _lie(bundle, "preprocessing", error.got, error.wanted) from error


def _check_prompt(bundle: Bundle) -> None:
    """Refuses a prompt that would not hold its pictures' image tokens, or lacks what it needs."""
    manifest, prompt = bundle.manifest, bundle.manifest.prompt
    image, per_tile = prompt.image, manifest.spec.image_tokens_per_tile
    if image.tokens_per_tile != per_tile:
        raise _lie(bundle, "image tokens of a tile in the prompt", image.tokens_per_tile, per_tile)
    if not image.image_token:
        raise _lie(bundle, "image token", repr(""), "a token")
    pictures = {f"task {name}": text for name, text in prompt.tasks.items()}
    pictures["a picture"] = image.single
    if isinstance(manifest.preprocess, TilePreprocess) and manifest.preprocess.split:
        pictures |= {"a tile": image.tile, "a thumbnail": image.thumbnail}
        if prompt.tasks:
            raise _lie(bundle, "tasks", ", ".join(prompt.tasks), "pictures of one tile")
    for name, text in pictures.items():
        if text.count("{image}") != 1 or image.image_token in text:
            raise _lie(bundle, f"text of {name}", repr(text), "{image} once")
    if prompt.default_system is not None and "system" not in prompt.turns:
        raise _lie(bundle, "default system message", "no role system", "one")
    if prompt.answer_header.isspace():
        raise _lie(bundle, "header of an answer", repr(prompt.answer_header), "more than space")


def _wanted(manifest: Manifest) -> dict[str, tuple[Tensors, Tensors]]:
    """Inputs and outputs of every component, caches aside."""
    spec = manifest.spec
    edge, width = spec.vision.image_size, spec.text.hidden_size
    embeddings = ("embeddings", "float32", (1, "T", width))
    image_tokens = ("image_tokens", "float32", ("G", spec.image_tokens_per_tile, width))
    return {
        "vision_encoder": ([("tiles", "uint8", ("G", 3, edge, edge))], [image_tokens]),
        "token_embedding": ([("token_ids", "int64", (1, "T"))], [embeddings]),
        "decoder": (
            [embeddings, ("past_length", "int32", (1,))],
            [("logits", "float32", (1, spec.text.vocab_size))],
        ),
    }


def _check_caches(bundle: Bundle, decoder: ComponentEntry) -> None:
    """Keys and values of every layer, as many out as in."""
    text = bundle.manifest.spec.text
    dtype = "int8" if CACHE8 in bundle.manifest.requires else "float32"
    wanted = [(dtype, (1, text.kv_heads, "S", text.head_size))] * (2 * text.layers)
    for tensors in (decoder.cache_inputs, decoder.cache_outputs):
        got = [(tensor.dtype, tensor.shape) for tensor in tensors]
        if got != wanted:
            raise _lie(bundle, "KV cache", got[:1] or "none", f"{len(wanted)} of {wanted[0]}")


def _listed(tensors: tuple[TensorEntry, ...]) -> Tensors:
    return [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]


def _lie(bundle: Bundle, what: str, got: object, wanted: object) -> BundleError:
    return BundleError(
        f"manifest does not fit together: {what}", where=bundle.path, got=got, wanted=wanted
    )
