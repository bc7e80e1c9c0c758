"""`lorgnette run`: pictures and a question to an answer, piece by piece."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from lorgnette.cli.output import Command, print_json, printable, size
from lorgnette.errors import EXIT_INTERRUPTED, RequestError

if TYPE_CHECKING:
    from lorgnette.runtime.generation import Generation, Request, Result
    from lorgnette.runtime.model import Model


@click.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A picture; repeatable.",
)
@click.option("--prompt", help="The question; - reads it from stdin.")
@click.option("--task", help="A fixed request of the model, e.g. ocr, in place of --prompt.")
@click.option("--system", help="A system message.")
@click.option("--chat", is_flag=True, help="Go on with questions from stdin, one a line.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--top-k", type=int, default=0, show_default=True, help="0 for all.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stop", multiple=True, help="Text that ends the answer; repeatable.")
@click.option("--threads", type=int, help="Threads of the engine.  [every core]")
@click.option(
    "--less-memory",
    is_flag=True,
    help="Free the vision encoder behind pictures, and read long prompts without further weights.",
)
@click.option("--stats", is_flag=True, help="Print timings on stderr, terminal or not.")
def run(
    bundle: Path,
    images: tuple[Path, ...],
    prompt: str | None,
    task: str | None,
    system: str | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seed: int,
    stop: tuple[str, ...],
    threads: int | None,
    less_memory: bool,
    stats: bool,
    as_json: bool,
) -> None:
    """Asks the model in BUNDLE about pictures; the answer appears as it is generated.

    Some models have tasks: fixed requests about one picture, which need no question.

    Ctrl-C ends the answer and keeps what is there. With --chat, pictures go with the first
    question, and an answer knows the ones before it; on a terminal, Ctrl-C then ends the answer
    and the conversation goes on.
    """
    if prompt is not None and task is not None:
        raise click.UsageError("--prompt and --task both say what to ask: give one of them")
    if prompt is None and task is None and not chat:
        raise click.UsageError("--prompt is missing (or --chat, to read questions from stdin)")
    if prompt == "-" and chat:
        raise click.UsageError("--prompt - and --chat both want stdin")
    from lorgnette.runtime.generation import Request
    from lorgnette.runtime.model import open_model
    from lorgnette.runtime.sampler import SamplingParams

    request = Request(
        max_new_tokens=max_new_tokens,
        sampling=SamplingParams(temperature, top_k, top_p, repetition_penalty, seed),
        stop=stop,
    )
    first = _read_stdin() if prompt == "-" else prompt
    # Not waited for: pictures are encoded while the decoder loads.
    model = open_model(
        bundle,
        threads=threads,
        keep_vision=not less_memory,
        prefill_weights=not less_memory,
        wait=False,
    )
    session = _Session(model, system, request, as_json, stats or sys.stderr.isatty())
    goes_on = chat and sys.stdin.isatty()  # where Ctrl-C ends an answer, not the conversation
    interrupted = False
    for question in questions("" if task is not None else first, chat):
        interrupted = session.ask(question, images, task) and not goes_on
        images, task = (), None
        if interrupted:
            break
    if as_json:
        print_json(session.document(chat))
    if interrupted:
        click.get_current_context().exit(EXIT_INTERRUPTED)


class _Session:
    """A conversation whose answers go to stdout."""

    def __init__(
        self, model: Model, system: str | None, request: Request, as_json: bool, stats: bool
    ) -> None:
        """Starts it."""
        self._model = model
        self._chat = model.chat(system)
        self._request = request
        self._as_json = as_json
        self._stats = stats
        self._answers: list[dict[str, Any]] = []

    def ask(self, question: str, images: tuple[Path, ...], task: str | None = None) -> bool:
        """Answers one question, or a task; tells whether Ctrl-C cut it short."""
        generation = self._chat.send(question, images, self._request, task=task)
        steered = sys.stdout.isatty()
        with _cancelled_by_interrupt(generation):
            for piece in generation:
                if not self._as_json:
                    click.echo(printable(piece) if steered else piece, nl=False)
                    sys.stdout.flush()
            result = generation.result()
        if not self._as_json:
            click.echo()
        if self._stats:
            click.echo(stats_line(result, self._model.load_ms), err=True)
        self._answers.append(answer_document(result, self._model))
        return result.finish_reason == "cancelled"

    def document(self, several: bool) -> dict[str, Any]:
        """What --json prints: the one answer, or the list of a chat."""
        return {"answers": self._answers} if several else self._answers[0]


def questions(first: str | None, chat: bool) -> Iterator[str]:
    """The first question and, in a chat, the lines of stdin; empty lines are passed over."""
    if first is not None:
        yield first
    while chat:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.buffer.readline()
        if not line:
            if sys.stdin.isatty():
                click.echo(err=True)  # behind the mark that waited for a question
            return
        if line.strip():
            yield _decode(line)


def answer_document(result: Result, model: Model) -> dict[str, Any]:
    """An answer as JSON."""
    from lorgnette.runtime.generation import peak_rss_bytes

    timings, recipe = result.timings, model.manifest.recipe
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "prompt_tokens": result.prompt_tokens,
        "prefilled_tokens": result.prefilled_tokens,
        "image_tokens": result.image_tokens,
        "tiles": result.tiles,
        "finish_reason": result.finish_reason,
        "timings_ms": {
            "load": round(model.load_ms, 3),
            "preprocess": round(timings.preprocess, 3),
            "vision": round(timings.vision, 3),
            "prefill": round(timings.prefill, 3),
            "decode": round(timings.decode, 3),
            "ttft": round(timings.ttft, 3),
        },
        "decode_tokens_per_s": round(result.decode_tokens_per_s, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "bundle": {
            "path": str(model.bundle.path),
            "checkpoint": model.manifest.checkpoint,
            "target": recipe.target,
            "quant": recipe.quant,
        },
    }


def stats_line(result: Result, load_ms: float) -> str:
    """Where the time went, in one line."""
    from lorgnette.runtime.generation import peak_rss_bytes

    peak = peak_rss_bytes()
    return ", ".join(
        [
            f"load {load_ms:.0f} ms",
            f"first token {result.timings.ttft:.0f} ms",
            f"{len(result.token_ids)} tokens at {result.decode_tokens_per_s:.1f}/s",
            f"peak memory {'unknown' if peak is None else size(peak)}",
            f"ended by {result.finish_reason}",
        ]
    )


@contextmanager
def _cancelled_by_interrupt(generation: Generation) -> Iterator[None]:
    """Makes the first Ctrl-C end the answer at its next token, and a second one what it was."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in a script's background
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return

    def cancel(_: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        generation.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _read_stdin() -> str:
    return _decode(sys.stdin.buffer.read())


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RequestError("the question is not UTF-8", where="stdin", got=error.reason) from error
