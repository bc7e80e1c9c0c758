"""The float32 bundle answers as transformers does, token for token.

The oracle reads the checkpoint itself: its own processor, model and greedy search, in float32
with eager attention. Answers are followed twice, to where they end and, with an unused token for
the end, over a longer run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast, SmolVLMForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from lorgnette.export.pipeline import export
from lorgnette.recipe import Recipe
from lorgnette.runtime.generation import Request, Result
from lorgnette.runtime.model import Model, open_model
from tests.runtime.support import edit_json, picture

Pictures = list[NDArray[np.uint8]]
UNUSED = "<|reserved_special_token_"
"""How the tokens begin that no model was trained on."""
LONG = 64

SIZES = [(64, 64), (1, 1), (48, 200), (200, 48), (1, 90), (129, 127), (33, 64)]
QUESTIONS = [
    "What do you see?",
    "How many circles are there, and which colour is the one on the left?",
    "Räume 日本 🙂 12345\n\n  two  spaces",
    "x",
]


def processor(checkpoint: Path, **sizes: object) -> Idefics3Processor:
    """The published processor, with the slow image processor and no network."""
    names = json.loads((checkpoint / "tokenizer_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / "tokenizer.json"),
        bos_token=names["bos_token"],
        eos_token=names["eos_token"],
        pad_token=names["pad_token"],
        additional_special_tokens=names["additional_special_tokens"],
    )
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    for key in ("image_processor_type", "processor_class", "video_sampling"):
        settings.pop(key, None)
    return Idefics3Processor(
        Idefics3ImageProcessorPil(**(settings | sizes)),
        tokenizer,
        image_seq_len=json.loads((checkpoint / "processor_config.json").read_text())[
            "image_seq_len"
        ],
        chat_template=json.loads((checkpoint / "chat_template.json").read_text())["chat_template"],
    )


class Oracle:
    """transformers, asked like our chat."""

    def __init__(self, checkpoint: Path, **sizes: object) -> None:
        self._processor = processor(checkpoint, **sizes)
        self._model = SmolVLMForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def answer(
        self, messages: list[dict[str, Any]], pictures: Pictures, count: int, stop: int
    ) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the greedy answer."""
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [[Image.fromarray(source) for source in pictures]] if pictures else None
        inputs = self._processor(text=text, images=images, return_tensors="pt")
        with torch.no_grad():
            ids = self._model.generate(
                **inputs, do_sample=False, max_new_tokens=count, eos_token_id=stop, pad_token_id=2
            )[0].tolist()
        length = inputs["input_ids"].shape[1]
        return ids[:length], ids[length:]


def said(role: str, text: str, pictures: int = 0) -> dict[str, Any]:
    return {
        "role": role,
        "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}],
    }


def drawn(width: int, height: int) -> NDArray[np.uint8]:
    """A picture as the checkpoint was trained on: plain shapes on a plain ground."""
    image = Image.new("RGB", (width, height), (240, 240, 225))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 4, width // 2, height * 3 // 4), fill=(200, 30, 30))
    draw.rectangle((width * 5 // 8, height // 4, width * 7 // 8, height // 2), fill=(30, 60, 200))
    return np.array(image)


def assert_same(model: Model, oracle: Oracle, question: str, pictures: Pictures) -> Result:
    stop = model.manifest.prompt.stop_token_ids[0]
    chat = model.chat()
    result = chat.send(question, pictures, Request(max_new_tokens=LONG)).result()
    messages = [said("user", question, len(pictures))]
    prompt, answer = oracle.answer(messages, pictures, LONG, stop)
    generated = len(result.token_ids)
    assert chat._context.ids[:-generated] == prompt
    assert list(result.token_ids) == answer
    assert result.image_tokens == prompt.count(model.manifest.spec.image_token_id)
    return result


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


@pytest.fixture(scope="module")
def endless_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, but the answer ends with a token that never comes."""
    copy = tmp_path_factory.mktemp("endless") / "checkpoint"
    shutil.copytree(checkpoint, copy)
    added = json.loads((copy / "tokenizer.json").read_text())["added_tokens"]
    unused = max(token["id"] for token in added if token["content"].startswith(UNUSED))
    edit_json(copy / "generation_config.json", lambda values: values.update(eos_token_id=unused))
    return copy


@pytest.fixture(scope="module")
def export_of(
    endless_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Recipe], Model]:
    """Exports and opens, once a recipe."""
    folder, opened = tmp_path_factory.mktemp("recipes"), dict[Recipe, Model]()

    def export_of(recipe: Recipe) -> Model:
        if recipe not in opened:
            path = folder / f"{len(opened)}.lorg"
            export(endless_checkpoint, path, recipe)
            opened[recipe] = open_model(path, threads=1)
        return opened[recipe]

    return export_of


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_answers_are_the_oracles(
    model: Model, oracle: Oracle, size: tuple[int, int], question: str
) -> None:
    assert_same(model, oracle, question, [picture(*size, seed=len(question))])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_long_answers_are_the_oracles(
    export_of: Callable[[Recipe], Model], oracle: Oracle, size: tuple[int, int]
) -> None:
    model = export_of(Recipe())
    result = assert_same(model, oracle, QUESTIONS[0], [picture(*size, seed=sum(size))])
    assert len(result.token_ids) == LONG


@pytest.mark.parametrize("size", [(160, 120), (120, 160), (64, 64)], ids=str)
def test_drawn_pictures_are_answered_alike(
    model: Model,
    export_of: Callable[[Recipe], Model],
    oracle: Oracle,
    size: tuple[int, int],
) -> None:
    for question in ("How many shapes are there?", "Which colour is the circle?"):
        assert_same(model, oracle, question, [drawn(*size)])
        assert_same(export_of(Recipe()), oracle, question, [drawn(*size)])


@pytest.mark.parametrize(
    "sizes", [[], [(64, 64), (48, 200)], [(1, 1), (200, 48), (50, 50)]], ids=str
)
def test_none_and_several_pictures(
    model: Model,
    export_of: Callable[[Recipe], Model],
    oracle: Oracle,
    sizes: list[tuple[int, int]],
) -> None:
    sources = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    for each in (model, export_of(Recipe())):
        assert_same(each, oracle, "What do they have in common?", sources)


RECIPES = [
    (Recipe(split=False), {"do_image_splitting": False}),
    (Recipe(longest_edge=192), {"size": {"longest_edge": 192}}),
    # One tile of 64 pixels: what is left of two of them and a thumbnail.
    pytest.param(Recipe(max_tiles=4), {"size": {"longest_edge": 64}}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("recipe", "sizes"), RECIPES, ids=["no split", "192 pixels", "4 tiles"])
def test_recipes_change_the_size_as_the_processor_does(
    checkpoint: Path,
    export_of: Callable[[Recipe], Model],
    recipe: Recipe,
    sizes: dict[str, object],
) -> None:
    model, oracle = export_of(recipe), Oracle(checkpoint, **sizes)
    for size in ((64, 64), (48, 200), (200, 48), (1, 1)):
        assert_same(model, oracle, QUESTIONS[0], [picture(*size, seed=sum(size))])


def test_further_turns_are_the_oracles_whole_conversation(model: Model, oracle: Oracle) -> None:
    stop = model.manifest.prompt.stop_token_ids[0]
    turns: list[tuple[str, Pictures]] = [
        ("What do you see?", [drawn(100, 80)]),
        ("Which colour is it?", []),
        ("And in this one?", [drawn(60, 140), picture(10, 10)]),
    ]
    chat, messages, seen = model.chat(), list[dict[str, Any]](), list[NDArray[np.uint8]]()
    results: list[Result] = []
    for question, pictures in turns:
        results.append(chat.send(question, pictures, Request(max_new_tokens=LONG)).result())
        messages.append(said("user", question, len(pictures)))
        seen += pictures
        prompt, answer = oracle.answer(messages, seen, LONG, stop)
        assert results[-1].finish_reason == "stop", "choose another question"
        assert chat._context.ids[: len(prompt)] == prompt
        assert list(results[-1].token_ids) == answer
        # The template writes the space that the model gives before an answer.
        messages.append(said("assistant", results[-1].text.removeprefix(" ")))
    assert results[1].tiles == 0
