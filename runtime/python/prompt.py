"""From a conversation to the text and the token ids that the model was trained on.

The text is put together from the literals of a `PromptSpec` and never from a template language.
What users typed is told apart from what the template wrote, so that nobody can type a special
token: see `encode_prompt`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import RequestError
from lorgnette.runtime.tokenizer import Tokenizer
from lorgnette.runtime.turns import (
    ImagePart,
    Message,
    Piece,
    TaskPart,
    joined,
    prompt_pieces,
    render_image,
    render_task,
    suffix_pieces,
    turn_pieces,
)
from lorgnette.spec import PromptSpec

__all__ = [
    "Continuation",
    "ImagePart",
    "Message",
    "TaskPart",
    "answer_message",
    "continue_prompt",
    "encode_prompt",
    "image_slots",
    "image_token_count",
    "render_image",
    "render_prompt",
    "render_suffix",
    "render_task",
    "render_turn",
]


@dataclass(frozen=True, slots=True)
class Continuation:
    """A conversation after a further turn, and how much of it is already in the KV cache.

    Attributes:
        ids: The whole conversation.
        keep: How many ids at the front are those of the context that was given.
    """

    ids: list[int]
    keep: int


def render_turn(spec: PromptSpec, message: Message) -> str:
    """One message with the text its role puts around it.

    Raises:
        RequestError: The template has no such role, or the message is empty.
    """
    return joined(turn_pieces(spec, message))


def render_prompt(
    spec: PromptSpec, messages: Sequence[Message], add_generation: bool = True
) -> str:
    """A whole conversation as text, pictures expanded.

    Args:
        spec: The compiled chat template.
        messages: A system message or none, then user and assistant in turns.
        add_generation: Ends with what makes the model answer; the last turn is then the user's.

    Raises:
        RequestError: The order of roles is not one the template was checked for, a role is
            unknown, or a message is empty.
    """
    return joined(prompt_pieces(spec, messages, add_generation))


def render_suffix(spec: PromptSpec, messages: Sequence[Message], stop_text: str = "") -> str:
    """What follows an answer that the model has generated, up to where it answers again.

    Args:
        spec: The compiled chat template.
        messages: The next turns, the user's first and last.
        stop_text: The text of the stop token that ended the answer, where it stays in the
            context: the footer of the answer's turn may begin with it and is then cut short.

    Raises:
        RequestError: As for `render_prompt`, or the footer does not begin with the stop text.
    """
    pieces = suffix_pieces(spec, messages)
    if not pieces[0].text.startswith(stop_text):
        raise RequestError(
            "the stop token does not begin the end of an assistant turn: leave it out of the "
            "context",
            got=repr(stop_text),
            wanted=repr(pieces[0].text),
        )
    return joined(pieces)[len(stop_text) :]


def answer_message(spec: PromptSpec, answer: str) -> Message:
    """The assistant's message that renders as the generation prompt and this answer did.

    Templates commonly end the generation prompt without the space that stands before an answer
    in the history, and the model generates it: such a space is taken off here.
    """
    turn = spec.turns.get("assistant")
    if turn is not None and turn.header.startswith(spec.generation):
        answer = answer.removeprefix(turn.header[len(spec.generation) :])
    return Message("assistant", (answer,))


def encode_prompt(
    spec: PromptSpec,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation: bool = True,
    allow_special_text: bool = False,
) -> list[int]:
    """A whole conversation as token ids.

    Text is refused where it holds, or forms with what stands beside it, the text of an added
    token such as `<image>` or `<end_of_utterance>`: the tokenizer would make it that token, and
    the user would speak in the template's place. Anything else is tokenised as part of the whole,
    so that the ids are the reference's.

    Args:
        spec: The compiled chat template.
        tokenizer: The tokenizer of the same bundle.
        messages: A system message or none, then user and assistant in turns.
        add_generation: Ends with what makes the model answer.
        allow_special_text: Lets such text through, as the reference does; the image token stays
            refused.

    Raises:
        RequestError: As above and as for `render_prompt`.
    """
    pieces = prompt_pieces(spec, messages, add_generation)
    if not allow_special_text:
        _refuse_special_text(pieces, tokenizer)
    ids = tokenizer.encode(joined(pieces))
    _check_image_tokens(spec, tokenizer, ids, messages)
    return ids


def continue_prompt(
    spec: PromptSpec,
    tokenizer: Tokenizer,
    context: Sequence[int],
    messages: Sequence[Message],
    *,
    allow_special_text: bool = False,
) -> Continuation:
    """Adds turns to a conversation whose last answer was generated, tokenising only the new text.

    Where the answer's ids are the ones its text has, the result is what encoding the whole
    conversation gives, also where the end of the answer and the text after it share a token.
    Otherwise the answer's ids stay as the model gave them.

    Args:
        spec: The compiled chat template.
        tokenizer: The tokenizer of the same bundle.
        context: The ids of the prompt and the answer, with the stop token where one was generated.
        messages: The next turns, the user's first and last.
        allow_special_text: As for `encode_prompt`.

    Raises:
        RequestError: As for `encode_prompt`.
    """
    pieces = suffix_pieces(spec, messages)
    if not allow_special_text:
        _refuse_special_text(pieces, tokenizer)
    given = list(context)
    # The stop token goes: where it begins the footer, the footer brings it back.
    base = given[:-1] if given and given[-1] in spec.stop_token_ids else given
    ids = _encode_after(tokenizer, base, joined(pieces))
    _check_image_tokens(spec, tokenizer, ids[_shared(ids, base) :], messages)
    return Continuation(ids=ids, keep=_shared(ids, given))


def image_slots(
    ids: Sequence[int], image_token_id: int, expected: int | None = None
) -> NDArray[np.int64]:
    """The positions at which image tokens are spliced in.

    Args:
        ids: Ids of a prompt, or the new ids of a further turn.
        image_token_id: The placeholder.
        expected: How many image tokens the vision encoder gives.

    Shapes:
        Returns int64 [N], rising.

    Raises:
        RequestError: There are not as many as expected.
    """
    slots = np.flatnonzero(np.asarray(ids, dtype=np.int64) == image_token_id).astype(np.int64)
    if expected is not None and len(slots) != expected:
        raise RequestError(
            "the prompt does not hold its pictures' image tokens", got=len(slots), wanted=expected
        )
    return slots


def image_token_count(spec: PromptSpec, messages: Sequence[Message]) -> int:
    """How many image tokens the pictures of these messages take."""
    parts = [part for message in messages for part in message.content if not isinstance(part, str)]
    size = {part: _rendered(spec, part).count(spec.image.image_token) for part in set(parts)}
    return sum(size[part] for part in parts)


def _rendered(spec: PromptSpec, part: ImagePart | TaskPart) -> str:
    """The text of a picture or a task."""
    if isinstance(part, TaskPart):
        return render_task(spec, part.name)
    return render_image(spec.image, part)


def _refuse_special_text(pieces: Sequence[Piece], tokenizer: Tokenizer) -> None:
    """Refuses typed text that overlaps an added token anywhere in the joined text."""
    text, start = joined(pieces), 0
    for piece in pieces:
        end = start + len(piece.text)
        if piece.typed and piece.text:
            found = _overlapping(text, start, end, tokenizer)
            if found is not None:
                raise RequestError(
                    "the text of a message contains a special token",
                    got=repr(found),
                    hint="take it out, or allow special text",
                )
        start = end


def _overlapping(text: str, start: int, end: int, tokenizer: Tokenizer) -> str | None:
    """The first added token whose text shares a character with text[start:end]."""
    normalized = tokenizer.normalized(text[start:end])
    for special in tokenizer.special_strings:
        reach = len(special) - 1
        near = text[max(0, start - reach) : end + reach]
        if special in near or special in normalized:
            return special
    return None


def _check_image_tokens(
    spec: PromptSpec, tokenizer: Tokenizer, ids: Sequence[int], messages: Sequence[Message]
) -> None:
    """The last guard of the splice: exactly the pictures' image tokens, whatever was allowed."""
    image_token_id = tokenizer.token_id(spec.image.image_token)
    image_slots(ids, image_token_id, image_token_count(spec, messages))


def _encode_after(tokenizer: Tokenizer, base: list[int], suffix: str) -> list[int]:
    """The ids of the context and a suffix, letting tokens form across the border.

    Where the suffix begins with an added token, as it mostly does, none can: it is then encoded
    alone in effect, whatever the context's ids are.
    """
    # Tokens never form across an added token, so the text since the last one is enough.
    cut = max((n for n, i in enumerate(base) if i in tokenizer.added_ids), default=0)
    for tail in _texts(tokenizer, base[cut:]):
        if tokenizer.encode(tail) == base[cut:]:
            return base[:cut] + tokenizer.encode(tail + suffix)
    return base + tokenizer.encode(suffix)


def _texts(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    """Texts that may have these ids, of which the first may be an added token.

    Tokenizers of LLaMA's kind put a space before every text between added tokens, or before the
    first alone, and decoding takes one off the very first.
    """
    yield tokenizer.decode(ids, skip_special=False)
    first, rest = tokenizer.decode(ids[:1], skip_special=False), ids[1:]
    yield first + tokenizer.decode(rest, skip_special=False)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
