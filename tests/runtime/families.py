"""Prompts of MobileVLM and OmniVLM, and small tokenizers of their kinds."""

from __future__ import annotations

import re
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lorgnette.runtime.tokenizer import Tokenizer
from lorgnette.spec import ImageTemplate, PromptSpec, TurnTemplate

LLAMA_SPECIAL = ("<unk>", "<s>", "</s>")
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
OMNI = "You are Nano-Omni-VLM, created by Nexa AI. You are a helpful assistant."
WORDS = ("▁chat", "▁the", "▁USER:", "▁ASSISTANT:", "▁Red", "Red", "▁dot", "▁▁", "\n\n", "?\n")
WORDS_OF_BYTES = ("Ġred", "Ġdot", "assistant", "user", "system", "ĊĊ", "ĊĊĊ", "ĠĠ", "?Ċ")


def mobilevlm_prompt(tokens_per_tile: int = 144) -> PromptSpec:
    """The vicuna conversation as MobileVLM has it."""
    return PromptSpec(
        prefix="<s>",
        turns={
            "system": _turn("", " "),
            "user": _turn("USER: ", " "),
            "assistant": _turn("ASSISTANT: ", "</s>"),
        },
        generation="ASSISTANT:",
        image=_image("<unk>", tokens_per_tile, "{image}\n"),
        stop_token_ids=(2,),
        default_system=VICUNA,
    )


def omnivlm_prompt(tokens_per_tile: int = 81, stop: int = 2) -> PromptSpec:
    """OmniVLM's turns, whose assistant writes the header of its own turn."""
    return PromptSpec(
        prefix="",
        turns={
            "system": _turn("<|im_start|>system\n", "<|im_end|>\n"),
            "user": _turn("<|im_start|>user\n", "<|im_end|>"),
            "assistant": _turn("<|im_start|>assistant\n", "<|im_end|>\n"),
        },
        generation="",
        image=_image("<|image_pad|>", tokens_per_tile, "\n<|vision_start|>{image}<|vision_end|>"),
        stop_token_ids=(stop,),
        default_system=OMNI,
        answer_header="<|im_start|>assistant",
        tasks={"ocr": " <|ocr_start|><|vision_start|>{image}<|vision_end|><|ocr_end|>"},
    )


def _turn(header: str, footer: str) -> TurnTemplate:
    return TurnTemplate(header=header, header_image_first=header, footer=footer)


def _image(token: str, tokens_per_tile: int, single: str) -> ImageTemplate:
    return ImageTemplate(
        image_token=token,
        tokens_per_tile=tokens_per_tile,
        tile="",
        row_end="",
        thumbnail="",
        single=single,
    )


def llama_backend(special: bool = True) -> tokenizers.Tokenizer:
    """LLaMA's kind: a space before every text, bytes for characters it lacks."""
    letters = [chr(code) for code in range(0x20, 0x7F)] + ["▁", "é"]
    pieces = [*LLAMA_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "\n", *letters]
    vocab, merges = _merged(pieces, WORDS)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    if special:
        backend.add_special_tokens(list(LLAMA_SPECIAL))
    return backend


def qwen_backend(special: bool = True) -> tokenizers.Tokenizer:
    """Qwen's kind: byte-level, no space before anything; without a cut between words."""
    pieces = [*QWEN_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab, merges = _merged(pieces, WORDS_OF_BYTES)
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(  # type: ignore[assignment]
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if special:
        backend.add_special_tokens(list(QWEN_SPECIAL))
    return backend


def _merged(
    pieces: Iterable[str], words: Iterable[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary with these words, each merged from the left."""
    vocab = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1 : end])
            if pair not in merges:
                merges.append(pair)
            vocab.setdefault(word[:end], len(vocab))
    return vocab, merges


class Separately:
    """Oracle: text between special tokens is encoded on its own, and nothing else is done.

    The tokenizer it uses has no special tokens of its own.

    Args:
        backend: A tokenizer without added tokens.
        special: The ids of the special tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, int]) -> None:
        """Takes the parts."""
        self._backend, self._special = backend, special
        self._cut = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        ids: list[int] = []
        for part in self._cut.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += self._backend.encode(part, add_special_tokens=False).ids
        return ids


def small_llama() -> tuple[Tokenizer, Separately]:
    """The tokenizer and its oracle."""
    special = {text: n for n, text in enumerate(LLAMA_SPECIAL)}
    return Tokenizer(llama_backend(), where="small"), Separately(llama_backend(False), special)


def small_qwen() -> tuple[Tokenizer, Separately]:
    """The tokenizer and its oracle."""
    special = {text: n for n, text in enumerate(QWEN_SPECIAL)}
    return Tokenizer(qwen_backend(), where="small"), Separately(qwen_backend(False), special)
