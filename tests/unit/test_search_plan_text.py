"""Plans written as files: what is read back is the same plan."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette.quantize.plan import Rule, Scaling
from lorgnette.quantize.plan_file import build_plan, read_plan_file
from lorgnette.quantize.plan_text import rule_text, to_toml
from lorgnette.quantize.scheme import Activations, QuantScheme, ScaleBits
from lorgnette.recipe import PlanRule, PlanText

activations: st.SearchStrategy[Activations] = st.sampled_from(
    ["float", "int8_group", "int8_token", "int8_static"]
)
scale_bits: st.SearchStrategy[ScaleBits] = st.sampled_from([8, 16, 32])
scalings: st.SearchStrategy[Scaling] = st.sampled_from(["none", "awq", "smoothquant"])
grouped = st.builds(
    QuantScheme,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([0, 16, 32, 64, 128]),
    symmetric=st.booleans(),
    activations=activations,
    scale_bits=scale_bits,
)
whole = st.builds(QuantScheme, bits=st.just(8), per_tensor=st.just(True), activations=activations)
floats = st.builds(QuantScheme, bits=st.sampled_from([16, 32]))
selects = st.just("*") | st.text(max_size=12).map(lambda text: f"decoder/{text}")
rules = st.builds(
    Rule,
    select=selects,
    scheme=grouped | whole,
    method=st.sampled_from(["rtn", "mse", "hqq", "gptq"]),
    scaling=scalings,
) | st.builds(Rule, select=selects, scheme=floats, method=st.just("rtn"), scaling=st.just("none"))
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)


def read_back(toml: str) -> PlanText:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.toml"
        file.write_text(toml, encoding="utf-8")
        return read_plan_file(file)


@settings(max_examples=100, deadline=None)
@given(
    made=st.lists(rules, min_size=1, max_size=5),
    summary=texts,
    note=texts,
    max_kl=st.none() | st.floats(0, allow_nan=False),
    rotate=st.booleans(),
)
def test_a_plan_is_read_back_as_it_was_written(
    made: list[Rule], summary: str, note: str, max_kl: float | None, rotate: bool
) -> None:
    plan = PlanText(
        name="mine",
        rule=tuple(map(rule_text, made)),
        summary=summary,
        rotate=rotate,
        max_kl=max_kl,
    )
    toml = to_toml(plan, {0: note, len(made) - 1: note}, [note])
    assert read_back(toml) == plan
    assert build_plan(plan, "here").rules == tuple(made)


def test_a_palette_is_written_too() -> None:
    rule = Rule("*", QuantScheme(bits=6, palette=True, table_rows=16), "kmeans")
    plan = PlanText(name="mine", rule=(rule_text(rule),))
    assert read_back(to_toml(plan)) == plan
    assert plan.rule == (PlanRule(select="*", bits=6, palette=True, rows=16, method="kmeans"),)


def test_a_plan_file_is_readable() -> None:
    scheme = QuantScheme(bits=4, group_size=32, activations="int8_group", scale_bits=16)
    plan = PlanText(
        name="mine", rule=(rule_text(Rule("decoder/*", scheme, "gptq", "smoothquant")),)
    )
    assert to_toml(plan, {0: "loss 1e-3\nand more"}, ["Found."]) == (
        '# Found.\nname = "mine"\n\n# loss 1e-3 and more\n[[rule]]\nselect = "decoder/*"\n'
        'bits = 4\ngroup = 32\nactivations = "int8_group"\nmethod = "gptq"\n'
        'scaling = "smoothquant"\nscale_bits = 16\n'
    )
