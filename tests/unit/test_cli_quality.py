"""`lorgnette verify --quality`: recorded, measured, broken promises, and wrong usage."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from lorgnette.cli import output
from lorgnette.quantize import samples as samples_module
from tests.unit.cli_helpers import ZOO, call, changed_checkpoint, document, start
from tests.unit.test_quality_metrics import SUMMARY
from tests.zoo.questions import HELD_OUT, draw_sample

PLAN = """
name = "mine"
[[rule]]
select = "token_embedding/*"
bits = 32
[[rule]]
select = "*"
bits = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    """A bundle of a plan that promises nothing."""
    (folder / "plan.toml").write_text(PLAN)
    path = folder / "mine.lorg"
    document("export", ZOO, "--plan", folder / "plan.toml", "--out", path)
    return path


@pytest.fixture(scope="module")
def zoo(folder: Path) -> Path:
    """Six held-out pictures with questions."""
    path = folder / "held-out"
    path.mkdir()
    lines = []
    for n in range(6):
        drawn = draw_sample(HELD_OUT, n)
        drawn.scene.image.save(path / f"{n}.png")
        asked = drawn.question
        lines.append({"image": f"{n}.png", "question": asked.text, "answer": asked.answer})
    (path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def with_manifest(bundle: Path, target: Path, **changes: Any) -> Path:
    """A copy of a bundle with other parts of the manifest."""
    shutil.copytree(bundle, target)
    manifest = json.loads((bundle / "manifest.json").read_text())
    for key, value in changes.items():
        manifest[key] = {**value(manifest[key])} if callable(value) else value
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


@pytest.fixture
def promising(bundle: Path, tmp_path: Path) -> Path:
    """The bundle, of a plan that promises what no four bits can keep."""

    def change(recipe: Any) -> Any:
        return {**recipe, "plan": {**recipe["plan"], "max_kl": 1e-12}}

    return with_manifest(bundle, tmp_path / "promising.lorg", recipe=change)


def test_it_is_measured_against_the_checkpoint(bundle: Path, zoo: Path) -> None:
    told = document("verify", bundle, "--quality", "--against", ZOO, "--samples", zoo)
    assert told["against"] == str(ZOO)
    quality = told["quality"]
    assert (quality["samples"], quality["skipped"], quality["sample_set"]) == (6, 0, "held-out")
    assert 1e-6 < quality["kl_mean"] < 0.1
    assert quality["kl_mean"] <= quality["kl_max"]
    assert quality["original_exact_match"] > 0.8
    assert quality["promise"] is None
    assert [sample["name"] for sample in told["samples"]] == [f"{n}.png" for n in range(6)]
    assert told["samples"][0]["original"] == told["samples"][0]["given"]
    assert told["html"] is None
    assert told["plan"] == "mine"
    names = {(tensor["component"], tensor["name"]) for tensor in told["tensors"]}
    assert ("decoder", "head.weight") in names
    assert not {name for name in names if name[0] == "token_embedding"}
    assert {tensor["scheme"] for tensor in told["tensors"]} == {"int4g32"}


def test_people_get_lines_and_a_report(bundle: Path, zoo: Path, tmp_path: Path) -> None:
    html = tmp_path / "report.html"
    result = call(
        *("verify", bundle, "--quality", "--against", ZOO, "--samples", zoo / "samples.jsonl"),
        *("--count", 2, "--html", html),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("questions ")
    assert "2 of set samples.jsonl; " in lines[0]
    assert [line.split("  ")[0] for line in lines] == [
        "questions",
        "KL divergence",
        "same token likeliest",
        "same answer",
        "image tokens",
        "exact match",
    ]
    told = "".join(ElementTree.fromstring(html.read_bytes()).itertext())
    assert draw_sample(HELD_OUT, 1).question.text in told
    assert "plan mine" in told


def test_the_set_of_the_package_is_taken_where_none_is_given(
    bundle: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "default_samples", lambda: zoo)
    told = document("verify", bundle, "--quality", "--against", ZOO, "--count", 1)
    assert told["quality"]["sample_set"] == "default"
    assert told["quality"]["samples"] == 1


def test_what_the_export_recorded_is_shown(bundle: Path, tmp_path: Path) -> None:
    quality = msgspec.to_builtins(SUMMARY)
    recorded = with_manifest(bundle, tmp_path / "recorded.lorg", quality=quality)
    told = document("verify", recorded, "--quality")
    assert told["quality"] == quality
    assert told["against"] is None
    assert set(told["kept_in_float"]) == {"vision_encoder", "token_embedding", "decoder"}
    result = call("verify", recorded, "--quality")
    assert result.exit_code == 0
    assert "3 of set mine, 1 left out: too long; 9 tokens compared" in result.stdout


def test_a_bundle_that_records_none_says_what_to_do(bundle: Path, tmp_path: Path) -> None:
    bare = with_manifest(bundle, tmp_path / "bare.lorg", quality=None)
    result = call("verify", bare, "--quality")
    assert result.exit_code == 2
    assert "records no quality" in result.stderr
    assert "--against" in result.stderr


def test_a_broken_promise_is_exit_1(promising: Path, zoo: Path, tmp_path: Path) -> None:
    html = tmp_path / "report.html"
    command = ("verify", promising, "--quality", "--against", ZOO, "--samples", zoo)
    result = call(*command, "--json", "--html", html)
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["error"]["type"] == "VerifyError"
    assert told["quality"]["promise"]["kept"] is False
    assert html.is_file(), "the report is wanted most where something is wrong"
    result = call(*command, "--count", 1)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the promise of the plan is broken in ")
    assert "wanted mean KL divergence <= 1e-12, same answer >= 0.00%" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout.splitlines()[-1].endswith(": broken")


def test_a_recorded_broken_promise_is_exit_1(bundle: Path, tmp_path: Path) -> None:
    promise = {"max_kl": 1e-5, "min_same_answer": 0.9, "kept": False, "accepted_loss": True}
    quality = {**msgspec.to_builtins(SUMMARY), "promise": promise}
    result = call(
        "verify", with_manifest(bundle, tmp_path / "a.lorg", quality=quality), "--quality"
    )
    assert result.exit_code == 1
    assert "broken (accepted at export)" in result.stdout
    assert "got mean KL divergence 0.0001, same answer 100.00%" in result.stderr


def test_what_the_zoo_promises_and_keeps_is_exit_0(bundle: Path, zoo: Path, tmp_path: Path) -> None:
    def change(recipe: Any) -> Any:
        return {**recipe, "plan": {**recipe["plan"], "max_kl": 0.5, "min_same_answer": 0.0}}

    kept = with_manifest(bundle, tmp_path / "kept.lorg", recipe=change)
    told = document("verify", kept, "--quality", "--against", ZOO, "--samples", zoo, "--count", 2)
    assert told["quality"]["promise"]["kept"] is True


@pytest.mark.parametrize(
    "wrong",
    [
        ("--samples", "x"),
        ("--count", "3"),
        ("--html", "x"),
        ("--quality", "--samples", "x"),
        ("--quality", "--count", "3"),
        ("--quality", "--html", "x"),
        ("--against", ZOO, "--samples", "x"),
        ("--quality", "--against", ZOO, "--image", "x"),
        ("--quality", "--against", ZOO, "--count", "0"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    bundle: Path, wrong: tuple[object, ...]
) -> None:
    result = call("verify", bundle, *wrong)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_samples_that_cannot_be_used_are_wrong_input(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"image": "../x.png", "question": "?"}\n')
    result = call("verify", bundle, "--quality", "--against", ZOO, "--samples", tmp_path)
    assert result.exit_code == 2
    assert "line 1" in result.stderr
    assert result.stderr.count("\n") == 1


def test_another_model_is_wrong_input(bundle: Path, zoo: Path, tmp_path: Path) -> None:
    other = changed_checkpoint(
        tmp_path, "config.json", lambda config: config["text_config"].update(rms_norm_eps=0.5)
    )
    result = call("verify", bundle, "--quality", "--against", other, "--samples", zoo)
    assert result.exit_code == 2
    assert "text.norm_eps 0.5 instead of" in result.stderr


def test_a_report_needs_its_extra_and_json_does_not(
    bundle: Path, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(output.EXTRA_MODULES, "report", ("no_such_module",))
    command = ("verify", bundle, "--quality", "--against", ZOO, "--samples", zoo, "--count", 1)
    result = call(*command, "--html", tmp_path / "a.html")
    assert result.exit_code == 2
    assert "pip install 'lorgnette[report]'" in result.stderr
    assert result.stderr.count("\n") == 1
    assert document(*command)["quality"]["samples"] == 1


def test_a_report_into_no_folder_is_told_before_the_work(
    bundle: Path, zoo: Path, tmp_path: Path
) -> None:
    result = call(
        *("verify", bundle, "--quality", "--against", ZOO, "--samples", zoo),
        *("--html", tmp_path / "none" / "a.html"),
    )
    assert result.exit_code == 2
    assert "no such folder" in result.stderr


def test_a_terminal_sees_progress_and_matplotlib_is_not_loaded(bundle: Path, zoo: Path) -> None:
    leader, follower = os.openpty()
    child = start(
        ["verify", bundle, "--quality", "--against", ZOO, "--samples", zoo, "--count", 3],
        before="import atexit, sys; atexit.register(lambda: print('matplotlib' in sys.modules))",
        stderr=follower,
    )
    os.close(follower)
    out, _ = child.communicate(timeout=120)
    told = os.read(leader, 8192).decode()
    os.close(leader)
    assert child.returncode == 0
    assert b"\r" not in out
    assert out.decode().splitlines()[-1] == "False"
    assert "read checkpoint ..." in told
    for what in ("original answers", "bundle answers"):
        assert f"\r{what} 3 of 3" in told
