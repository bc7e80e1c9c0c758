"""Compiles a chat template to fixed segments, or refuses it by name.

A chat template is a jinja2 program that came with the checkpoint. No runtime should carry a
template engine to a phone, and most templates only put fixed text around the messages. So the
template is used here as an oracle: it renders conversations made of sentinels, the text around
the sentinels becomes the segments, and the segments are then compared with the template on a
fixed family of other conversations, through the very code that renders prompts at run time.

Templates are foreign programs. They run in jinja2's sandbox in a child process with limits on
processor time, memory, output and, in case those are not to be had (Windows), on time passed.
Attributes beginning with an underscore are refused outright. See `jinja_worker.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorgnette.errors import ConfigError
from lorgnette.export.chat_probes import PICTURE, Chat, family, sentinel_chats
from lorgnette.export.chat_render import render_chats
from lorgnette.runtime.turns import ImagePart, Message, joined, prompt_pieces
from lorgnette.spec import ImageTemplate, PromptSpec, TurnTemplate

MAX_TEMPLATE_BYTES = 64 << 10
"""Longer templates are refused unread; the longest in use have about a third of it."""

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class CompiledTemplate:
    """A chat template as literals; the fields of `PromptSpec` and what was found on the way.

    Attributes:
        prefix: Before the first turn.
        turns: By role, the text around a message.
        generation: Makes the model answer.
        content: How the template takes a message: a list of `parts`, or one `text` in which the
            image token stands for a picture.
        left_out: Roles that were asked for and do not fit, with the reason.
    """

    prefix: str
    turns: dict[str, TurnTemplate]
    generation: str
    content: str = "parts"
    left_out: dict[str, str] = field(default_factory=dict)


class _MisfitError(Exception):
    """The template and the segments part ways at a conversation."""

    def __init__(self, chat: Chat, got: str, wanted: str, passed: int) -> None:
        super().__init__(str(chat))
        self.chat, self.got, self.wanted, self.passed = chat, got, wanted, passed


def compile_chat_template(
    template: str,
    image_token: str,
    roles: Sequence[str] = _ROLES,
    *,
    where: str,
    special_tokens: Mapping[str, str] | None = None,
) -> CompiledTemplate:
    """Compiles a chat template to the text around messages.

    Conversations are a system message or none, then user and assistant in turns; the runtime
    accepts no other. A template that has no use for system messages, or does more with them than
    put text around them, compiles without that role and says so in `left_out`.

    Args:
        template: The jinja2 source.
        image_token: What the template writes for a picture, e.g. `<image>`.
        roles: The roles to compile; `user` and `assistant` are needed.
        where: The file the template came from, for error messages.
        special_tokens: Variables such as `bos_token` that the tokenizer's config provides.

    Raises:
        ConfigError: The template is too long, is not jinja2 (the line is named), does not finish
            within the limits, or is more than fixed text around the messages (the first
            conversation that differs is named).
        MissingExtraError: jinja2 is not installed.
    """
    _check_arguments(template, image_token, roles, where)
    with_system = "system" in roles
    chats = [*sentinel_chats(), *family(with_system=with_system)]
    if not with_system:
        chats = [chat for chat in chats if "system" not in chat.roles]
    answers = render_chats(
        template, _requests(chats, image_token), dict(special_tokens or {}), where
    )
    misfits: list[_MisfitError] = []
    for number, style in enumerate(("parts", "text")):
        half = answers[number * len(chats) : (number + 1) * len(chats)]
        rendered = dict(zip(chats, half, strict=True))
        try:
            return _compile(rendered, image_token, style, with_system)
        except _MisfitError as misfit:
            misfits.append(misfit)
    nearest = max(misfits, key=lambda misfit: misfit.passed)
    raise ConfigError(
        f"the chat template is more than fixed text around messages: {nearest.chat} differs",
        where=where,
        got=nearest.got,
        wanted=nearest.wanted,
    )


def _compile(
    rendered: Mapping[Chat, dict[str, str]], image_token: str, style: str, with_system: bool
) -> CompiledTemplate:
    """Derives and verifies; once more without the system role where only that does not fit."""
    try:
        compiled = _derive(rendered, image_token, style, with_system)
        _verify(compiled, rendered, image_token)
    except _MisfitError as misfit:
        if not with_system or "system" not in misfit.chat.roles:
            raise
        others = {chat: text for chat, text in rendered.items() if "system" not in chat.roles}
        compiled = _compile(others, image_token, style, with_system=False)
        reason = f"{misfit.chat} differs: got {misfit.got}, wanted {misfit.wanted}"
        compiled.left_out["system"] = reason
    return compiled


def _derive(
    rendered: Mapping[Chat, dict[str, str]], image_token: str, style: str, with_system: bool
) -> CompiledTemplate:
    """Reads the segments off the sentinel conversations.

    In user, assistant, user the gaps between the sentinels are a footer and a header each. The
    ends of the shorter conversations are the footers; so the headers follow, then the prefix.
    """
    chats = sentinel_chats()

    def gaps(chat: Chat) -> list[str]:
        return _gaps(chat, _text(rendered, chat), image_token)

    user_footer, answer_footer = gaps(chats.one)[-1], gaps(chats.two)[-1]
    start, to_answer, to_user, _ = gaps(chats.three)
    user_header = _after(chats.three, to_user, answer_footer)
    prefix = _before(chats.three, start, user_header)
    turns = {
        "user": TurnTemplate(
            header=user_header,
            header_image_first=_after(chats.user_picture, gaps(chats.user_picture)[0], prefix),
            footer=user_footer,
        ),
        "assistant": TurnTemplate(
            header=_after(chats.three, to_answer, user_footer),
            header_image_first=_after(
                chats.answer_picture, gaps(chats.answer_picture)[1], user_footer
            ),
            footer=answer_footer,
        ),
    }
    generation = _after(chats.generating, gaps(chats.generating)[-1], user_footer)
    if with_system:
        start, to_user, _ = gaps(chats.system)
        turns["system"] = TurnTemplate(
            header=_after(chats.system, start, prefix),
            header_image_first=_after(chats.system_picture, gaps(chats.system_picture)[0], prefix),
            footer=_before(chats.system, to_user, user_header),
        )
    return CompiledTemplate(prefix, turns, generation, content=style)


def _verify(
    compiled: CompiledTemplate, rendered: Mapping[Chat, dict[str, str]], image_token: str
) -> None:
    """Compares the segments with the template, through the runtime's own code."""
    spec = PromptSpec(
        prefix=compiled.prefix,
        turns=compiled.turns,
        generation=compiled.generation,
        image=ImageTemplate(
            image_token=image_token,
            tokens_per_tile=1,
            tile="",
            row_end="",
            thumbnail="",
            single="{image}",
        ),
        stop_token_ids=(),
    )
    for passed, chat in enumerate(rendered):
        messages = [
            Message(role, tuple(ImagePart() if part is PICTURE else part for part in parts))
            for role, parts in chat.turns
        ]
        wanted = joined(prompt_pieces(spec, messages, chat.generation))
        got = _text(rendered, chat, passed)
        if got != wanted:
            at = next((n for n, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), 0)
            at = at or min(len(got), len(wanted))
            window = slice(max(0, at - 20), at + 40)
            raise _MisfitError(chat, repr(got[window]), repr(wanted[window]), passed)


def _text(rendered: Mapping[Chat, dict[str, str]], chat: Chat, passed: int = 0) -> str:
    """What the template made of a conversation; a misfit where it failed."""
    answer = rendered[chat]
    if "error" in answer:
        raise _MisfitError(chat, answer["error"], "text", passed)
    return answer["text"]


def _gaps(chat: Chat, text: str, image_token: str) -> list[str]:
    """The text before, between and after the parts of a sentinel conversation."""
    gaps: list[str] = []
    rest = text
    for _, parts in chat.turns:
        for part in parts:
            mark = image_token if part is PICTURE else part
            gap, found, rest = rest.partition(mark)
            if not found:
                raise _MisfitError(chat, repr(text[:200]), f"{mark!r} in its place", 0)
            gaps.append(gap)
    return [*gaps, rest]


def _after(chat: Chat, text: str, start: str) -> str:
    """The text without its start, which another conversation has shown."""
    if not text.startswith(start):
        raise _MisfitError(chat, repr(text), f"{start!r} at the start of it", 0)
    return text[len(start) :]


def _before(chat: Chat, text: str, end: str) -> str:
    """The text without its end, which another conversation has shown."""
    if not text.endswith(end):
        raise _MisfitError(chat, repr(text), f"{end!r} at the end of it", 0)
    return text[: len(text) - len(end)]


def _check_arguments(template: str, image_token: str, roles: Sequence[str], where: str) -> None:
    """Refuses what is wrong before anything is run."""
    if not isinstance(template, str):
        raise ConfigError(
            "the chat template is not text", where=where, got=type(template).__name__, wanted="str"
        )
    size = len(template.encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise ConfigError(
            "the chat template is too long",
            where=where,
            got=f"{size} bytes",
            wanted=f"{MAX_TEMPLATE_BYTES} bytes or less",
        )
    if not image_token:
        raise ConfigError("the image token is empty", where=where)
    if not {"user", "assistant"} <= set(roles) <= set(_ROLES):
        raise ConfigError(
            "these roles cannot be compiled",
            where=where,
            got=", ".join(roles),
            wanted="user and assistant, with system or without",
        )


def _requests(chats: Sequence[Chat], image_token: str) -> list[dict[str, object]]:
    """Every conversation in both styles, as the template takes it."""
    return [
        {
            "messages": chat.messages(style, image_token),
            "add_generation_prompt": chat.generation,
        }
        for style in ("parts", "text")
        for chat in chats
    ]
