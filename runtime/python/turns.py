"""The turns of a conversation, cut into what the template wrote and what users typed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorgnette.errors import RequestError
from lorgnette.spec import ImageTemplate, PromptSpec

_SLOT = re.compile(r"\{(row|col|image)\}")


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture in a message, by how it was split: `rows` x `cols` tiles and a thumbnail.

    Attributes:
        rows: Rows of tiles, 0 where the picture is a single tile.
        cols: Tiles in a row, 0 where the picture is a single tile.

    Raises:
        RequestError: Only one of the two is 0, or one is negative.
    """

    rows: int = 0
    cols: int = 0

    def __post_init__(self) -> None:
        """Checks the grid."""
        if min(self.rows, self.cols) < 0 or (self.rows == 0) != (self.cols == 0):
            raise RequestError(
                "a picture's grid is impossible",
                got=f"{self.rows}x{self.cols}",
                wanted="0x0 for a single tile, or 1 or more each way",
            )


@dataclass(frozen=True, slots=True)
class TaskPart:
    """A fixed request about one picture, which is part of it.

    Attributes:
        name: Its name in `PromptSpec.tasks`.
    """

    name: str


Part = str | ImagePart | TaskPart
"""What a message consists of."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user` or `assistant`.
        content: Text and pictures, in order, or one task; at least one part.
    """

    role: str
    content: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the prompt; `typed` where it came from a message and not from the template."""

    text: str
    typed: bool


def render_image(template: ImageTemplate, part: ImagePart) -> str:
    """The text that one picture becomes."""
    if part.rows == 0:
        return _filled(template, template.single, 0, 0)
    rows = [
        "".join(_filled(template, template.tile, row, col) for col in range(1, part.cols + 1))
        + _filled(template, template.row_end, row, part.cols)
        for row in range(1, part.rows + 1)
    ]
    return "".join(rows) + _filled(template, template.thumbnail, 0, 0)


def render_task(spec: PromptSpec, name: str) -> str:
    """The text of a fixed request, its picture expanded.

    Raises:
        RequestError: The model has no such task.
    """
    if not spec.tasks:
        raise RequestError("the model has no tasks", got=repr(name), hint="ask with a prompt")
    if name not in spec.tasks:
        raise RequestError(
            "the model has no such task", got=repr(name), wanted=" or ".join(spec.tasks)
        )
    image = spec.image.image_token * spec.image.tokens_per_tile
    return spec.tasks[name].replace("{image}", image)


def _filled(template: ImageTemplate, text: str, row: int, col: int) -> str:
    """Fills the slots of one literal; nothing else in it has a meaning."""
    values = {
        "row": str(row),
        "col": str(col),
        "image": template.image_token * template.tokens_per_tile,
    }
    return _SLOT.sub(lambda slot: values[slot[1]], text)


def turn_pieces(spec: PromptSpec, message: Message) -> list[Piece]:
    """One message between its header and footer."""
    turn = spec.turns.get(message.role)
    if turn is None:
        raise RequestError(
            "the chat template has no such role",
            got=repr(message.role),
            wanted=" or ".join(spec.turns),
        )
    if not message.content:
        raise RequestError("a message is empty", where=message.role, wanted="text or a picture")
    image_first = isinstance(message.content[0], ImagePart)
    pieces = [Piece(turn.header_image_first if image_first else turn.header, False)]
    for part in message.content:
        if isinstance(part, ImagePart):
            pieces.append(Piece(render_image(spec.image, part), False))
        elif isinstance(part, TaskPart):
            pieces.append(Piece(render_task(spec, part.name), False))
        else:
            pieces.append(Piece(part, True))
    return [*pieces, Piece(turn.footer, False)]


def prompt_pieces(
    spec: PromptSpec, messages: Sequence[Message], add_generation: bool
) -> list[Piece]:
    """A whole conversation from its prefix on, with a system message where the model needs one."""
    has_system = bool(messages) and messages[0].role == "system"
    _check_order(messages[1:] if has_system else messages, add_generation)
    pieces = [Piece(spec.prefix, False)]
    if not has_system and spec.default_system is not None:
        own = turn_pieces(spec, Message("system", (spec.default_system,)))
        pieces += [Piece(piece.text, False) for piece in own]  # the model's words, nobody's typing
    for message in messages:
        pieces += turn_pieces(spec, message)
    return [*pieces, Piece(spec.generation, False)] if add_generation else pieces


def suffix_pieces(spec: PromptSpec, messages: Sequence[Message]) -> list[Piece]:
    """The end of a generated answer's turn, further turns, and the next generation prompt."""
    _check_order(messages, add_generation=True)
    if "assistant" not in spec.turns:
        raise RequestError("the chat template has no such role", got="'assistant'")
    pieces = [Piece(spec.turns["assistant"].footer, False)]
    for message in messages:
        pieces += turn_pieces(spec, message)
    return [*pieces, Piece(spec.generation, False)]


def _check_order(dialogue: Sequence[Message], add_generation: bool) -> None:
    """Refuses orders of roles that the template was not compared with the reference on."""
    roles = [message.role for message in dialogue]
    wanted = ["assistant" if n % 2 else "user" for n in range(len(roles))]
    if not roles or roles != wanted or (add_generation and roles[-1] != "user"):
        raise RequestError(
            "the roles of the messages are out of order",
            got=", ".join(roles) or "no user message",
            wanted="user and assistant in turns, the user first"
            + (" and last" if add_generation else ""),
        )


def joined(pieces: Sequence[Piece]) -> str:
    """The text of all pieces."""
    return "".join(piece.text for piece in pieces)
