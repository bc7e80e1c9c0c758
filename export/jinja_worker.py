"""Renders a chat template of unknown origin: a program of its own, run as a child process.

A template can loop for hours or fill the memory inside one expression (`9 ** 9 ** 9`), where no
check within the same process can stop it. So the one that compiles templates starts this file,
sends a request as JSON on stdin and reads the answer as JSON from stdout. Limits on processor
time, memory and output hold here; the parent also limits the time that passes.

It stands alone: only the standard library and jinja2, nothing of the package.

Request: `template`, `variables` (special tokens), `chats` (each `messages` and
`add_generation_prompt`), `limits` (`cpu_seconds`, `memory_bytes`, `output_chars`), `search_path`.
Answer: `{"refused": why, "line": number or null}` or `{"renders": [...]}` with `{"text": ...}` or
`{"error": why}` for each chat.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser


class RefusedError(Exception):
    """The template cannot be used, whatever the conversation."""

    def __init__(self, why: str, line: int | None = None) -> None:
        """Keeps the reason and the line of the template."""
        super().__init__(why)
        self.why = why
        self.line = line


def limit_process(limits: dict[str, int]) -> None:
    """Bounds processor time and memory where the system knows how (not on Windows)."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError):
            # Some systems know the limit and do not grant it; the parent's clock remains.
            continue


def make_environment() -> Environment:
    """The sandbox as transformers sets it up.

    Source: transformers 5.23, utils/chat_template_utils.py.
    """
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < (3, 1, 6):
        raise RefusedError(f"jinja2 {jinja2.__version__} has known holes in its sandbox (3.1.6)")

    class GenerationTag(jinja2.ext.Extension):
        """`{% generation %}` marks what the model wrote, for training; here it only renders."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_render")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _render(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> str:
        raise jinja2.TemplateError(f"the text depends on the date: strftime_now({pattern!r})")

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def check_source(environment: Environment, template: str, variables: dict[str, str]) -> None:
    """Refuses what the parsed template shows before it is run."""
    import jinja2
    from jinja2 import meta, nodes

    try:
        tree = environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise RefusedError(str(error.message), error.lineno) from error
    for node in tree.find_all(nodes.Node):
        if isinstance(node, (nodes.Getattr, nodes.NSRef)) and node.attr.startswith("_"):
            raise RefusedError(f"it reaches for the private attribute {node.attr!r}", node.lineno)
        if isinstance(node, (nodes.Name, nodes.Filter)) and node.name in ("lipsum", "random"):
            raise RefusedError(f"it gives another text each time ({node.name})", node.lineno)
    missing = sorted(
        name
        for name in meta.find_undeclared_variables(tree)
        if name.endswith("_token") and name not in variables
    )
    if missing:
        raise RefusedError(f"it needs special tokens that are not given: {', '.join(missing)}")


def render_all(request: dict[str, Any]) -> list[dict[str, str]]:
    """Renders every conversation; one that fails becomes an error of its own."""
    import jinja2

    environment = make_environment()
    check_source(environment, request["template"], request["variables"])
    try:
        template = environment.from_string(request["template"])
    except jinja2.TemplateSyntaxError as error:
        raise RefusedError(str(error.message), error.lineno) from error
    left = request["limits"]["output_chars"]
    renders: list[dict[str, str]] = []
    for chat in request["chats"]:
        try:
            text = _render(template, chat, request["variables"], left)
        except (RefusedError, MemoryError, RecursionError):
            raise
        except Exception as error:  # whatever a template can raise is its answer to this chat
            renders.append({"error": f"{type(error).__name__}: {error}"[:500]})
        else:
            left -= len(text)
            renders.append({"text": text})
    return renders


def _render(template: Template, chat: dict[str, Any], variables: dict[str, str], left: int) -> str:
    """One conversation, given up as soon as its text is too long."""
    parts: list[str] = []
    for part in template.generate(**{"tools": None, "documents": None, **variables, **chat}):
        left -= len(part)
        if left < 0:
            raise RefusedError("it renders to too much text")
        parts.append(part)
    return "".join(parts)


def main() -> int:
    """Answers the one request on stdin."""
    request = json.load(sys.stdin)
    sys.path += request["search_path"]
    limit_process(request["limits"])
    answer: dict[str, Any]
    try:
        answer = {"renders": render_all(request)}
    except RefusedError as error:
        answer = {"refused": error.why, "line": error.line}
    except (MemoryError, RecursionError) as error:
        answer = {"refused": f"it is too deep or too large ({type(error).__name__})", "line": None}
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
