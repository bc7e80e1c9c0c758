"""Chat templates: compiled segments against jinja2 and transformers, refusals, hostile input."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette.errors import ConfigError
from lorgnette.export import chat_render
from lorgnette.export.chat_template import CompiledTemplate, compile_chat_template
from lorgnette.runtime.turns import ImagePart, Message, joined, prompt_pieces
from lorgnette.spec import ImageTemplate, PromptSpec, TurnTemplate

# The public template of SmolVLM-Instruct; the Base models differ in two places.
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SMOLVLM_BASE = SMOLVLM.replace(
    "{{message['role'] | capitalize}}", "{{message['role'].capitalize()}}"
).replace("<end_of_utterance>", "<|endoftext|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{{ bos_token + messages[0]['content'] + ' ' }}{% else %}{% set turns = messages %}"
    "{{ bos_token + 'A chat. ' }}{% endif %}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def compiled(template: str, **tokens: str) -> CompiledTemplate:
    return compile_chat_template(
        template, "<image>", where="chat_template.json", special_tokens=tokens
    )


@pytest.fixture(scope="module")
def smolvlm() -> CompiledTemplate:
    return compiled(SMOLVLM)


def turn(header: str, image_first: str, footer: str) -> TurnTemplate:
    return TurnTemplate(header=header, header_image_first=image_first, footer=footer)


def test_smolvlm_compiles_to_its_published_text(smolvlm: CompiledTemplate) -> None:
    assert smolvlm.prefix == "<|im_start|>"
    assert smolvlm.generation == "Assistant:"
    assert smolvlm.turns == {
        role: turn(f"{role.capitalize()}: ", f"{role.capitalize()}:", "<end_of_utterance>\n")
        for role in ("system", "user", "assistant")
    }
    assert smolvlm.content == "parts"
    assert smolvlm.left_out == {}


def test_smolvlm_base_ends_turns_with_endoftext() -> None:
    base = compiled(SMOLVLM_BASE)
    assert base.turns["user"] == turn("User: ", "User:", "<|endoftext|>\n")


# The same with every block on a line of its own: line ends and indents around blocks are no text.
SMOLVLM_LINES = """\
<|im_start|>{% for message in messages %}
    {% set first = message['content'][0] %}
{{message['role'] | capitalize}}{% if first['type'] == 'image' %}
{{':'}}
    {%- else %}
{{': '}}
    {%- endif %}
    {% for line in message['content'] %}
        {% if line['type'] == 'text' %}
{{line['text']}}
        {%- elif line['type'] == 'image' %}
{{ '<image>' }}
        {%- endif %}
    {% endfor %}
<end_of_utterance>
{% endfor %}
{% if add_generation_prompt %}
Assistant:
    {%- endif %}
"""


def test_line_ends_around_blocks_are_no_text(smolvlm: CompiledTemplate) -> None:
    assert compiled(SMOLVLM_LINES) == smolvlm


def test_generation_tags_render_like_their_content(smolvlm: CompiledTemplate) -> None:
    tagged = SMOLVLM.replace("{% for line in", "{% generation %}{% for line in", 1).replace(
        "{% endfor %}<end_of", "{% endfor %}{% endgeneration %}<end_of", 1
    )
    assert compiled(tagged) == smolvlm


def test_chatml_takes_string_content() -> None:
    chatml = compiled(CHATML)
    assert chatml.content == "text"
    assert chatml.prefix == ""
    assert chatml.turns["system"] == turn(
        "<|im_start|>system\n", "<|im_start|>system\n", "<|im_end|>\n"
    )
    assert chatml.generation == "<|im_start|>assistant\n"


def test_vicuna_compiles_without_the_system_role_and_says_why() -> None:
    vicuna = compiled(VICUNA, bos_token="<s>", eos_token="</s>")
    assert vicuna.prefix == "<s>A chat. "
    assert vicuna.turns == {
        "user": turn("USER: ", "USER: ", " "),
        "assistant": turn("ASSISTANT: ", "ASSISTANT: ", "</s>"),
    }
    assert "A chat" in vicuna.left_out["system"]


def test_special_tokens_that_are_not_given_are_named() -> None:
    with pytest.raises(ConfigError, match="bos_token, eos_token"):
        compiled(VICUNA)


def test_roles_can_be_left_out() -> None:
    users = compile_chat_template(SMOLVLM, "<image>", ("user", "assistant"), where="t")
    assert sorted(users.turns) == ["assistant", "user"]
    with pytest.raises(ConfigError, match="roles"):
        compile_chat_template(SMOLVLM, "<image>", ("user",), where="t")


texts = st.text(st.sampled_from("ab \n\t{}%#<>:'\"\\é😀"), max_size=12)
contents = st.lists(st.one_of(texts, st.just(ImagePart())), min_size=1, max_size=4)
dialogues = st.lists(contents, min_size=1, max_size=5)


@given(dialogue=dialogues, system=st.none() | contents, generation=st.booleans())
@settings(max_examples=60, deadline=None)
def test_segments_equal_transformers_on_any_conversation(
    smolvlm: CompiledTemplate,
    dialogue: list[list[str | ImagePart]],
    system: list[str | ImagePart] | None,
    generation: bool,
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    generation = generation and len(dialogue) % 2 == 1
    messages = [
        Message("assistant" if n % 2 else "user", tuple(content))
        for n, content in enumerate(dialogue)
    ]
    if system is not None:
        messages.insert(0, Message("system", tuple(system)))
    chat = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in message.content
            ],
        }
        for message in messages
    ]
    rendered: Any = render_jinja_template(
        conversations=[chat], chat_template=SMOLVLM, add_generation_prompt=generation
    )
    wanted = rendered[0][0]
    assert joined(prompt_pieces(prompt_spec(smolvlm), messages, generation)) == wanted


def prompt_spec(template: CompiledTemplate) -> PromptSpec:
    image = ImageTemplate(
        image_token="<image>",
        tokens_per_tile=1,
        tile="",
        row_end="",
        thumbnail="",
        single="{image}",
    )
    return PromptSpec(
        prefix=template.prefix,
        turns=template.turns,
        generation=template.generation,
        image=image,
        stop_token_ids=(),
    )


# Templates that do more than put fixed text around messages, and the part of the conversation
# that must be named.
MORE_THAN_SEGMENTS = {
    "trims": (CHATML.replace("message['content']", "message['content'] | trim"), r"user\[' '\]"),
    "numbers turns": (CHATML.replace("'\n' + ", "loop.index|string + "), "user"),
    "pictures first": (
        "{% for m in messages %}{{ m.role }}:{% for c in m.content if c.type == 'image' %}<image>"
        "{% endfor %}{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %};"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        r"user\['look:', picture\]",
    ),
    "drops old turns": (CHATML.replace("in messages", "in messages[-4:]"), "user.*assistant.*user"),
    "drops empty": (
        CHATML.replace("{{ '<", "{% if message['content'] %}{{ '<", 1).replace(
            "'\n' }}", "'\n' }}{% endif %}", 1
        ),
        r"user\[''\]",
    ),
    "other end when last": (
        CHATML.replace("+ '<|im_end|>'", "+ ('' if loop.last else '<|im_end|>')"),
        "user",
    ),
    "no content": ("hello", "user"),
    "empty": ("", "user"),
    "escapes": (CHATML.replace("message['content']", "message['content'] | e"), "user"),
    "date": ("{{ strftime_now('%d %b') }}" + CHATML, "depends on the date"),
    "always raises": ("{{ raise_exception('no chat here') }}", "no chat here"),
    "no such name": ("{{ messages.nothing.there }}", "nothing"),
    "includes": ("{% include 'other' %}", "loader"),
}


@pytest.mark.parametrize("name", MORE_THAN_SEGMENTS)
def test_other_templates_are_refused_with_the_conversation(name: str) -> None:
    template, named = MORE_THAN_SEGMENTS[name]
    with pytest.raises(ConfigError, match=named) as caught:
        compiled(template)
    assert caught.value.where == "chat_template.json"


REFUSED_UNSEEN = {
    "syntax": ("line one\n{% for %}", r"line 2"),
    "unknown tag": ("{% frobnicate %}", r"line 1"),
    "unknown filter": ("\n\n{{ messages | frobnicate }}", r"line 3"),
    "unclosed": ("{% for m in messages %}", r"line 1"),
    "private attribute": ("{{ messages.__class__.__mro__ }}", "line 1.*private"),
    "private on namespace": (
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "__class__",
    ),
    "random filter": (CHATML + "{{ ['a', 'b'] | random }}", "another text each time"),
    "lipsum": ("{{ lipsum() }}", "another text each time"),
}


@pytest.mark.parametrize("name", REFUSED_UNSEEN)
def test_what_the_source_shows_is_refused_with_its_line(name: str) -> None:
    template, named = REFUSED_UNSEEN[name]
    with pytest.raises(ConfigError, match=named):
        compiled(template)


HOSTILE = {
    "endless loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "endless fold": "{{ 9 ** (9 ** 9) }}",
    "endless calls": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}"
    ),
    "huge range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "huge output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "huge piece": "{{ 'x' * 10 ** 11 }}",
    "huge format": "{{ '%99999999999d' % 1 }}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep nesting": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "attribute by filter": "{{ (messages | attr('__class__')).__mro__ }}",
    "attribute by format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "attribute by name": "{{ messages['__class__']['__mro__'] }}",
    "changes messages": "{{ messages.append(1) }}",
}
HOSTILE_ENDS = {
    "endless loop": "does not finish",
    "endless fold": "does not finish",
    "endless calls": "does not finish",
    "huge output": "too much text",
    "endless recursion": "too deep",
    "deep nesting": "too deep",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_render, "CPU_SECONDS", 1)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=HOSTILE_ENDS.get(name)):
        compiled(HOSTILE[name])
    assert time.monotonic() - begun < 30


def test_the_clock_stops_what_uses_no_processor_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_render, "WALL_SECONDS", 1)
    monkeypatch.setattr(chat_render, "CPU_SECONDS", 1000)
    with pytest.raises(ConfigError, match="does not finish"):
        compiled(HOSTILE["endless loop"])


def test_limits_on_the_arguments() -> None:
    with pytest.raises(ConfigError, match="too long"):
        compiled("x" * (64 * 1024 + 1))
    with pytest.raises(ConfigError, match="image token"):
        compile_chat_template(SMOLVLM, "", where="t")
    with pytest.raises(ConfigError, match="not text"):
        compile_chat_template(["a"], "<image>", where="t")  # type: ignore[arg-type]
