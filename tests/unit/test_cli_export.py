"""`lorgnette export`, and how a recipe comes together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from lorgnette.cli.export import build_recipe
from lorgnette.errors import ConfigError
from lorgnette.export.sample_set import Pictures
from lorgnette.recipe import Recipe
from tests.unit.cli_helpers import ZOO, bundle, call, export_document, process


def test_json_tells_what_stands_on_the_disk() -> None:
    made, told = bundle(), export_document()
    assert told["bundle"] == str(made)
    on_disk = {
        str(path.relative_to(made)): path.stat().st_size
        for path in made.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert {entry["path"]: entry["bytes"] for entry in told["files"]} == on_disk
    assert told["bytes"] == sum(on_disk.values())
    assert told["seconds"] > 0
    assert told["peak_rss_bytes"] > 2**20
    assert [c["name"] for c in told["components"]] == [
        "vision_encoder",
        "token_embedding",
        "decoder",
    ]
    assert all(rung["passed"] for rung in told["ladder"])
    golden = json.loads((made / "golden" / "golden.json").read_text())
    assert told["rounding"] == {
        "image_tokens": golden["rounding_image_tokens"],
        "logits": golden["rounding_logits"],
    }
    assert 0 < told["rounding"]["logits"] < 1


def test_as_a_process_it_is_silent_on_stderr_and_names_the_bundle_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("--quant", "int8", "--no-split", "--context", "256", "--measure", "4")
    code, out, err = process("export", ZOO, *asked)
    assert (code, err) == (0, b"")
    lines = out.decode().splitlines()
    assert lines[0].startswith("smolvlm-tiny-int8.lorg: ")
    for word in ("vision_encoder", "token_embedding", "decoder", "pixels", "greedy_ids"):
        assert any(line.split()[:1] == [word] for line in lines)
    assert any(line.startswith("Rounding the weights moved the image tokens by ") for line in lines)
    assert lines[-1].startswith("promise of the plan ")
    assert lines[-1].endswith(": kept")
    assert [path.name for path in tmp_path.iterdir()] == ["smolvlm-tiny-int8.lorg"]
    manifest = json.loads((tmp_path / "smolvlm-tiny-int8.lorg" / "manifest.json").read_text())
    assert manifest["context_length"] == 256
    assert manifest["preprocess"]["split"] is False
    golden = load_file(tmp_path / "smolvlm-tiny-int8.lorg" / "golden" / "golden.safetensors")
    assert len(golden["image_tokens"]) == 1  # one tile, as nothing is split


def test_every_option_reaches_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def record(
        path: Path,
        outs: dict[str, Path],
        recipe: Recipe,
        *,
        vision: Path | None,
        pictures: Pictures,
        replace: bool,
        progress: object,
    ) -> None:
        asked.append((path, outs, recipe, vision, pictures, replace))
        raise ConfigError("far enough")

    monkeypatch.setattr("lorgnette.export.pipeline.export_all", record)
    options = ("--target", "x", "--quant", "y", "--context", 9, "--max-tiles", 5, "--split")
    own = ("--calibrate", "pictures", "--measure", 3, "--accept-loss", "--max-fallback", 7)
    assert call("export", ZOO, *options, *own, "--force").exit_code == 2
    apart = ("--vision", "mmproj.gguf")
    assert call("export", "m.gguf", "--longest-edge", 64, *apart).exit_code == 2
    recipe = Recipe(
        target="x", quant="y", context_length=9, max_tiles=5, split=True, max_fallback=7
    )
    assert asked == [
        (
            *(ZOO, {"x": Path("smolvlm-tiny-y.lorg")}, recipe, None),
            *(Pictures(Path("pictures"), measure=3, accept_loss=True), True),
        ),
        (
            *(Path("m.gguf"), {"onnx-cpu": Path("m-fp32.lorg")}, Recipe(longest_edge=64)),
            *(Path("mmproj.gguf"), Pictures(), False),
        ),
    ]


def test_an_existing_bundle_stays_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "a.lorg"
    out.mkdir()
    (out / "manifest.json").write_text("mine")
    result = call("export", ZOO, "--out", out)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "--force" in result.stderr
    assert (out / "manifest.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a.lorg"]
    assert not (bundle() / "older").exists()  # it was made with --force, see there


def test_options_go_before_settings_and_settings_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('quant = "int8"\ncontext_length = 64\nlongest_edge = 512\nsplit = true\n')
    assert build_recipe(file, [], {}) == Recipe(
        quant="int8", context_length=64, longest_edge=512, split=True
    )
    recipe = build_recipe(file, ["context_length=128", "split=false"], {"context_length": 256})
    assert recipe == Recipe(quant="int8", context_length=256, longest_edge=512, split=False)


def test_the_later_way_to_say_the_picture_size_replaces_the_earlier(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("longest_edge = 512\n")
    recipe = build_recipe(file, ["max_tiles=5"], {})
    assert (recipe.longest_edge, recipe.max_tiles) == (None, 5)
    recipe = build_recipe(file, ["max_tiles=5"], {"longest_edge": 1024})
    assert (recipe.longest_edge, recipe.max_tiles) == (1024, None)


def test_a_setting_may_be_taken_back_to_none() -> None:
    assert build_recipe(None, ["split=null"], {}).split is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("quality = 3", "one of target, quant, context_length, longest_edge, max_tiles, split"),
        ('context_length = "64"', "'context_length'"),
        ("split = 1", "'split'"),
        ("quant = ", "not valid TOML"),
        ("[quant]\na = 1", "'quant'"),
    ],
)
def test_a_recipe_file_is_read_strictly(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        build_recipe(file, [], {})
    assert told in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("setting", ["split", "split=maybe", "max_tiles=1.5", "quality=3"])
def test_settings_are_read_strictly(setting: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        build_recipe(None, [setting], {})


def test_a_recipe_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        build_recipe(tmp_path / "none.toml", [], {})
    (tmp_path / "latin.toml").write_bytes(b'quant = "\xe9"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        build_recipe(tmp_path / "latin.toml", [], {})


def test_a_missing_extra_is_told_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else 1)
    result = call("export", ZOO, "--out", tmp_path / "a.lorg")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "no torch" in result.stderr
    assert "pip install 'lorgnette[export]'" in result.stderr


def test_a_broken_import_is_not_taken_for_a_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lorgnette.export.pipeline", None)
    result = call("export", ZOO, "--out", tmp_path / "a.lorg", "--json")
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert json.loads(result.stdout)["error"]["type"] == "Bug"


def test_a_context_that_cannot_hold_the_golden_prompt_is_refused(tmp_path: Path) -> None:
    result = call("export", ZOO, "--context", "8", "--out", tmp_path / "a.lorg")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "context" in result.stderr
    assert "got 8" in result.stderr
    assert not list(tmp_path.iterdir())
