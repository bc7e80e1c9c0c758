"""Calibration against a plain one: whole models, hooks, and no stages, sites or stores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorgnette.errors import ConfigError, DatasetError
from lorgnette.export.check import Parts
from lorgnette.export.families import open_checkpoint
from lorgnette.export.pipeline import quantize_parts, read_parts
from lorgnette.export.prepared import PreparedSample, prepare_samples
from lorgnette.export.trace import build_module
from lorgnette.export.weights import load_module
from lorgnette.quantize import calibrate as calibrate_module
from lorgnette.quantize.calibrate import calibrate, check_methods
from lorgnette.quantize.methods import load_method
from lorgnette.quantize.plan import PLANS, QuantPlan, Rule
from lorgnette.quantize.samples import Sample, default_samples, read_samples
from lorgnette.quantize.scaling import load_scaling
from lorgnette.quantize.scaling.site import SiteWeights
from lorgnette.quantize.scheme import FLOAT32, QuantScheme, QuantTensor
from lorgnette.quantize.store import QuantizedModel, QuantizedSource
from lorgnette.recipe import Recipe
from lorgnette.targets.capabilities import Matrix
from tests.quantized import quantized_model
from tests.unit.quantize_cases import layer_inputs
from tests.zoo.checkpoint import CHECKPOINTS

Array = NDArray[np.float32]
INT4 = QuantScheme(bits=4, group_size=32)
BY_CHANNEL = QuantScheme(bits=8, activations="int8_token")
STATIC = QuantScheme(bits=8, activations="int8_static")
PLAN = QuantPlan(
    "every-way",
    "",
    (
        Rule("vision_encoder/tower.embed.*", FLOAT32),
        Rule("vision_encoder/tower.layers.*.fc2.*", INT4),
        Rule("vision_encoder/tower.layers.*", BY_CHANNEL, "rtn", "smoothquant"),
        Rule("vision_encoder/projector.*", STATIC),
        Rule("decoder/layers.*.mlp.*", INT4, "gptq", "awq"),
        Rule("decoder/layers.*", INT4, "gptq", "smoothquant"),
        Rule("decoder/head.weight", INT4, "gptq"),
        Rule("*", INT4, "mse"),
    ),
)
VISION_SITES = (
    (("norm1.weight", "norm1.bias"), [f"attention.{n}_proj.weight" for n in "qkv"]),
    (("attention.v_proj.weight", "attention.v_proj.bias"), ["attention.out_proj.weight"]),
    (("norm2.weight", "norm2.bias"), ["mlp.fc1.weight"]),
)


STEP = re.compile(r"(tower\.)?(layers\.\d+|\w+)")


def silent(step: str) -> None:
    """Tells nobody."""


def read(context_length: int | None = None) -> Parts:
    torch.set_num_threads(1)
    recipe = Recipe(context_length=context_length)
    return read_parts(open_checkpoint(CHECKPOINTS / "smolvlm-tiny"), recipe)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return read()


@pytest.fixture(scope="module")
def three() -> tuple[Sample, ...]:
    return read_samples(default_samples())[:3]


def calibrated(
    folder: Path, parts: Parts, samples: Sequence[Sample], plan: QuantPlan = PLAN
) -> QuantizedModel:
    model = quantized_model(folder, {c.name: c for c in parts.components}, parts.sources, plan)
    calibrate(parts.components, model, prepare_samples(parts, samples), silent)
    return model


class Plain:
    """Whole modules in memory, changed in place matrix after matrix.

    It goes on with the codes of the calibration under test: where the order of sums decides about
    one code, the layers behind are others.
    """

    def __init__(
        self,
        parts: Parts,
        plan: QuantPlan,
        samples: Sequence[PreparedSample],
        ours: QuantizedModel | None = None,
    ) -> None:
        components = {component.name: component for component in parts.components}
        self.modules = {
            name: load_module(build_module(component), parts.sources[name])
            for name, component in components.items()
        }
        self.plan, self.samples, self.text = plan, samples, parts.spec.text
        self.ours = ours
        self.codes: dict[str, QuantTensor] = {}
        self.inputs: dict[str, Array] = {}
        table = self.parameter("token_embedding", "table.weight")
        rule = plan.rule_for("token_embedding", "table.weight")
        if rule.scheme.is_integer:
            made = load_method(rule.method).quantize(table.numpy().copy(), rule.scheme)
            table.copy_(torch.from_numpy(made.dequantize()))

    def parameter(self, component: str, name: str) -> Tensor:
        return dict(self.modules[component].named_parameters())[name].data

    def run_vision(self) -> list[Tensor]:
        return [self.modules["vision_encoder"](torch.from_numpy(s.tiles)) for s in self.samples]

    def run_decoder(self) -> None:
        """One call for each place whose logits are wanted: only the last one's are given."""
        tokens = self.run_vision()
        for sample, seen in zip(self.samples, tokens, strict=True):
            ids = torch.tensor([[*sample.prompt_ids, *sample.answer_ids]])
            x = self.modules["token_embedding"](ids)
            x[0, sample.slots] = seen.flatten(0, 1)
            shape = (1, self.text.kv_heads, x.shape[1], self.text.head_size)
            caches = [torch.zeros(shape) for _ in range(2 * self.text.layers)]
            past = 0
            steps = [len(sample.prompt_ids), *[1] * len(sample.answer_ids)]
            for step in steps:
                start = torch.tensor([past], dtype=torch.int32)
                chunk = x[:, past : past + step]
                _, caches = self.modules["decoder"](chunk, start, caches)
                past += step

    def look(self, component: str, names: Sequence[str]) -> None:
        """Takes down what some matrices are multiplied with."""
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        layers = dict(self.modules[component].named_modules())
        hooks = [
            layers[name.removesuffix(".weight")].register_forward_pre_hook(
                lambda _, x, name=name: seen[name].append(x[0].reshape(-1, x[0].shape[-1]).clone())
            )
            for name in names
        ]
        if component == "decoder":
            self.run_decoder()
        else:
            self.run_vision()
        for hook in hooks:
            hook.remove()
        self.inputs = {name: torch.cat(rows).numpy() for name, rows in seen.items()}

    def trade(
        self,
        component: str,
        divided: Sequence[tuple[str, slice]],
        consumers: Sequence[str],
        channel_of_column: NDArray[np.int64],
    ) -> None:
        """What a scaling method asks for at one site."""
        rule = self.plan.rule_for(component, consumers[0])
        seen = layer_inputs(self.inputs[consumers[0]])
        site = SiteWeights(
            consumers=tuple(self.parameter(component, n).numpy().copy() for n in consumers),
            channel_of_column=channel_of_column,
            inputs=seen,
            round=lambda w, _: load_method("rtn").quantize(w, rule.scheme).dequantize(),
        )
        factors = load_scaling(rule.scaling).factors(site)
        for name, rows in divided:
            value = self.parameter(component, name)[rows]
            value /= torch.from_numpy(factors).reshape(-1, *[1] * (value.ndim - 1))
        by_column = factors[channel_of_column]
        for name in consumers:
            self.parameter(component, name).mul_(torch.from_numpy(by_column))
            self.inputs[name] = self.inputs[name] / by_column

    def round(self, component: str, names: Sequence[str]) -> None:
        for name in names:
            rule = self.plan.rule_for(component, name)
            weight = self.parameter(component, name)
            made = load_method(rule.method).quantize(
                weight.numpy().copy(), rule.scheme, layer_inputs(self.inputs[name])
            )
            self.codes[f"{component}/{name}"] = made
            if self.ours is not None:
                made = self.ours.sources[component].codes(name)
            weight.copy_(torch.from_numpy(made.dequantize()))


def plainly(parts: Parts, samples: Sequence[PreparedSample], ours: QuantizedModel) -> Plain:
    """Calibrates SmolVLM by the plan `PLAN`."""
    plain = Plain(parts, PLAN, samples, ours)
    whole = slice(None)
    width = np.arange(parts.spec.vision.hidden_size)
    for i in range(parts.spec.vision.layers):
        at = f"tower.layers.{i}."
        first = [at + name for _, names in VISION_SITES for name in names]
        plain.look("vision_encoder", [*first, at + "mlp.fc2.weight"])
        for divided, consumers in VISION_SITES:
            own = [(at + name, whole) for name in divided]
            plain.trade("vision_encoder", own, [at + name for name in consumers], width)
        plain.round("vision_encoder", [*first, at + "mlp.fc2.weight"])
    plain.look("vision_encoder", ["projector.projection.weight"])
    plain.round("vision_encoder", ["projector.projection.weight"])
    text = parts.spec.text
    size, inner = text.head_size, text.intermediate_size
    shared = text.heads // text.kv_heads
    reads = np.array([h // shared * size + d for h in range(text.heads) for d in range(size)])
    values = slice((text.heads + text.kv_heads) * size, None)
    for i in range(text.layers):
        at = f"layers.{i}."
        qkv, out = at + "attention.qkv_proj.weight", at + "attention.o_proj.weight"
        up, down = at + "mlp.gate_up_proj.weight", at + "mlp.down_proj.weight"
        plain.look("decoder", [qkv, out, up, down])
        hidden = np.arange(text.hidden_size)
        plain.trade("decoder", [(at + "norm1.weight", whole)], [qkv], hidden)
        plain.trade("decoder", [(qkv, values)], [out], reads)
        plain.trade("decoder", [(at + "norm2.weight", whole)], [up], hidden)
        plain.trade("decoder", [(up, slice(inner, None))], [down], np.arange(inner))
        plain.round("decoder", [qkv, out, up, down])
    plain.look("decoder", ["head.weight"])
    plain.round("decoder", ["head.weight"])
    return plain


def error(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory, parts: Parts, three: tuple[Sample, ...]
) -> tuple[QuantizedModel, Plain]:
    """The same calibration twice, ours and the plain one."""
    model = calibrated(tmp_path_factory.mktemp("calibrated"), parts, three)
    with torch.no_grad():
        return model, plainly(parts, prepare_samples(parts, three), model)


def test_codes_are_those_of_a_plain_calibration(both: tuple[QuantizedModel, Plain]) -> None:
    """All but those few that the order of sums puts on the other side of a half."""
    model, plain = both
    assert len(plain.codes) == 4 * 6 + 1 + 4 * 4 + 1
    for key, wanted in plain.codes.items():
        component, _, name = key.partition("/")
        got = model.sources[component].codes(name)
        assert got.scheme == wanted.scheme
        assert (got.codes == wanted.codes).mean() > 0.985, key
        assert error(got.dequantize(), wanted.dequantize()) < 0.05, key


def test_what_is_divided_is_divided(both: tuple[QuantizedModel, Plain]) -> None:
    model, plain = both
    changed = 0
    for component, source in model.sources.items():
        for name in source.shapes.keys() - source.matrices - {"cos", "sin"}:
            if name not in dict(plain.modules[component].named_parameters()):
                continue
            got, wanted = source.unrounded(name), plain.parameter(component, name).numpy()
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5, err_msg=name)
            changed += not np.array_equal(got, model.sources[component]._source.array(name))
    assert changed == 4 * 5 + 4 * 2  # gains and biases of two norms and of values; gains


def test_static_ranges_are_those_of_the_inputs(both: tuple[QuantizedModel, Plain]) -> None:
    model, plain = both
    name = "projector.projection.weight"
    with torch.no_grad():
        plain.look("vision_encoder", [name])
    seen = plain.inputs[name]
    found = model.sources["vision_encoder"].codes(name).input_range
    assert found is not None
    assert found.scale == pytest.approx((seen.max() - seen.min()) / 255, rel=1e-4)
    assert abs(found.zero_point + seen.min() / found.scale) <= 0.51


def dump(model: QuantizedModel) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for component, source in model.sources.items():
        for name in source.shapes:
            key = f"{component}/{name}"
            found[key] = source.unrounded(name).tobytes()
            if name in source.matrices and source.rule(name).scheme.is_integer:
                made = source.codes(name)
                found[f"{key} codes"] = made.codes.tobytes() + made.scales.tobytes()
                found[f"{key} range"] = repr(made.input_range).encode()
    return found


def test_the_same_samples_give_the_same_bytes(
    both: tuple[QuantizedModel, Plain], tmp_path: Path, parts: Parts, three: tuple[Sample, ...]
) -> None:
    again, other = dump(calibrated(tmp_path, parts, three)), dump(both[0])
    assert again.keys() == other.keys()
    assert [key for key in again if again[key] != other[key]] == []


def test_palettes_are_weighed_by_the_inputs_that_rescaled_columns_see(
    tmp_path: Path, parts: Parts, three: tuple[Sample, ...]
) -> None:
    palette = QuantScheme(bits=4, palette=True)
    plan = QuantPlan(
        "palette",
        "",
        (Rule("decoder/layers.0.*", palette, "kmeans", "smoothquant"), Rule("*", FLOAT32)),
    )
    source = calibrated(tmp_path, parts, three[:1], plan).sources["decoder"]
    name = "layers.0.mlp.down_proj.weight"
    blind = load_method("kmeans").quantize(source.unrounded(name), palette)
    assert not np.array_equal(source.codes(name).codes, blind.codes)
    assert error(source.codes(name).dequantize(), source.unrounded(name)) < 0.2


def test_a_rescale_waits_until_all_consumers_ask_for_it(
    tmp_path: Path, parts: Parts, three: tuple[Sample, ...]
) -> None:
    plan = QuantPlan(
        "some",
        "",
        (
            Rule("vision_encoder/*.k_proj.*", BY_CHANNEL),
            Rule("vision_encoder/tower.layers.*", BY_CHANNEL, "rtn", "smoothquant"),
            Rule("*", FLOAT32, "rtn", "smoothquant"),
        ),
    )
    model = calibrated(tmp_path, parts, three[:1], plan)
    source, published = model.sources["vision_encoder"], parts.sources["vision_encoder"]
    layer = "tower.layers.0."
    for name in ("norm1.weight", "attention.q_proj.weight"):
        np.testing.assert_array_equal(source.unrounded(layer + name), published.array(layer + name))
    assert not np.array_equal(
        source.unrounded(layer + "norm2.weight"), published.array(layer + "norm2.weight")
    )
    # Floats are not rescaled: nothing is to be won.
    norm = "layers.0.norm1.weight"
    np.testing.assert_array_equal(
        model.sources["decoder"].unrounded(norm), parts.sources["decoder"].array(norm)
    )


def test_one_layer_is_in_memory_at_a_time(
    tmp_path: Path, parts: Parts, three: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[nn.Module] = []
    held: list[set[str]] = []

    def build(component: object) -> nn.Module:
        built.append(build_module(component))  # type: ignore[arg-type]
        return built[-1]

    def look(module: nn.Module, _: object) -> None:
        names = {n for m in built for n, p in m.named_parameters() if not p.is_meta}
        # `tower.layers.3`, `tower.embed`, `projector`, `layers.3`, `head`
        held.append({m[0] for n in names if (m := STEP.match(n))})

    monkeypatch.setattr(calibrate_module, "build_module", build)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        calibrated(tmp_path, parts, three[:1])
    finally:
        hook.remove()
    assert {len(steps) for steps in held} == {1}
    assert len(set().union(*held)) == 1 + 4 + 1 + 1 + 4 + 1 + 1
    assert len(built) == 2
    assert all(p.is_meta for module in built for p in module.parameters())


# Samples


def test_samples_that_do_not_fit_the_context_are_left_out() -> None:
    samples = read_samples(default_samples())[:8]
    lengths = [len(p.prompt_ids) + len(p.answer_ids) for p in prepare_samples(read(), samples)]
    assert len(set(lengths)) > 1
    short = read(sorted(lengths)[4])
    kept = prepare_samples(short, samples)
    fitting = [n for n in lengths if n <= sorted(lengths)[4]]
    assert [len(p.prompt_ids) + len(p.answer_ids) for p in kept] == fitting
    assert 0 < len(fitting) < len(lengths)


def test_no_more_samples_are_taken_than_make_so_many_positions(parts: Parts) -> None:
    samples = read_samples(default_samples())[:8]
    sizes = [len(p.prompt_ids) for p in prepare_samples(parts, samples)]
    some = prepare_samples(parts, samples, sum(sizes[:3]) + 1)
    assert [len(p.prompt_ids) for p in some] == sizes[:4]
    assert len(prepare_samples(parts, samples, 1)) == 1


def test_a_sample_is_prepared_as_the_model_takes_it(
    parts: Parts, three: tuple[Sample, ...]
) -> None:
    sample = three[0]
    (prepared,) = prepare_samples(parts, [sample])
    assert sample.answer is not None
    spec = parts.spec
    assert prepared.tiles.dtype == np.uint8
    assert prepared.tiles.shape[1:] == (3, spec.vision.image_size, spec.vision.image_size)
    ids = np.array(prepared.prompt_ids)
    np.testing.assert_array_equal(prepared.slots, np.flatnonzero(ids == spec.image_token_id))
    assert len(prepared.slots) == len(prepared.tiles) * spec.image_tokens_per_tile
    assert prepared.answer_ids[-1] == parts.prompt.stop_token_ids[0]
    answer = parts.tokenizer.decode(list(prepared.answer_ids[:-1]))
    assert answer.strip() == sample.answer
    (silent_one,) = prepare_samples(parts, [replace(sample, answer=None)])
    assert silent_one.answer_ids == ()
    assert silent_one.prompt_ids == prepared.prompt_ids


def test_a_question_with_a_special_token_names_its_sample(
    parts: Parts, three: tuple[Sample, ...]
) -> None:
    bad = replace(three[0], question="What is <image>?", name="seven.png")
    with pytest.raises(DatasetError, match=r"seven\.png"):
        prepare_samples(parts, [bad])


def test_nothing_to_calibrate_with_is_refused(tmp_path: Path, parts: Parts) -> None:
    with pytest.raises(ConfigError, match="nothing to calibrate with"):
        quantize_parts(parts, PLAN, tmp_path / "model", (), silent)


def test_a_table_cannot_be_rounded_by_its_inputs() -> None:
    table = Matrix("token_embedding", "table.weight", 4, 32, gathered=True)
    plan = QuantPlan("greedy", "", (Rule("*", INT4, "gptq"),))
    with pytest.raises(ConfigError, match=r"token_embedding/table\.weight") as caught:
        check_methods(plan, [table])
    assert "gptq" in str(caught.value)
    multiplied = msgspec.structs.replace(table, gathered=False)
    check_methods(plan, [multiplied])
    for good in (PLAN, *PLANS.values()):
        check_methods(good, [table])


def test_a_cache_of_8_bits_gets_steps_that_hold_what_was_seen(
    tmp_path: Path, parts: Parts, three: tuple[Sample, ...]
) -> None:
    plan = QuantPlan("cache", "", (Rule("*", FLOAT32),), cache_bits=8)
    source: QuantizedSource = calibrated(tmp_path, parts, three, plan).sources["decoder"]
    plain = Plain(parts, plan, prepare_samples(parts, three))
    seen: list[Tensor] = []
    hook = (
        plain.modules["decoder"]
        .get_submodule("layers.1")
        .register_forward_hook(lambda _, __, out: seen.append(out[2].abs().amax((0, 2))))
    )
    with torch.no_grad():
        plain.run_decoder()
    hook.remove()
    largest = torch.stack(seen).amax(0).numpy()
    np.testing.assert_allclose(source.cache_scale("value_1") * 127, largest * 1.1, rtol=1e-4)
