"""Packages that were damaged or made to do harm are refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorgnette.errors import BundleError
from lorgnette.quantize.plan import PLANS
from lorgnette.targets.coreml.evaluate import Evaluator
from lorgnette.targets.coreml.mil import Model_pb2
from lorgnette.targets.coreml.package import MAX_MODEL_BYTES, read_package
from tests.coreml import Decoding, lower_all
from tests.eager import Eager
from tests.helpers import make_checkpoint, tiny_config

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder's package."""
    plain = Eager(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config()))
    return lower_all(tmp_path_factory.mktemp("p") / "out", plain, PLANS["int4-fast"]).path(
        "decoder"
    )


@pytest.fixture
def package(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "decoder.mlpackage"))


def run(package: Path) -> None:
    """Opens the package and runs both functions."""
    decoding = Decoding(Evaluator(read_package(package)))
    width = decoding.evaluator.package.functions["decode"].inputs["embeddings"].shape[2]
    for rows in (3, 1):
        decoding.run(np.ones((rows, width), np.float32), 0)


def edit(package: Path, change: Callable[[Any], None]) -> None:
    model = Model_pb2.Model()
    model.ParseFromString((package / MODEL).read_bytes())
    change(model)
    (package / MODEL).write_bytes(model.SerializeToString())


def operations(model: Any, function: str = "decode") -> Any:
    return model.mlProgram.functions[function].block_specializations["CoreML8"].operations


def find(model: Any, kind: str) -> Any:
    return next(each for each in operations(model) if each.type == kind)


def test_the_package_is_good(package: Path) -> None:
    run(package)


@pytest.mark.parametrize("file", [MODEL, WEIGHTS, Path("Manifest.json")])
def test_missing_file(package: Path, file: Path) -> None:
    (package / file).unlink()
    with pytest.raises(BundleError):
        run(package)


@pytest.mark.parametrize("file", [MODEL, WEIGHTS, Path("Manifest.json")])
def test_file_behind_a_link(package: Path, file: Path) -> None:
    kept = package.parent / "kept"
    (package / file).rename(kept)
    (package / file).symlink_to(kept)
    with pytest.raises(BundleError):
        run(package)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 200, 5000])
@pytest.mark.parametrize("file", [MODEL, WEIGHTS])
def test_file_cut_off(package: Path, file: Path, size: int) -> None:
    content = (package / file).read_bytes()
    (package / file).write_bytes(content[:size])
    with pytest.raises(BundleError):
        run(package)


def test_bytes_changed_anywhere_never_crash(package: Path) -> None:
    """Most changes are refused; those within numbers give other numbers and no more."""
    draw = np.random.default_rng(0)
    content = (package / MODEL).read_bytes()
    refused = 0
    for at in draw.integers(0, len(content), 60):
        changed = bytearray(content)
        changed[at] ^= 1 << draw.integers(0, 8)
        (package / MODEL).write_bytes(changed)
        try:
            run(package)
        except BundleError as error:
            refused += "\n" not in str(error)
    assert refused > 40


def test_model_that_is_too_large(package: Path) -> None:
    with (package / MODEL).open("ab") as file:
        file.truncate(MAX_MODEL_BYTES + 1)
    with pytest.raises(BundleError, match="too large"):
        run(package)


def set_manifest(package: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = package / "Manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_manifest_that_names_other_files(package: Path) -> None:
    def elsewhere(manifest: dict[str, Any]) -> None:
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        root["path"] = "../../other.mlmodel"

    set_manifest(package, elsewhere)
    with pytest.raises(BundleError, match="names other files"):
        run(package)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"itemInfoEntries": []}', "[" * 100000])
def test_manifest_that_is_none(package: Path, text: str) -> None:
    (package / "Manifest.json").write_text(text)
    with pytest.raises(BundleError):
        run(package)


def blob(model: Any) -> Any:
    return find(model, "constexpr_blockwise_shift_scale").inputs["data"].arguments[0].value


def name_other_file(model: Any) -> None:
    blob(model).blobFileValue.fileName = "@model_path/../../../secret"


def point_outside(model: Any) -> None:
    blob(model).blobFileValue.offset = 1 << 40


def point_between(model: Any) -> None:
    blob(model).blobFileValue.offset += 64


def claim_more(model: Any) -> None:
    blob(model).type.tensorType.dimensions[0].constant.size *= 2


def claim_enormous(model: Any) -> None:
    blob(model).type.tensorType.dimensions[0].constant.size = 1 << 50


def claim_other_type(model: Any) -> None:
    blob(model).type.tensorType.dataType = 11


def unknown_size(model: Any) -> None:
    find(model, "linear").outputs[0].type.tensorType.dimensions[0].unknown.variadic = True


def unknown_operator(model: Any) -> None:
    find(model, "linear").type = "lookalike"


def unknown_name(model: Any) -> None:
    find(model, "linear").inputs["x"].arguments[0].name = "nowhere"


def given_twice(model: Any) -> None:
    operations(model)[5].outputs[0].name = operations(model)[4].outputs[0].name


def other_opset(model: Any) -> None:
    model.mlProgram.functions["decode"].opset = "CoreML9"


def other_result(model: Any) -> None:
    find(model, "linear").outputs[0].type.tensorType.dimensions[2].constant.size += 1


def no_program(model: Any) -> None:
    model.identity.SetInParent()


def no_operands(model: Any) -> None:
    find(model, "linear").inputs.clear()


def broadcast_enormous(model: Any) -> None:
    """Two values of 2 ** 20 whose sum would be of 2 ** 40."""
    add = find(model, "add")
    for side, at in (("x", 0), ("y", 1)):
        value = add.inputs[side].arguments[0].value
        value.type.tensorType.dataType = 11
        for axis in range(2):
            made = value.type.tensorType.dimensions.add()
            made.constant.size = 1 << 20 if axis == at else 1
        value.immediateValue.tensor.floats.values.extend([0.0] * (1 << 20))


CHANGES = [
    name_other_file,
    point_outside,
    point_between,
    claim_more,
    claim_enormous,
    claim_other_type,
    unknown_size,
    unknown_operator,
    unknown_name,
    given_twice,
    other_opset,
    other_result,
    no_program,
    no_operands,
    broadcast_enormous,
]


@pytest.mark.parametrize("change", CHANGES)
def test_program_that_lies(package: Path, change: Callable[[Any], None]) -> None:
    edit(package, change)
    with pytest.raises(BundleError) as caught:
        run(package)
    assert "\n" not in str(caught.value)
