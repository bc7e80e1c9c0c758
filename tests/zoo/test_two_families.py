"""MobileVLM and OmniVLM in the zoo against references for their pixels, ids and files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests import projector_oracle
from tests.zoo import checkpoint
from tests.zoo.families import FAMILIES
from tests.zoo.families.mobilevlm import MEAN, STD
from tests.zoo.transplant import transplant

MOBILE, OMNI = FAMILIES["mobilevlm"], FAMILIES["omnivlm"]
MOBILE_TINY, OMNI_TINY = (checkpoint.CHECKPOINTS / f.name for f in (MOBILE, OMNI))
SIDES = st.integers(20, 300)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@settings(max_examples=30, deadline=None)
@given(SIDES, SIDES)
def test_mobilevlm_pixels_equal_clip_on_a_padded_square(width: int, height: int) -> None:
    picture = noise(width, height)
    side = max(width, height)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = (122, 116, 104)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.asarray(picture)
    processor = CLIPImageProcessorPil.from_pretrained(MOBILE_TINY / "vision_tower")
    out = processor(Image.fromarray(square), return_tensors="np")["pixel_values"]
    got = MOBILE.pixels(picture).values / 255.0
    got = ((got - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, out, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(SIDES, SIDES)
def test_omnivlm_pixels_equal_siglip_processor(width: int, height: int) -> None:
    picture = noise(width, height)
    processor = SiglipImageProcessorPil.from_pretrained(OMNI_TINY)
    out = processor(picture, return_tensors="np")["pixel_values"]
    got = (OMNI.pixels(picture).values / 127.5 - 1).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, out, atol=1e-5)


def test_mobilevlm_ids_are_two_texts_encoded_on_their_own() -> None:
    inner = sentencepiece.SentencePieceProcessor(model_file=str(MOBILE_TINY / "tokenizer.model"))
    tokens = MOBILE.load_tokenizer(MOBILE_TINY)
    question = "How many shapes are there?"
    got = MOBILE.prefix(tokens, {}, (0, 0)) + MOBILE.asked(tokens, question)
    left = inner.encode(f"{SYSTEM} USER: ")
    right = inner.encode(f"\n{question} ASSISTANT:")
    assert got == [1, *left, *[-200] * 144, *right]
    whole = inner.encode(f"\n{question} ASSISTANT: Two.")
    answer = MOBILE.answered(tokens, question, "Two.")
    assert right + answer == [*whole, 2]
    # Each side begins with the dummy prefix; the first also ends with a space of its own.
    assert inner.id_to_piece([left[-1], right[0], right[1]]) == ["\u2581", "\u2581", "<0x0A>"]


def test_mobilevlm_tokenizer_is_of_llamas_kind() -> None:
    inner = sentencepiece.SentencePieceProcessor(model_file=str(MOBILE_TINY / "tokenizer.model"))
    assert [inner.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert inner.encode("2026", out_type=str) == ["\u2581", "2", "0", "2", "6"]
    assert inner.encode("\u00e9", out_type=str) == ["\u2581", "<0xC3>", "<0xA9>"]
    assert inner.decode(inner.encode("  two   spaces ")) == "  two   spaces "
    assert inner.decode(inner.encode("\ufb01")) == "\ufb01"
    assert inner.get_piece_size() == 640


def test_omnivlm_ids_equal_transformers_on_the_whole_prompt() -> None:
    tokens = OMNI.load_tokenizer(OMNI_TINY)
    config = json.loads((OMNI_TINY / "config.json").read_text(encoding="utf-8"))
    question = "Is there a red star?"
    got = OMNI.prefix(tokens, config, (0, 0)) + OMNI.asked(tokens, question)
    text = (
        "<|im_start|>system\nYou are Nano-Omni-VLM, created by Nexa AI. You are a helpful "
        "assistant.<|im_end|>\n<|im_start|>user\n\n<|vision_start|>"
        + "<|image_pad|>" * 36
        + f"<|vision_end|>{question}<|im_end|>"
    )
    assert got == AutoTokenizer.from_pretrained(OMNI_TINY)(text)["input_ids"]
    assert got.count(config["image_token_id"]) == 36
    whole = Tokenizer.from_file(str(OMNI_TINY / "tokenizer.json"))
    reply = whole.encode(f"{text}\n<|im_start|>assistant\nYes.<|im_end|>").ids
    assert reply == got + OMNI.answered(tokens, question, "Yes.")


def test_mobilevlm_tower_folder_is_a_clip_that_gives_576_patches() -> None:
    config = CLIPVisionConfig.from_pretrained(MOBILE_TINY / "vision_tower")
    assert (config.image_size // config.patch_size) ** 2 == 576
    assert (config.hidden_act, config.layer_norm_eps) == ("quick_gelu", 1e-5)


@pytest.mark.parametrize("family", [MOBILE, OMNI], ids=lambda family: family.name)
def test_transplant_keeps_what_fits(family: object) -> None:
    assert family in (MOBILE, OMNI)
    params = transplant(MOBILE if family is MOBILE else OMNI)
    _, _, source, _ = checkpoint.read(checkpoint.CHECKPOINTS / "smolvlm-tiny")
    at, text = (
        ("model.vision_tower.vision_tower.vision_model.", "model.")
        if family is MOBILE
        else ("vision_tower.vision_model.", "language_model.model.")
    )
    layer = "encoder.layers.2.mlp.fc1.weight"
    assert torch.equal(params[at + layer], source["model.vision_model." + layer])
    theirs = source["model.text_model.layers.1.self_attn.k_proj.weight"]
    ours = params[text + "layers.1.self_attn.k_proj.weight"]
    repeated = torch.cat([theirs[:32]] * 3 + [theirs[32:]] * 3) if family is MOBILE else theirs
    assert torch.equal(ours, repeated)


class _Norm(torch.nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _residual_block(width: int, stride: int) -> torch.nn.Module:
    """The published block out of torch's own modules, with the published names inside."""
    nn = torch.nn
    squeeze = nn.Sequential()
    squeeze.add_module("fc1", nn.Conv2d(width, width // 4, 1))
    squeeze.add_module("fc2", nn.Conv2d(width // 4, width, 1))
    deep = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
    point = nn.Conv2d(width, width, 1, bias=False)
    return nn.Sequential(
        nn.Sequential(deep, _Norm(width), nn.Hardswish()),
        squeeze,
        nn.Sequential(point, _Norm(width)),
    )


def test_ldp_equals_torchs_modules() -> None:
    torch.manual_seed(0)
    nn = torch.nn
    mlp = nn.Sequential(nn.Identity(), nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 8))
    first, second = _residual_block(8, 1), _residual_block(8, 2)
    tensors: dict[str, torch.Tensor] = {}
    parts = {"mlp.": mlp, "mb_block.1.block.": first, "mb_block.2.block.": second}
    for at, part in parts.items():
        for name, value in part.state_dict().items():
            value += 0.3 * torch.randn_like(value)
            tensors[f"model.mm_projector.model.{at}{name}"] = value

    def run(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        deep, squeeze, point = block.children()
        x = deep(x)
        fc1, fc2 = squeeze.children()
        gate = nn.Hardsigmoid()(fc2(nn.ReLU()(fc1(nn.AdaptiveAvgPool2d(1)(x)))))
        out: torch.Tensor = point(x * gate)
        return out

    features = torch.randn(2, 36, 5)
    with torch.no_grad():
        x = mlp(features).transpose(1, 2).view(2, 8, 6, 6)
        wanted = run(second, x + run(first, x)).flatten(2).transpose(1, 2)
    got = projector_oracle.ldp(tensors, features)
    assert got.shape == (2, 9, 8)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_ldp_v2_by_loops() -> None:
    """A second reading of the projector, one token at a time."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    at = "model.mm_projector."
    tensors = {
        at + "mlp.mlp.0.weight": draw(6, 5),
        at + "mlp.mlp.0.bias": draw(6),
        at + "mlp.mlp.2.weight": draw(6, 6),
        at + "mlp.mlp.2.bias": draw(6),
        at + "peg.peg.0.weight": draw(6, 1, 3, 3),
        at + "peg.peg.0.bias": draw(6),
    }
    features = draw(1, 36, 5)
    first, second = torch.nn.Linear(5, 6), torch.nn.Linear(6, 6)
    first.load_state_dict({k: tensors[f"{at}mlp.mlp.0.{k}"] for k in ("weight", "bias")})
    second.load_state_dict({k: tensors[f"{at}mlp.mlp.2.{k}"] for k in ("weight", "bias")})
    with torch.no_grad():
        x = second(torch.nn.GELU()(first(features)))[0].view(6, 6, 6)
    pooled = torch.stack(
        [x[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1)) for r in range(3) for c in range(3)]
    ).view(3, 3, 6)
    kernel = tensors[at + "peg.peg.0.weight"][:, 0]
    wanted = pooled + tensors[at + "peg.peg.0.bias"]
    for r in range(3):
        for c in range(3):
            for i in range(max(0, r - 1), min(3, r + 2)):
                for j in range(max(0, c - 1), min(3, c + 2)):
                    wanted[r, c] += kernel[:, i - r + 1, j - c + 1] * pooled[i, j]
    got = projector_oracle.ldp_v2(tensors, features)[0].view(3, 3, 6)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_omnivlm_group_one_is_a_plain_two_layer_projector() -> None:
    generator = torch.Generator().manual_seed(0)
    at = "multi_modal_projector."
    tensors = {
        f"{at}{name}": torch.randn(shape, generator=generator)
        for name, shape in (
            ("0.weight", (7, 4)),
            ("0.bias", (7,)),
            ("2.weight", (3, 7)),
            ("2.bias", (3,)),
        )
    }
    features = torch.randn(2, 9, 4, generator=generator)
    one = projector_oracle.omnivlm(tensors, features, 1)
    hidden = features @ tensors[at + "0.weight"].T + tensors[at + "0.bias"]
    hidden = torch.nn.GELU(approximate="tanh")(hidden)
    wanted = hidden @ tensors[at + "2.weight"].T + tensors[at + "2.bias"]
    torch.testing.assert_close(one, wanted)
    # Nine at a time: token 1 is made of features 9 to 17, side by side.
    wide = {**tensors, at + "0.weight": torch.randn(7, 36, generator=generator)}
    features = torch.randn(1, 18, 4, generator=generator)
    grouped = projector_oracle.omnivlm(wide, features, 9)
    single = projector_oracle.omnivlm(wide, features[:, 9:].reshape(1, 1, 36), 1)
    torch.testing.assert_close(grouped[:, 1:], single)
