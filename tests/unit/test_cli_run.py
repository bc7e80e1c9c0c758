"""`lorgnette run`: answers, streams, conversations and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import lorgnette
from lorgnette.cli.main import cli
from lorgnette.runtime.generation import Request
from tests.unit.cli_helpers import bundle, call, changed_bundle, document, picture, process, start

QUESTION = "What do you see?"
SLOW = """
import sys, time
from lorgnette.runtime.engines.onnx import OnnxEngine
embed = OnnxEngine.embed
def slow(self, ids):
    if len(ids) == 1:
        sys.stderr.write("token\\n"); sys.stderr.flush(); time.sleep(0.03)
    return embed(self, ids)
OnnxEngine.embed = slow
"""
"""Makes every token of an answer take its time and tell of itself on stderr."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture(tmp_path_factory.mktemp("picture"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose answers do not end by themselves before the context is full."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["prompt"]["stop_token_ids"] = [0]

    return changed_bundle(tmp_path_factory.mktemp("endless"), change)


def test_json_holds_the_same_answer_as_the_python_interface(image: Path) -> None:
    told = document("run", bundle(), "--image", image, "--prompt", QUESTION)
    answer = lorgnette.open(bundle()).generate(image, QUESTION).result()
    assert told["text"] == answer.text
    assert tuple(told["token_ids"]) == answer.token_ids
    assert told["finish_reason"] == answer.finish_reason
    assert (told["prompt_tokens"], told["image_tokens"]) == (
        answer.prompt_tokens,
        answer.image_tokens,
    )
    assert told["tiles"] == answer.tiles > 1
    assert set(told["timings_ms"]) == {"load", "preprocess", "vision", "prefill", "decode", "ttft"}
    assert all(value >= 0 for value in told["timings_ms"].values())
    assert told["timings_ms"]["ttft"] >= told["timings_ms"]["vision"] > 0
    assert told["peak_rss_bytes"] > 2**20
    assert told["decode_tokens_per_s"] >= 0
    assert told["bundle"]["quant"] == "int4"
    assert told["bundle"]["target"] == "onnx-cpu"


def test_the_answer_is_all_that_stdout_gets(image: Path) -> None:
    code, out, err = process("run", bundle(), "--image", image, "--prompt", QUESTION)
    told = document("run", bundle(), "--image", image, "--prompt", QUESTION)
    assert (code, err) == (0, b"")
    assert out.decode() == told["text"] + "\n"


def test_stats_are_one_line_on_stderr() -> None:
    result = call("run", bundle(), "--prompt", QUESTION, "--max-new-tokens", "3", "--stats")
    assert result.exit_code == 0
    assert result.stderr.count("\n") == 1
    for word in ("load", "first token", "tokens at", "peak memory", "ended by"):
        assert word in result.stderr


def test_settings_reach_the_sampler() -> None:
    drawn = ("--temperature", 3, "--top-k", 50, "--top-p", 0.95, "--repetition-penalty", 1.2)
    common = ("run", bundle(), "--prompt", QUESTION, "--max-new-tokens", 12, *drawn)
    told = document(*common, "--seed", 7, "--threads", 1)
    answer = lorgnette.open(bundle(), threads=1).generate(
        (),
        QUESTION,
        max_new_tokens=12,
        temperature=3,
        top_k=50,
        top_p=0.95,
        repetition_penalty=1.2,
        seed=7,
    )
    assert tuple(told["token_ids"]) == answer.result().token_ids
    assert document(*common, "--seed", 8)["token_ids"] != told["token_ids"]


def test_a_stop_string_ends_the_answer(endless: Path) -> None:
    common = ("run", endless, "--prompt", QUESTION, "--max-new-tokens", 40, "--temperature", 50)
    text = document(*common)["text"]
    middle = text[len(text) // 2]
    told = document(*common, "--stop", middle)
    assert told["finish_reason"] == "stop_string"
    assert told["text"] == text[: text.index(middle)]


def test_the_question_may_come_from_stdin() -> None:
    args = ["run", str(bundle()), "--prompt", "-", "--json"]
    result = CliRunner().invoke(cli, args, input=QUESTION + "\n")
    wanted = document("run", bundle(), "--prompt", QUESTION)
    told = json.loads(result.stdout)
    assert (told["text"], told["prompt_tokens"]) == (wanted["text"], wanted["prompt_tokens"])


def test_a_question_that_is_not_text_is_refused() -> None:
    result = CliRunner().invoke(cli, ["run", str(bundle()), "--prompt", "-"], input=b"\xff\xfe")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the question is not UTF-8")


def test_a_chat_answers_every_line_and_remembers(image: Path) -> None:
    args = ["run", str(bundle()), "--chat", "--image", str(image), "--max-new-tokens", "6"]
    lines = f"{QUESTION}\n\nAnd where?\n"
    told = json.loads(CliRunner().invoke(cli, [*args, "--json"], input=lines).stdout)
    chat = lorgnette.open(bundle()).chat()
    request = lorgnette.runtime.generation.Request(max_new_tokens=6)
    first = chat.send(QUESTION, (image,), request).result()
    second = chat.send("And where?", (), request).result()
    assert [answer["text"] for answer in told["answers"]] == [first.text, second.text]
    assert told["answers"][1]["prompt_tokens"] == second.prompt_tokens > first.prompt_tokens
    assert told["answers"][1]["tiles"] == 0
    plain = CliRunner().invoke(cli, [*args, "--prompt", QUESTION], input="And where?\n")
    assert plain.stdout == f"{first.text}\n{second.text}\n"


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--prompt", "-", "--chat"],
        ["--prompt", "x", "--max-new-tokens", "many"],
        ["--prompt", "x", "--nonesuch"],
    ],
)
def test_wrong_usage_is_exit_2_and_a_document_with_json(args: list[str]) -> None:
    result = call("run", bundle(), *args, "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "UsageError"
    assert error["message"] in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["--max-new-tokens", "0"],
        ["--temperature", "nan"],
        ["--top-k", "-1"],
        ["--top-p", "0"],
        ["--threads", "0"],
        ["--seed", "-1"],
        ["--stop", ""],
    ],
)
def test_settings_out_of_range_are_one_line_and_exit_2(args: list[str]) -> None:
    result = call("run", bundle(), "--prompt", "x", *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.fixture
def slow_answer(endless: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the middle of an answer."""
    common = ["run", endless, "--prompt", QUESTION, "--max-new-tokens", 900, "--temperature", 50]
    child = start([*common, *getattr(request, "param", ())], before=SLOW)
    assert child.stderr is not None
    for _ in range(8):
        assert child.stderr.readline() == b"token\n"
    yield child
    child.kill()
    child.communicate()


def test_ctrl_c_ends_the_answer_and_keeps_the_text(slow_answer: subprocess.Popen[bytes]) -> None:
    slow_answer.send_signal(signal.SIGINT)
    out, err = slow_answer.communicate(timeout=20)
    assert slow_answer.returncode == 130
    assert len(out) > 1
    assert out.endswith(b"\n")
    assert set(err.split(b"\n")) <= {b"token", b""}
    assert err.count(b"token") < 100


@pytest.mark.parametrize("slow_answer", [["--json"]], indirect=True)
def test_ctrl_c_with_json_gives_the_document_so_far(slow_answer: subprocess.Popen[bytes]) -> None:
    slow_answer.send_signal(signal.SIGINT)
    out, _ = slow_answer.communicate(timeout=20)
    assert slow_answer.returncode == 130
    told = json.loads(out)
    assert told["finish_reason"] == "cancelled"
    assert 8 <= len(told["token_ids"]) < 100
    assert told["text"]


def test_a_reader_that_goes_away_ends_it_quietly(slow_answer: subprocess.Popen[bytes]) -> None:
    assert slow_answer.stdout is not None
    assert slow_answer.stdout.read(1)
    slow_answer.stdout.close()
    _, err = slow_answer.communicate(timeout=20)
    assert slow_answer.returncode == 141
    assert set(err.split(b"\n")) <= {b"token", b""}


def test_ctrl_c_in_a_chat_on_a_terminal_ends_the_answer_alone(endless: Path) -> None:
    leader, follower = os.openpty()
    args = ["run", endless, "--chat", "--max-new-tokens", 100, "--temperature", 50]
    child = start(args, before=SLOW, stdin=follower)
    os.close(follower)
    assert child.stderr is not None
    for question in (b"What is it?\n", b"And where?\n"):
        os.write(leader, question)
        for _ in range(5):
            assert child.stderr.readline().endswith(b"token\n")
        child.send_signal(signal.SIGINT)
    os.write(leader, b"\x04")  # the end of the input
    out, err = child.communicate(timeout=20)
    os.close(leader)
    assert child.returncode == 0
    assert out.count(b"\n") >= 2
    assert err.endswith(b"> \n")


def test_ctrl_c_before_the_answer_is_exit_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorgnette.runtime.model.open_model", interrupted)
    result = call("run", bundle(), "--prompt", QUESTION, "--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["error"]["type"] == "Interrupted"


def test_what_steers_a_terminal_never_reaches_one(endless: Path) -> None:
    """Byte tokens let a model write any escape sequence; a pipe gets it as it is."""
    leader, follower = os.openpty()
    args = ["run", endless, "--prompt", QUESTION, "--max-new-tokens", 300, "--temperature", 10000]
    child = start(args, stdout=follower)
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 4096):
            shown += part
    except OSError:  # how Linux tells that the other end is closed
        pass
    os.close(leader)
    assert child.wait(timeout=60) == 0
    child.communicate()
    assert len(shown) > 100
    control = {byte for byte in shown if byte < 32 or byte == 127} - set(b"\t\r\n")
    assert not control


@pytest.fixture(scope="module")
def with_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a fixed request and pictures of one tile."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["preprocess"]["split"] = False
        manifest["prompt"]["tasks"] = {"ocr": "Read {image} aloud."}

    return changed_bundle(tmp_path_factory.mktemp("tasks"), change)


def test_a_task_needs_no_prompt(with_task: Path, image: Path) -> None:
    told = document("run", with_task, "--image", image, "--task", "ocr", "--max-new-tokens", 3)
    options = {"task": "ocr", "max_new_tokens": 3}
    answer = lorgnette.open(with_task).generate(image, **options).result()  # type: ignore[arg-type]
    assert (told["text"], tuple(told["token_ids"])) == (answer.text, answer.token_ids)
    assert (told["tiles"], told["prompt_tokens"]) == (1, answer.prompt_tokens)


def test_a_task_may_begin_a_chat(with_task: Path, image: Path) -> None:
    options = ["run", str(with_task), "--image", str(image), "--task", "ocr", "--chat", "--json"]
    told = CliRunner().invoke(cli, [*options, "--max-new-tokens", "2"], input="And where?\n")
    answers = json.loads(told.stdout)["answers"]
    chat = lorgnette.open(with_task).chat()
    request = Request(max_new_tokens=2)
    first = chat.send(images=(image,), request=request, task="ocr").result()
    second = chat.send("And where?", (), request).result()
    assert [answer["token_ids"] for answer in answers] == [
        list(first.token_ids),
        list(second.token_ids),
    ]


def test_a_task_that_cannot_be_is_wrong_input(with_task: Path, image: Path) -> None:
    for options, message in (
        (("--task", "ocr", "--prompt", QUESTION, "--image", image), "give one of them"),
        (("--task", "ocr"), "a task is about one picture"),
        (("--task", "find", "--image", image), "got 'find', wanted ocr"),
    ):
        result = call("run", with_task, *options)
        assert result.exit_code == 2
        assert message in result.stderr
    result = call("run", bundle(), "--task", "ocr", "--image", image)
    assert result.exit_code == 2
    assert "the model has no tasks" in result.stderr
