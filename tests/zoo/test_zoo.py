"""The zoo against independent oracles: pixels, transformers' processor and transformers' model."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, SmolVLMForConditionalGeneration
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.zoo import checkpoint
from tests.zoo.draw import CHARACTERS, COLOURS, SHAPES
from tests.zoo.evaluate import score
from tests.zoo.families.smolvlm import LONGEST_EDGE, TILE, SmolVLM, prefix_text, question_text
from tests.zoo.optimiser import orthogonalise
from tests.zoo.questions import (
    CALIBRATION,
    HELD_OUT,
    KINDS,
    MEASURE,
    ONE_WORD,
    TRAIN,
    WORDS,
    draw_sample,
)
from tests.zoo.tiles import split

SMOL = SmolVLM()
TINY = checkpoint.CHECKPOINTS / "smolvlm-tiny"


@lru_cache(maxsize=1)
def processor() -> Idefics3Processor:
    """Transformers' own path from a picture to ids, over the tiny checkpoint's files.

    SmolVLMProcessor itself needs packages for video; Idefics3Processor writes the same prompt.
    """
    template = json.loads((TINY / "chat_template.json").read_text(encoding="utf-8"))
    return Idefics3Processor(
        SmolVLMImageProcessorPil.from_pretrained(TINY),
        AutoTokenizer.from_pretrained(TINY),
        image_seq_len=16,
        chat_template=template["chat_template"],
    )


@pytest.mark.parametrize("split_number", [TRAIN, HELD_OUT])
def test_same_number_gives_same_picture(split_number: int) -> None:
    first, second = (draw_sample(split_number, 7) for _ in range(2))
    assert np.array_equal(np.asarray(first.scene.image), np.asarray(second.scene.image))
    assert first.question == second.question


def test_splits_and_numbers_give_different_pictures() -> None:
    splits = (TRAIN, HELD_OUT, CALIBRATION, MEASURE)
    pictures = [draw_sample(s, i).scene.image.tobytes() for s in splits for i in (1, 7)]
    assert len(set(pictures)) == 8


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_a_shape_has_its_named_colour_in_the_pixels(index: int) -> None:
    scene = draw_sample(HELD_OUT, index).scene
    pixels = np.asarray(scene.image, np.float32)
    for item in scene.shapes:
        x, y = (round(v) for v in item.centre)
        seen = pixels[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
        nearest = min(COLOURS, key=lambda c: float(np.abs(seen - np.array(COLOURS[c])).sum()))
        assert nearest == item.colour


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_patch_labels_name_what_is_there(index: int) -> None:
    scene = draw_sample(HELD_OUT, index).scene
    pixels = SMOL.pixels(scene.image)
    labels = SMOL.patch_labels(scene, pixels)
    assert labels.shape == (len(pixels.values), 16, 4, 6)
    assert labels[0, [0, 0, 15], [0, 3, 3], 4:].tolist() == [[0, 0], [1, 1], [7, 7]]
    assert set(labels[..., 0][labels[..., 0] > 0]) == {
        SHAPES.index(s.shape) + 1 for s in scene.shapes
    }
    assert (labels[:-1, ..., 3] == 1).sum() == len(scene.shapes)
    text = "".join(item.text for item in scene.texts)
    named = labels[:-1, ..., 2]
    assert {CHARACTERS[i - 1] for i in named[named > 0]} <= set(text)


def test_every_kind_is_asked_equally_often() -> None:
    kinds = [draw_sample(HELD_OUT, i).question.kind for i in range(14)]
    assert kinds == [*KINDS, *KINDS]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_a_description_names_every_shape_from_left_to_right_and_the_text(number: int) -> None:
    sample = draw_sample(HELD_OUT, 7 * number + KINDS.index("describe"))
    shapes, text = sample.scene.shapes, [item.text for item in sample.scene.texts]
    said, *rest = sample.question.answer.split(".")
    count, listed = said.split(": ")
    assert count == ["", "One shape", "Two shapes", "Three shapes", "Four shapes"][len(shapes)]
    named = re.findall(r"\b(an?) (\w+) (\w+)", listed)
    assert [article for article, _, _ in named] == [
        "an" if colour[0] in "aeiou" else "a" for _, colour, _ in named
    ]
    lefts = {item.centre[0]: (item.colour, item.shape) for item in shapes}
    assert [(colour, shape) for _, colour, shape in named] == [lefts[x] for x in sorted(lefts)]
    assert len(named) == len(shapes)
    assert rest == ([f" The text says {text[0]}", ""] if text else [""])


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 400), st.integers(20, 400))
def test_tiles_equal_the_reference_processor(width: int, height: int) -> None:
    rng = np.random.default_rng(width * 1000 + height)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    tiles, rows, cols = split(picture, TILE, LONGEST_EDGE)
    out = processor().image_processor(picture, return_tensors="np", return_row_col_info=True)
    pixels = np.rint((out["pixel_values"][0] * 0.5 + 0.5) * 255).astype(np.uint8)
    assert np.array_equal(tiles, pixels.transpose(0, 2, 3, 1))
    assert ([[rows]], [[cols]]) == (out["rows"], out["cols"])


def test_committed_tokenizer_is_the_trained_one() -> None:
    tokenizer = SMOL.train_tokenizer().inner
    committed = (TINY / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(tokenizer.to_str()) == json.loads(committed)
    firsts = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [tokenizer.token_to_id(t) for t in firsts] == [0, 1, 2]
    size = tokenizer.get_vocab_size()
    assert tokenizer.token_to_id("<end_of_utterance>") == size - 1
    assert size % 32 == 0
    assert len(tokenizer.encode("\n\n").ids) == 1


def test_characters_never_merge_with_each_other() -> None:
    tokenizer = SMOL.train_tokenizer().inner
    for first in CHARACTERS:
        for second in CHARACTERS:
            tokens = tokenizer.encode(f"0{first}{second}.").tokens
            assert tokens == ["0", first, second, "."]


@pytest.mark.parametrize("index", range(8))
def test_prompt_equals_the_reference_processor(index: int) -> None:
    sample = draw_sample(HELD_OUT, index)
    text = {"type": "text", "text": sample.question.text}
    messages: list[Any] = [{"role": "user", "content": [{"type": "image"}, text]}]
    template = processor().apply_chat_template(messages, add_generation_prompt=True)
    wanted = processor()(text=template, images=[sample.scene.image], return_tensors="np")
    _, rows, cols = split(sample.scene.image, TILE, LONGEST_EDGE)
    prompt = prefix_text(rows, cols, 16) + question_text(sample.question.text)
    assert prompt == processor().tokenizer.decode(wanted["input_ids"][0])
    tokens, config = SMOL.train_tokenizer(), SMOL.config(SMOL.train_tokenizer())
    ids = SMOL.prefix(tokens, config, (rows, cols)) + SMOL.asked(tokens, sample.question.text)
    assert ids == wanted["input_ids"][0].tolist()


def test_orthogonalise_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 64, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_committed_checkpoint_loads_as_published() -> None:
    _, _, weights, _ = checkpoint.read(TINY)
    model = SmolVLMForConditionalGeneration.from_pretrained(TINY)
    assert set(model.state_dict()) == set(weights)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_scoring_counts_by_kind_and_aspect() -> None:
    tally = score(lambda picture, question: " Red. ", count=28)
    reds = [draw_sample(HELD_OUT, i).question.answer == "Red." for i in range(28)]
    assert tally["all"] == (sum(reds), 28)
    assert sum(tally[f"kind {kind}"][1] for kind in KINDS) == 28
    assert sum(asked for name, (_, asked) in tally.items() if name.startswith("aspect")) == 28


def test_demo_picture_is_the_drawn_one() -> None:
    sample = draw_sample(HELD_OUT, 100961, WORDS)
    with Image.open(Path(__file__).parent / "pictures" / "demo.png") as demo:
        assert np.array_equal(np.asarray(demo), np.asarray(sample.scene.image))
    assert sample.question.answer == "A9X2."
    assert sample.question.kind in ONE_WORD
