"""The conversations that a chat template is compiled from and compared on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PICTURE = None
"""Stands for a picture among the parts of a message."""

Turn = tuple[str, tuple[str | None, ...]]
"""A role and its parts, text or `PICTURE`."""

_TEXTS = (
    "Hello",
    "",
    " ",
    "  two  spaces around  ",
    "\n\nfirst line\nsecond line\n",
    "tab\tand return\r\n",
    "{{ messages }} {% if x %} {# note #} {row}{image}",
    '<b>"it\'s" & \\n</b> %s $1',
    "Ärger: 日本語 😀 é",
    "Assistant: user",
    "1",
)

_SHAPES: tuple[tuple[str | None, ...], ...] = (
    (PICTURE,),
    (PICTURE, "what is it?"),
    (PICTURE, " what is it?"),
    ("look:", PICTURE),
    ("look: ", PICTURE, "\nwhat is it?"),
    (PICTURE, PICTURE),
    (PICTURE, PICTURE, "compare"),
    ("first", PICTURE, "second", PICTURE, "third"),
    ("one", "two"),
    ("", PICTURE),
    (PICTURE, ""),
    ("a", PICTURE, PICTURE, PICTURE, "b"),
)


@dataclass(frozen=True)
class Chat:
    """A conversation to render.

    Attributes:
        turns: Roles and their parts.
        generation: Whether the model is to answer next.
    """

    turns: tuple[Turn, ...]
    generation: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles in order."""
        return tuple(role for role, _ in self.turns)

    def __str__(self) -> str:
        """Names the conversation in an error message."""
        turns = [
            f"{role}[{', '.join('picture' if part is PICTURE else repr(part) for part in parts)}]"
            for role, parts in self.turns
        ]
        return " ".join(turns) + (" + generation" if self.generation else "")

    def messages(self, style: str, image_token: str) -> list[dict[str, object]]:
        """The conversation as a template takes it, by `parts` or as one `text` a message."""
        return [
            {"role": role, "content": _content(parts, style, image_token)}
            for role, parts in self.turns
        ]


class SentinelChats(NamedTuple):
    """Conversations whose every text is a sentinel: what stands between them are the segments."""

    one: Chat
    two: Chat
    three: Chat
    generating: Chat
    user_picture: Chat
    answer_picture: Chat
    system: Chat
    system_picture: Chat


def sentinel_chats() -> SentinelChats:
    """The conversations to derive segments from."""
    first, second, third = "zq0qz", "zq1qz", "zq2qz"
    user: Turn = ("user", (first,))
    answer: Turn = ("assistant", (second,))
    return SentinelChats(
        one=Chat((user,)),
        two=Chat((user, answer)),
        three=Chat((user, answer, ("user", (third,)))),
        generating=Chat((user,), generation=True),
        user_picture=Chat((("user", (PICTURE, first)),)),
        answer_picture=Chat((user, ("assistant", (PICTURE, second)))),
        system=Chat((("system", (second,)), user)),
        system_picture=Chat((("system", (PICTURE, second)), user)),
    )


def family(*, with_system: bool) -> list[Chat]:
    """The conversations to compare on: every text and shape in every place, and long ones."""
    contents = [(text,) for text in _TEXTS] + list(_SHAPES)
    chats: list[Chat] = []
    for content in contents:
        for turns in _places(content, with_system):
            chats.append(Chat(turns))
            if turns[-1][0] == "user":
                chats.append(Chat(turns, generation=True))
    for count in (5, 12):
        turns = tuple(
            ("assistant" if n % 2 else "user", contents[(5 * n + count) % len(contents)])
            for n in range(count)
        )
        chats += [Chat(turns), Chat(turns[:-1] if count % 2 == 0 else turns, generation=True)]
    return chats


def _places(content: tuple[str | None, ...], with_system: bool) -> list[tuple[Turn, ...]]:
    """The content in every place of a short conversation."""
    user: Turn = ("user", content)
    places: list[tuple[Turn, ...]] = [
        (user,),
        (("user", ("Hi",)), ("assistant", content)),
        (("user", ("Hi",)), ("assistant", content), ("user", ("Go on.",))),
        (("user", ("Hi",)), ("assistant", ("Hello.",)), user),
    ]
    if with_system:
        places.append((("system", content), ("user", ("Hi",))))
        places.append((("system", ("Be brief.",)), user, ("assistant", ("Yes.",)), user))
    return places


def _content(parts: tuple[str | None, ...], style: str, image_token: str) -> object:
    """One message's content in either style."""
    if style == "text":
        return "".join(image_token if part is PICTURE else part for part in parts)
    return [
        {"type": "image"} if part is PICTURE else {"type": "text", "text": part} for part in parts
    ]
