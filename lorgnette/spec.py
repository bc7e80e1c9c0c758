"""What a model is, in numbers: read once from the config, carried in every bundle.

All types are frozen, hold no arrays, and decode strictly (an unknown field is an error), so that
the same types describe a checkpoint at export and validate a manifest at run time.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Frozen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the data types: immutable, keyword-only, strict when decoded."""


class VisionSpec(Frozen, frozen=True):
    """A vision transformer. Sizes in elements, `image_size` and `patch_size` in pixels."""

    hidden_size: int
    intermediate_size: int
    layers: int
    """Layers that are run; a family may leave out the last of those published."""
    heads: int
    image_size: int
    patch_size: int
    norm_eps: float

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


class TextSpec(Frozen, frozen=True):
    """A decoder-only language model of the LLaMA kind."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    """Whether queries, keys and values have biases (Qwen2); no other matrix has one."""


class ProjectorSpec(Frozen, frozen=True):
    """The way from patch features to image tokens."""

    kind: Literal["pixel_shuffle", "ldp", "ldpv2", "concat_mlp"]
    patches_per_token: int
    """Patches that become one image token: a square block of them, or a run in reading order."""
    hidden_size: int | None = None
    """Inner width of a projector that has one of its own."""


class ModelSpec(Frozen, frozen=True):
    """One model: its family, its parts and the tokens that tie them together."""

    family: str
    model_type: str
    variant: str
    """Which published model of the family has these numbers, e.g. `256M`; else `custom`."""
    vision: VisionSpec
    text: TextSpec
    projector: ProjectorSpec
    image_token_id: int

    @property
    def image_tokens_per_tile(self) -> int:
        """Image tokens N that one tile becomes."""
        return self.vision.grid**2 // self.projector.patches_per_token


class TilePreprocess(Frozen, frozen=True, tag="tiles", tag_field="kind"):
    """SmolVLM's way from a picture to tiles: resize, round up to tiles, split, add a thumbnail.

    Pixels are `(value * rescale - mean) / std` per channel, computed inside the vision encoder;
    outside it everything stays uint8. Source: transformers 5.23, Idefics3ImageProcessorPil.
    """

    tile_size: int
    """Side of a tile in pixels."""
    longest_edge: int
    """Longest side in pixels that every picture is resized to before tiling."""
    split: bool
    """False: the whole picture becomes one tile."""
    resample: Literal["lanczos", "bicubic", "bilinear"]
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class SquarePreprocess(Frozen, frozen=True, tag="square", tag_field="kind"):
    """One tile of every picture: the whole of it, made square.

    Pixels are normalised as in `TilePreprocess`.
    """

    tile_size: int
    """Side of the tile in pixels."""
    fit: Literal["pad", "stretch"]
    """`pad` centres the picture on a square of `background` first, `stretch` ignores its aspect."""
    background: tuple[int, int, int]
    """Red, green and blue of the padding, 0 to 255; unused by `stretch`."""
    resample: Literal["lanczos", "bicubic", "bilinear"]
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


Preprocess = TilePreprocess | SquarePreprocess
"""How a picture becomes tiles; `kind` in a manifest says which."""


class TurnTemplate(Frozen, frozen=True):
    """The text around one message of a role."""

    header: str
    """Before the content, e.g. `User: `."""
    header_image_first: str
    """The same where the content starts with a picture, e.g. `User:`."""
    footer: str
    """After the content, e.g. `<end_of_utterance>` and a line break."""


class ImageTemplate(Frozen, frozen=True):
    """The text one picture becomes; `{row}` and `{col}` count from 1.

    `{image}` stands for `tokens_per_tile` copies of `image_token`. A split picture is, row by row,
    its `tile`s each followed by nothing and the row by `row_end`, then `thumbnail`; a picture of
    one tile is `single`.
    """

    image_token: str
    tokens_per_tile: int
    tile: str
    row_end: str
    thumbnail: str
    single: str


class PromptSpec(Frozen, frozen=True):
    """A chat template compiled to literals, and where generation ends."""

    prefix: str
    turns: dict[str, TurnTemplate]
    """By role: `user`, `assistant`, `system`."""
    generation: str
    """Appended to make the model answer, e.g. `Assistant:`."""
    image: ImageTemplate
    stop_token_ids: tuple[int, ...]
    default_system: str | None = None
    """The system message of conversations that bring none; needs the role `system`."""
    answer_header: str = ""
    """What the model itself writes before its answer, e.g. `<|im_start|>assistant`: it stays in
    the context and is left out of the text, with the white space around it."""
    tasks: dict[str, str] = {}
    """Fixed requests by name: the user's whole content, one picture at `{image}`, no question."""
