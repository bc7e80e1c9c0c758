"""A small byte-level BPE tokenizer of SmolVLM's kind, trained on the zoo's own sentences."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.zoo.draw import COLOURS, SHAPES
from tests.zoo.questions import NUMBERS, PHRASES, phrase, plural

FIRST_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GLOBAL, FAKE, IMAGE, END = (
    "<global-img>",
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
GRID = 6
"""Rows and columns of tiles that have a token, as published."""
PIECES = 512
"""Most ids before the added tokens: the 256 bytes, three special tokens and the merges."""

CHAT_WORDS = "User: Assistant: System: a an and are as at by for from in is it of on or the"


def train_tokenizer() -> Tokenizer:
    """Train it; the same sentences always give the same ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=list(FIRST_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    tiles = [f"<row_{r}_col_{c}>" for r in range(1, GRID + 1) for c in range(1, GRID + 1)]
    added = [GLOBAL, *tiles, FAKE, IMAGE]
    # One id stays free for the last token, so that the vocabulary is a multiple of 32.
    spare = -(tokenizer.get_vocab_size() + len(added) + 1) % 32
    added += [f"<|reserved_special_token_{i}|>" for i in range(spare)] + [END]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    return tokenizer


def prompt_text(question: str, rows: int, cols: int, tokens_per_tile: int) -> str:
    """The whole prompt for one picture and one question, with the picture expanded.

    Source: FACTS of the published processor; compared with transformers in a test.
    """
    return prefix_text(rows, cols, tokens_per_tile) + question_text(question)


def prefix_text(rows: int, cols: int, tokens_per_tile: int) -> str:
    """Everything up to the question; `rows` and `cols` are 0 for a picture of one tile."""
    image = IMAGE * tokens_per_tile
    grid = "".join(
        "".join(f"{FAKE}<row_{r}_col_{c}>{image}" for c in range(1, cols + 1)) + "\n"
        for r in range(1, rows + 1)
    )
    if grid:
        grid += "\n"
    return f"<|im_start|>User:{grid}{FAKE}{GLOBAL}{image}{FAKE}"


def question_text(question: str) -> str:
    """The question and what makes the model answer."""
    return f"{question}{END}\nAssistant:"


def answer_text(answer: str) -> str:
    """What the model should write after the prompt."""
    return f" {answer}{END}"


def _sentences() -> Iterator[str]:
    """Every phrase with every subject, each answer, and the words of the chat template.

    Rendered text is left out on purpose, so that its characters never merge with each other.
    """
    for _ in range(50):
        yield from ("User:", "Assistant:", "System:", "\n\n", "\n", "\nAssistant:")
    yield CHAT_WORDS
    adjectives, nouns = list(COLOURS), [*SHAPES, "shape", "text", "thing"]
    for noun in nouns:
        for subject in [noun, *(f"{adjective} {noun}" for adjective in adjectives)]:
            for kind in ("colour", "position", "exists"):
                yield from (phrase(kind, i, subject) for i in range(len(PHRASES[kind])))
            yield from (phrase("count", i, plural(subject)) for i in range(len(PHRASES["count"])))
        yield f" {noun.capitalize()}."
    for adjective in adjectives:
        yield from (phrase("shape", i, adjective) for i in range(len(PHRASES["shape"])))
        yield f" {adjective.capitalize()}."
    yield from (f" {number}" for number in NUMBERS)
    yield from PHRASES["read"]
    yield from (" Yes.", " No.", " Left.", " Right.", " Top.", " Bottom.")
