"""Checkpoints of MobileVLM and OmniVLM with what somebody else makes of a request to them.

They are tiny, or of a published size. Prompt ids are made with the libraries of the tokenizers,
pixels with Pillow, image tokens and answers with transformers around independent projectors.
Weights are random.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
from numpy.typing import NDArray
from PIL import Image

from lorgnette.export.pipeline import export
from lorgnette.export.sample_set import Pictures
from lorgnette.recipe import Recipe
from lorgnette.runtime.model import Model, open_model
from tests import make_mobilevlm as mobilevlm
from tests import make_omnivlm as omnivlm
from tests.composed_oracle import (
    ComposedOracle,
    mobilevlm_oracle,
    omnivlm_oracle,
    read_json,
    read_weights,
)
from tests.helpers import Config
from tests.make_mobilevlm import CLIP_L_336, TINY_CLIP, make_mobilevlm
from tests.make_omnivlm import make_gguf_pair, make_omnivlm

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class MobileVlm:
    """A MobileVLM checkpoint as published, pytorch_model.bin and tokenizer.model."""

    projector: str
    published: str | None = None
    stops = (2,)

    @cached_property
    def config(self) -> Config:
        if self.published is None:
            return mobilevlm.tiny_config(self.projector)
        return read_json(mobilevlm.CONFIGS / f"{self.published}.json")

    @property
    def clip(self) -> Config:
        return TINY_CLIP if self.published is None else CLIP_L_336

    def make(self, folder: Path) -> Path:
        dtype: mobilevlm.DtypeName = "float32" if self.published is None else "bfloat16"
        return make_mobilevlm(folder, self.config, self.clip, dtype=dtype)

    def oracle(self, checkpoint: Path) -> ComposedOracle:
        return mobilevlm_oracle(self.config, self.clip, read_weights(checkpoint))

    def tile(self, picture: Pixels) -> Pixels:
        """The picture in the middle of a square of CLIP's mean colour, resized."""
        image = Image.fromarray(picture)
        side = max(image.size)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        edge = self.clip["image_size"]
        return planes(square.resize((edge, edge), Image.Resampling.BICUBIC))

    def ids(self, question: str) -> list[int]:
        """Vicuna's conversation; the text on each side of the picture is encoded by itself."""
        model = sentencepiece.SentencePieceProcessor(model_proto=mobilevlm.sentencepiece_model())
        before = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions. USER: "
        )
        behind = f"\n{question} ASSISTANT:"
        count = (self.clip["image_size"] // self.clip["patch_size"]) ** 2 // 4
        return [1, *model.encode(before), *[0] * count, *model.encode(behind)]


@dataclass(frozen=True)
class OmniVlm:
    """An OmniVLM checkpoint: the normal form, or a GGUF pair of a kind."""

    group: int = 9
    kind: omnivlm.Quantisation | None = None
    published: str | None = None

    @cached_property
    def config(self) -> Config:
        if self.published is None:
            return omnivlm.tiny_config(self.group)
        return omnivlm.published_config(omnivlm.CONFIGS / f"{self.published}.json")

    @property
    def tokens(self) -> int:
        vision = self.config["vision_config"]
        count: int = (vision["image_size"] // vision["patch_size"]) ** 2 // self.group
        return count

    @property
    def stops(self) -> tuple[int, ...]:
        ids: dict[str, int] = omnivlm.qwen2_tokenizer().get_vocab(with_added_tokens=True)
        return ids["<|im_end|>"], ids["<|endoftext|>"]

    def make(self, folder: Path) -> Path:
        if self.kind is None:
            return make_omnivlm(folder, self.config)
        make_gguf_pair(folder, self.config, kind=self.kind)
        return folder

    def oracle(self, checkpoint: Path) -> ComposedOracle:
        if self.kind is None:
            return omnivlm_oracle(self.config, read_weights(checkpoint))
        published = {omnivlm.gguf_name(n): n for n in omnivlm.published_shapes(self.config)}
        weights = {
            published[tensor.name]: torch.from_numpy(
                gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).copy()
            )
            for file in sorted(checkpoint.glob("*.gguf"))
            for tensor in gguf.GGUFReader(file).tensors
        }
        return omnivlm_oracle(self.config, weights)

    def tile(self, picture: Pixels) -> Pixels:
        """The picture stretched to a square."""
        edge = self.config["vision_config"]["image_size"]
        return planes(Image.fromarray(picture).resize((edge, edge), Image.Resampling.BICUBIC))

    def ids(self, question: str) -> list[int]:
        """ChatML without a header for the answer, encoded as one text."""
        text = (
            "<|im_start|>system\nYou are Nano-Omni-VLM, created by Nexa AI. You are a helpful "
            "assistant.<|im_end|>\n<|im_start|>user\n\n<|vision_start|>"
            + "<|image_pad|>" * self.tokens
            + f"<|vision_end|>{question}<|im_end|>"
        )
        found: list[int] = omnivlm.qwen2_tokenizer().encode(text, add_special_tokens=False).ids
        return found


def planes(image: Image.Image) -> Pixels:
    """One tile `[1, 3, edge, edge]`."""
    return np.asarray(image).transpose(2, 0, 1)[None].copy()


def picture(width: int, height: int) -> Pixels:
    """Ramps and noise, another one for every size."""
    draw = np.random.default_rng(width * 1000 + height)
    row, column = np.mgrid[0:height, 0:width]
    shade = np.stack([row * 5, column * 3, row * 2 + column], axis=-1)
    return ((shade + draw.integers(0, 90, (height, width, 3))) % 256).astype(np.uint8)


@dataclass
class Made:
    """A checkpoint of a case, its oracle, and the bundles made of it so far."""

    case: MobileVlm | OmniVlm
    folder: Path

    @cached_property
    def checkpoint(self) -> Path:
        return self.case.make(self.folder / "checkpoint")

    @cached_property
    def oracle(self) -> ComposedOracle:
        return self.case.oracle(self.checkpoint)

    def bundle(self, scheme: str) -> Path:
        """Exported when it is first asked for, which climbs the parity ladder."""
        path = self.folder / f"{scheme}.lorg"
        if not path.exists():
            # Random weights keep no promise: here it is that the bundle gives what the plan means.
            recipe, unmeasured = Recipe(quant=scheme), Pictures(measure=0)
            _, ladder = export(self.checkpoint, path, recipe, pictures=unmeasured)
            assert ladder.passed
        return path

    @cached_property
    def model(self) -> Model:
        """The float32 bundle, opened."""
        return open_model(self.bundle("fp32"), threads=1)


CASES: dict[str, MobileVlm | OmniVlm] = {
    "mobilevlm-v1": MobileVlm("ldpnet"),
    "mobilevlm-v2": MobileVlm("ldpnetv2"),
    "omnivlm": OmniVlm(),
    "nano-vlm-instruct": OmniVlm(group=1),
    "omnivlm-gguf-F16": OmniVlm(kind="F16"),
    "omnivlm-gguf-Q8_0": OmniVlm(kind="Q8_0"),
}
