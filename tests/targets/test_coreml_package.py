"""What lies on disk: codes, shared weights, equal bytes each time, what coremltools reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

from lorgnette.quantize.plan import PLANS, QuantPlan, Rule
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.targets.coreml.blobs import RECORD_BYTES
from lorgnette.targets.coreml.lint import lint
from lorgnette.targets.coreml.package import Constant, Package, read_package
from lorgnette.targets.coreml.read_codes import read_codes
from lorgnette.targets.target import StoredMatrix
from tests.coreml import Packages, lower_all
from tests.eager import Eager
from tests.helpers import make_checkpoint, tiny_config
from tests.make_omnivlm import make_omnivlm
from tests.make_omnivlm import tiny_config as omnivlm_config

if TYPE_CHECKING:
    from lorgnette.manifest import Manifest

PALETTES = QuantPlan(
    "palettes",
    "tables of 16, 64 and 256 values",
    (
        Rule("token_embedding/*", QuantScheme(bits=8, group_size=32)),
        Rule("vision_encoder/projector.*", QuantScheme(bits=8, palette=True), "kmeans"),
        Rule("vision_encoder/*", QuantScheme(bits=8)),
        Rule("decoder/head.weight", QuantScheme(bits=6, palette=True), "kmeans"),
        Rule("*", QuantScheme(bits=4, palette=True), "kmeans"),
    ),
)
ZEROS = QuantPlan(
    "zeros", "zero points", (Rule("*", QuantScheme(bits=4, group_size=16, symmetric=False)),)
)
CODED = {"int8": PLANS["int8"], "int4-fast": PLANS["int4-fast"], "p": PALETTES, "z": ZEROS}
ODD = tiny_config(
    "idefics3",
    text={"num_key_value_heads": 4, "intermediate_size": 104},
    vision={"hidden_size": 72, "intermediate_size": 100, "patch_size": 7, "image_size": 44},
    scale_factor=3,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Eager:
    return Eager(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), ODD))


@pytest.fixture(scope="module", params=CODED)
def packages(
    request: pytest.FixtureRequest, plain: Eager, tmp_path_factory: pytest.TempPathFactory
) -> Packages:
    return lower_all(tmp_path_factory.mktemp("packages") / "out", plain, CODED[request.param])


def stored(packages: Packages) -> list[StoredMatrix]:
    components = [
        SimpleNamespace(name=name, graph=packages.path(name).name) for name in packages.built
    ]
    manifest = cast("Manifest", SimpleNamespace(components=components))
    return list(read_codes(packages.folder, manifest))


def test_codes_and_scales_are_read_back_as_they_were_made(packages: Packages) -> None:
    found = {(matrix.component, matrix.name): matrix for matrix in stored(packages)}
    sources = packages.quantized.sources
    assert set(found) == {(c, name) for c, source in sources.items() for name in source.matrices}
    for (component, name), matrix in found.items():
        made = sources[component].codes(name)
        assert matrix.bits == made.scheme.bits
        assert matrix.codes.dtype == np.uint8
        assert np.array_equal(matrix.codes, made.codes[:, : made.columns]), name
        assert matrix.scales.shape == made.scales.shape
        if made.scheme.scale_bits == 16:
            assert np.array_equal(matrix.scales, made.scales), name
        else:  # said in `exceptions`
            np.testing.assert_allclose(matrix.scales, made.scales, rtol=2**-11)


def test_what_is_not_carried_exactly_is_said(packages: Packages) -> None:
    told = {name: " ".join(built.exceptions) for name, built in packages.built.items()}
    plan = packages.quantized.plan.name
    if plan in ("int8", "int4-fast"):
        form = "int8c" if plan == "int8" else "int8cn"
        assert told["vision_encoder"] == f"scales of {form} rounded to float16: 13 matrices"
        assert told["decoder"] == told["token_embedding"] == ""
    if plan == "palettes":
        assert "values of palette8 rounded to float16" in told["vision_encoder"]
        assert "values of palette4 rounded to float16" in told["decoder"]
    if plan == "zeros":
        assert "scales of int4g16z rounded to float16" in told["decoder"]


def offsets(package: Package, function: str) -> set[int]:
    code = package.functions[function]
    constants = [
        each
        for operation in code.operations
        for given in operation.inputs.values()
        for each in given
        if isinstance(each, Constant)
    ]
    return {each.offset for each in constants if each.offset is not None}


@pytest.mark.parametrize(
    ("component", "names"),
    [("decoder", ("prefill", "decode")), ("token_embedding", ("embed", "embed_one"))],
)
def test_functions_share_their_weights(
    packages: Packages, component: str, names: tuple[str, str]
) -> None:
    package = read_package(packages.path(component))
    first, second = (offsets(package, name) for name in names)
    own = {o for o in first ^ second if package.blobs.size(o) > 8192}
    assert not own  # positions of a call, and no weight
    built = packages.built[component]
    size = package.blobs.path.stat().st_size
    records = len(first | second) + 1
    positions = sum(package.blobs.size(o) for o in first ^ second)
    assert size <= sum(built.weight_bytes.values()) + positions + 3 * RECORD_BYTES * records + 4096


def test_the_same_export_gives_the_same_bytes(plain: Eager, tmp_path: Path) -> None:
    one, other = (lower_all(tmp_path / n, plain, PLANS["int4-fast"]) for n in ("a", "b"))
    files = sorted(p.relative_to(one.folder) for p in one.folder.rglob("*.mlpackage/**/*"))
    assert any(file.name == "weight.bin" for file in files)
    for file in files:
        if (one.folder / file).is_file():
            assert (one.folder / file).read_bytes() == (other.folder / file).read_bytes(), file


def test_coremltools_reads_the_packages_back(packages: Packages) -> None:
    """Its own checks of every operator's types and shapes pass on what was written."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    for name, built in packages.built.items():
        model = coremltools.models.MLModel(str(packages.path(name)), skip_model_load=True)
        program = load(model.get_spec(), 9, model.weights_dir)
        assert set(program.functions) == {made.name for made in built.functions}
        for made in built.functions:
            function = program.functions[made.name]
            wanted = {t.name: t.shape for t in made.tensors if t.kind == "output"}
            assert {var.name: tuple(var.shape) for var in function.outputs} == wanted


def test_description_says_what_a_caller_must_pass(packages: Packages) -> None:
    import coremltools

    spec = coremltools.models.MLModel(
        str(packages.path("decoder")), skip_model_load=True
    ).get_spec()
    assert spec.specificationVersion == 9
    prefill, decode = spec.description.functions
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert [i.name for i in prefill.input] == ["embeddings", "past_length", "last_row"]
    assert [i.name for i in decode.input] == ["embeddings", "past_length"]
    layers = 3
    assert len(prefill.state) == len(decode.state) == 2 * layers
    assert prefill.state[0].name == "key_0"
    half = prefill.state[0].type.stateType.arrayType.dataType
    assert half == coremltools.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16
    assert [o.name for o in decode.output] == ["logits"]
    vision = coremltools.models.MLModel(
        str(packages.path("vision_encoder")), skip_model_load=True
    ).get_spec()
    assert [i.name for i in vision.description.input] == ["tiles"]


def test_tied_table_and_head_have_the_same_codes(tmp_path: Path) -> None:
    plain = Eager(make_omnivlm(tmp_path / "c", omnivlm_config()))
    made = stored(lower_all(tmp_path / "p", plain, PLANS["int4-fast"]))
    found = {f"{matrix.component}/{matrix.name}": matrix for matrix in made}
    table, head = found["token_embedding/table.weight"], found["decoder/head.weight"]
    assert np.array_equal(table.codes, head.codes)
    assert np.array_equal(table.scales, head.scales)


def test_advice_names_what_may_fall_off_the_neural_engine(packages: Packages) -> None:
    lines = lint(read_package(packages.path("decoder")))
    assert all(line.count("[") >= 1 and line.endswith("]") for line in lines)
    text = "\n".join(lines)
    assert "linear layers on [B, T, D]" in text
    assert "RMS norms" in text
    assert "states are 16 wide" in text
    grouped = "scales in groups" in text
    assert grouped == (packages.quantized.plan.name != "palettes")
    assert "float32" not in text
    embedding = "\n".join(lint(read_package(packages.path("token_embedding"))))
    assert "gathers" in embedding


def test_advice_tells_of_float32(plain: Eager, tmp_path: Path) -> None:
    packages = lower_all(tmp_path / "p", plain, PLANS["fp32"])
    lines = lint(read_package(packages.path("vision_encoder")))
    assert any("give float32" in line for line in lines)
