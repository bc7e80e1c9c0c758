"""Any one key of a checkpoint with any nasty value: understood, or refused in one line."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette.errors import EXIT_WRONG_INPUT, LorgnetteError
from lorgnette.export.families import open_checkpoint
from lorgnette.export.pipeline import read_parts
from lorgnette.recipe import Recipe
from tests import make_mobilevlm as mobilevlm
from tests import make_omnivlm as omnivlm
from tests.gguf_files import edit_gguf
from tests.make_mobilevlm import make_mobilevlm
from tests.make_omnivlm import make_gguf_pair, make_omnivlm

EXAMPLES = 60
MORE_MEMORY = 300_000
"""Kilobytes that all examples of a test may add to what the process has held at most."""
NUMBERS = [0, 1, 2, 3, 4, -1, 63, 64, 448, 449, 1024, 1025, 4096, 8192, 10**9]
LARGE = [2**24, 2**31, 2**32, 2**53, 2**63, -(2**63)]
REALS = [0.0, -0.5, 0.5, 1e-300, 1e300, float("nan"), float("inf")]
TEXTS = ["", "64", "true", "../..", "x" * 1000, "ünï\ncode", "a\x1b[31mb"]
LISTS: list[list[Any]] = [[64], [64, 64], [1, 2, 3], [0.5] * 3, ["a"] * 3, [True, False]]
IN_JSON: list[Any] = [
    *(None, True, False, *NUMBERS, *LARGE, *REALS, *TEXTS, *LISTS, 10**400, {}, [], [[]]),
    *([None] * 3, {"a": 1}, {"height": 1}, {"rope_type": "yarn"}, [{}], {"": {"": []}}),
]
IN_GGUF: list[Any] = [None, True, False, *NUMBERS, *LARGE, *REALS, *TEXTS, *LISTS]
Place = tuple[str, ...]


def read(checkpoint: Path) -> None:
    """Parses a checkpoint; anything but our own errors, and long ones, fail the test."""
    told = None
    try:
        read_parts(open_checkpoint(checkpoint), Recipe())
    except LorgnetteError as error:
        told = error
    if told is not None:
        assert told.exit_code == EXIT_WRONG_INPUT
        assert len(str(told).splitlines()) == 1
        assert len(str(told)) < 2000


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """No key makes anything large."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MORE_MEMORY


@dataclass
class JsonFile:
    """One JSON file of a checkpoint."""

    checkpoint: Path
    name: str

    def places(self) -> list[Place]:
        def walk(values: dict[str, Any], before: Place = ()) -> Iterator[Place]:
            for key, value in values.items():
                yield (*before, key)
                if isinstance(value, dict):
                    yield from walk(value, (*before, key))

        return list(walk(self.values()))

    def values(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.checkpoint / self.name).read_text())
        return found

    @contextlib.contextmanager
    def changed(self, change: Callable[[dict[str, Any]], None]) -> Iterator[Path]:
        """The checkpoint while the file is another."""
        file, values = self.checkpoint / self.name, self.values()
        before = file.read_bytes()
        change(values)
        file.write_text(json.dumps(values))
        try:
            yield self.checkpoint
        finally:
            file.write_bytes(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint of each family; safetensors, which open fast."""
    found = tmp_path_factory.mktemp("checkpoints")
    for name, projector in (("v1", "ldpnet"), ("v2", "ldpnetv2")):
        make_mobilevlm(found / name, mobilevlm.tiny_config(projector), form="safetensors")
    make_omnivlm(found / "omnivlm", omnivlm.tiny_config())
    size = {"height": 76, "width": 76}
    preprocessor = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (found / "omnivlm" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (found / "omnivlm" / "generation_config.json").write_text('{"eos_token_id": 2}')
    make_gguf_pair(found / "pair", omnivlm.tiny_config(), kind="F16")
    return found


JSON_FILES = [
    ("v1", "config.json"),
    ("v2", "config.json"),
    ("v2", "generation_config.json"),
    ("v2", "vision_tower/config.json"),
    ("v2", "vision_tower/preprocessor_config.json"),
    ("omnivlm", "config.json"),
    ("omnivlm", "preprocessor_config.json"),
    ("omnivlm", "generation_config.json"),
]


@pytest.mark.parametrize(("name", "file"), JSON_FILES)
def test_the_checkpoints_are_good_before(folder: Path, name: str, file: str) -> None:
    assert JsonFile(folder / name, file).places()
    read_parts(open_checkpoint(folder / name), Recipe())
    read_parts(open_checkpoint(folder / "pair"), Recipe())


@pytest.mark.parametrize(("name", "file"), JSON_FILES)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_any_key_of_a_config(folder: Path, name: str, file: str, data: st.DataObject) -> None:
    source = JsonFile(folder / name, file)
    *before, key = data.draw(st.sampled_from(source.places()))
    value = data.draw(st.sampled_from(IN_JSON) | st.just(...))

    def change(values: dict[str, Any]) -> None:
        for step in before:
            values = values[step]
        if value is ...:
            del values[key]
        else:
            values[key] = value

    with source.changed(change) as checkpoint:
        read(checkpoint)


@pytest.mark.parametrize("file", ["llm-F16.gguf", "mmproj-f16.gguf"])
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_any_key_of_a_gguf_file(folder: Path, file: str, data: st.DataObject) -> None:
    source = folder / "pair" / file
    before = source.read_bytes()
    names = [name for name in gguf.GGUFReader(source).fields if not name.startswith("GGUF.")]
    added = ["general.alignment", "split.count", "qwen2.rope.scaling.type", "general.type"]
    key = data.draw(st.sampled_from([*names, *added]))
    value = data.draw(st.sampled_from(IN_GGUF))
    try:
        edit_gguf(source, {key: value})
        read(folder / "pair")
    finally:
        source.write_bytes(before)
