"""The zoo against independent oracles: pixels, transformers' processor and transformers' model."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.zoo import checkpoint
from tests.zoo.batches import batches, patch_labels
from tests.zoo.draw import CHARACTERS, COLOURS, SHAPES
from tests.zoo.evaluate import score, table, transformers_answer
from tests.zoo.model import decode, encode_patches, init_params, param_shapes, project
from tests.zoo.optimiser import orthogonalise
from tests.zoo.questions import HELD_OUT, KINDS, TRAIN, draw_sample
from tests.zoo.tiles import split
from tests.zoo.tokenizer import prompt_text, train_tokenizer

TINY = Path(__file__).parent / "checkpoints" / "smolvlm-tiny"


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
    pictures = [draw_sample(s, i).scene.image.tobytes() for s in (TRAIN, HELD_OUT) for i in (1, 7)]
    assert len(set(pictures)) == 4


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
    tiles, rows, cols = split(scene.image, checkpoint.TILE, checkpoint.LONGEST_EDGE)
    labels = patch_labels(scene, rows, cols)
    assert labels.shape == (len(tiles), 64, 6)
    assert labels[0, [0, 9, 63], 4:].tolist() == [[0, 0], [1, 1], [7, 7]]
    assert set(labels[..., 0][labels[..., 0] > 0]) == {
        SHAPES.index(s.shape) + 1 for s in scene.shapes
    }
    assert (labels[:-1, :, 3] == 1).sum() == len(scene.shapes)
    text = "".join(item.text for item in scene.texts)
    named = labels[:-1, :, 2]
    assert {CHARACTERS[i - 1] for i in named[named > 0]} <= set(text)


def test_every_kind_is_asked_equally_often() -> None:
    kinds = [draw_sample(HELD_OUT, i).question.kind for i in range(12)]
    assert kinds == [*KINDS, *KINDS]


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 400), st.integers(20, 400))
def test_tiles_equal_the_reference_processor(width: int, height: int) -> None:
    rng = np.random.default_rng(width * 1000 + height)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    tiles, rows, cols = split(picture, checkpoint.TILE, checkpoint.LONGEST_EDGE)
    out = processor().image_processor(picture, return_tensors="np", return_row_col_info=True)
    pixels = np.rint((out["pixel_values"][0] * 0.5 + 0.5) * 255).astype(np.uint8)
    assert np.array_equal(tiles, pixels.transpose(0, 2, 3, 1))
    assert ([[rows]], [[cols]]) == (out["rows"], out["cols"])


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_tokenizer_gives_back_any_text(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_committed_tokenizer_is_the_trained_one() -> None:
    tokenizer = train_tokenizer()
    committed = (TINY / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(tokenizer.to_str()) == json.loads(committed)
    firsts = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [tokenizer.token_to_id(t) for t in firsts] == [0, 1, 2]
    size = tokenizer.get_vocab_size()
    assert tokenizer.token_to_id("<end_of_utterance>") == size - 1
    assert size % 32 == 0
    assert len(tokenizer.encode("\n\n").ids) == 1


def test_characters_never_merge_with_each_other() -> None:
    tokenizer = train_tokenizer()
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
    _, rows, cols = split(sample.scene.image, checkpoint.TILE, checkpoint.LONGEST_EDGE)
    prompt = prompt_text(sample.question.text, rows, cols, 16)
    assert prompt == processor().tokenizer.decode(wanted["input_ids"][0])
    assert train_tokenizer().encode(prompt).ids == wanted["input_ids"][0].tolist()


def test_packed_forward_equals_transformers_question_by_question() -> None:
    torch.set_num_threads(1)
    tokenizer = train_tokenizer()
    config = checkpoint.tiny_config(tokenizer)
    params = init_params(config, 3)
    oracle = SmolVLMForConditionalGeneration(SmolVLMConfig(**config))
    oracle.load_state_dict(params)
    oracle.eval()  # type: ignore[no-untyped-call]
    batch = next(batches(config, tokenizer, [HELD_OUT, 5], tiles=5, questions=3))
    with torch.no_grad():
        tokens = project(params, config, encode_patches(params, config, batch.tiles))
        x = params["model.text_model.embed_tokens.weight"][batch.ids]
        x = x.masked_scatter((batch.ids == config["image_token_id"])[..., None], tokens)
        hidden = decode(params, config, x, batch.positions, batch.mask)
        got = (hidden @ params["lm_head.weight"].T)[0]
        pixels = batch.tiles[: len(batch.tiles) // len(batch.ids)].permute(0, 3, 1, 2)[None]
        seen = batch.mask[0, 0] == 0
        # The last position of a question is one that the next position cannot see.
        length = len(got)
        ends = [t for t in range(length) if t == length - 1 or not seen[t + 1, t]]
        for end in ends:
            rows = seen[end].nonzero()[:, 0]
            ids = batch.ids[:1, rows]
            wanted = oracle(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels.float() / 127.5 - 1,
                pixel_attention_mask=torch.ones(1, pixels.shape[1], 64, 64, dtype=torch.bool),
            ).logits[0]
            torch.testing.assert_close(got[rows], wanted, atol=1e-4, rtol=1e-4)
    assert len(ends) >= 2


def test_orthogonalise_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 64, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_committed_checkpoint_has_the_published_layout() -> None:
    config, weights, tokenizer = checkpoint.read(TINY)
    assert config == checkpoint.tiny_config(tokenizer)
    assert {n: tuple(w.shape) for n, w in weights.items()} == param_shapes(config)
    for name, content in checkpoint.other_files(config, tokenizer).items():
        assert json.loads((TINY / name).read_text(encoding="utf-8")) == content
    model = SmolVLMForConditionalGeneration.from_pretrained(TINY)
    assert set(model.state_dict()) == set(weights)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    columns = {w.shape[1] for n, w in weights.items() if w.ndim == 2 and "embed" not in n}
    assert all(width % 32 == 0 for width in columns)


def test_committed_checkpoint_answers_held_out_pictures() -> None:
    torch.set_num_threads(1)
    tally = score(transformers_answer(TINY), count=120, first=5000)
    right, asked = tally["all"]
    assert right / asked >= 0.9, table(tally)


def test_scoring_counts_by_kind_and_aspect() -> None:
    tally = score(lambda picture, question: " Red. ", count=24)
    reds = [draw_sample(HELD_OUT, i).question.answer == "Red." for i in range(24)]
    assert tally["all"] == (sum(reds), 24)
    assert sum(tally[f"kind {kind}"][1] for kind in KINDS) == 24
    assert sum(asked for name, (_, asked) in tally.items() if name.startswith("aspect")) == 24


def test_demo_picture_is_the_drawn_one() -> None:
    sample = draw_sample(HELD_OUT, 100121)
    with Image.open(Path(__file__).parent / "pictures" / "demo.png") as demo:
        assert np.array_equal(np.asarray(demo), np.asarray(sample.scene.image))
    assert sample.question.answer == "82PH."
