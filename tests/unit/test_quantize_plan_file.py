"""Plan files: read strictly, carried through a bundle, and nothing that they ask for is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette.bundle import open_bundle
from lorgnette.cli.export import build_recipe
from lorgnette.errors import EXIT_WRONG_INPUT, ConfigError
from lorgnette.quantize.plan import PLANS, QuantPlan, Rule
from lorgnette.quantize.plan_file import build_plan, check_rules, plan_for, read_plan_file
from lorgnette.quantize.scheme import FLOAT16, QuantScheme
from lorgnette.recipe import PlanRule, PlanText, Recipe
from lorgnette.targets.capabilities import Matrix
from tests.unit.cli_helpers import ZOO, call, document

WHOLE = """
name = "mine"
summary = "what it is for"

[[rule]]
select = "vision_encoder/*"
bits = 8
group = 64
symmetric = false
activations = "float"
method = "mse"

[[rule]]
select = "token_embedding/*"
bits = 16

[[rule]]
select = "*"
bits = 4
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "plan.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_plan_file_is_its_rules_in_order(tmp_path: Path) -> None:
    plan = build_plan(read_plan_file(written(tmp_path, WHOLE)), "here")
    assert (plan.name, plan.summary) == ("mine", "what it is for")
    assert plan.rules == (
        Rule("vision_encoder/*", QuantScheme(bits=8, group_size=64, symmetric=False), "mse"),
        Rule("token_embedding/*", FLOAT16),
        Rule("*", QuantScheme(bits=4, group_size=32)),
    )
    assert [str(rule) for rule in plan.rules] == [
        "vision_encoder/*: int8g64z by mse",
        "token_embedding/*: float16",
        "*: int4g32 by rtn",
    ]


RULE = '[[rule]]\nselect = "*"\nbits = 4\n'
HEAD = 'name = "mine"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name = ", ["not valid TOML"]),
        (RULE, ["lacks one", "name"]),
        (HEAD, ["no rules"]),
        (HEAD + "rule = []", ["no rules", "1 to 1000"]),
        (HEAD + "rule = 3", ["[[rule]]"]),
        (HEAD + "rule = [4]", ["[[rule]]"]),
        (HEAD + "colour = 1\n" + RULE, ["unknown key", "'colour'", "name, rule, summary"]),
        (HEAD + RULE + "colour = 1", ["unknown key", "'colour'", "rule 1", "select, bits, group"]),
        (HEAD + RULE + '[[rule]]\nselect = "*"', ["rule 2", "bits"]),
        (HEAD + "[[rule]]\nbits = 4", ["rule 1", "select"]),
        (HEAD + RULE.replace("4", '"4"'), ["rule 1", "bits"]),
        (HEAD + RULE.replace("4", "5"), ["'bits' is out of bounds", "got 5", "2, 3, 4, 8, 16, 32"]),
        (HEAD + RULE + "group = 48", ["'group'", "got 48", "16, 32, 64, 128, channel"]),
        (HEAD + RULE + "group = 0", ["'group'", "got 0"]),
        (HEAD + RULE + "group = true", ["rule 1", "group"]),
        (HEAD + RULE + 'group = "row"', ["'group'", "'row'"]),
        (HEAD + RULE + "scale_bits = 4", ["'scale_bits'", "got 4", "one of 8, 16, 32"]),
        (HEAD + RULE + "scale_bits = true", ["rule 1", "scale_bits"]),
        (
            HEAD + RULE.replace("4", "16") + "scale_bits = 16",
            ["'scale_bits' does not go with bits = 16"],
        ),
        (HEAD + RULE + "symmetric = 1", ["rule 1", "symmetric"]),
        (HEAD + RULE + 'activations = "int4"', ["'activations'", "float, int8_group, int8_token"]),
        (HEAD + RULE + 'method = "gptr"', ["'method'", "'gptr'", "gptq, hqq, kmeans, mse, rtn"]),
        (
            HEAD + RULE.replace("4", "16") + "group = 32",
            ["'group' does not go with bits = 16", "bits = 16"],
        ),
        (
            HEAD + RULE.replace("4", "32") + 'method = "rtn"',
            ["'method' does not go with bits = 32"],
        ),
        (HEAD + RULE.replace('"*"', '"decoder"'), ["names no component", "'decoder'"]),
        (HEAD.replace("mine", "int4") + RULE, ["built-in plan", "'int4'"]),
        (HEAD.replace("mine", "../x") + RULE, ["name is not allowed", "'../x'"]),
        (HEAD.replace("mine", "") + RULE, ["name is not allowed"]),
        (HEAD.replace("mine", "a" * 41) + RULE, ["name is not allowed"]),
    ],
)
def test_what_is_no_plan_is_refused_by_name(tmp_path: Path, text: str, told: list[str]) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_plan_file(file)
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    for part in (str(file), *told):
        assert part in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_plan_file(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_plan_file(tmp_path / "latin.toml")
    (tmp_path / "long.toml").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(ConfigError, match="too long"):
        read_plan_file(tmp_path / "long.toml")
    with pytest.raises(ConfigError, match="cannot read the plan"):
        read_plan_file(tmp_path)


@pytest.mark.parametrize(("line", "form"), [("", "int4g32"), ("scale_bits = 8", "int4g32b")])
def test_a_plan_says_how_wide_scales_are(tmp_path: Path, line: str, form: str) -> None:
    text = read_plan_file(written(tmp_path, HEAD + RULE + line))
    (rule,) = build_plan(text, "here").rules
    assert rule.scheme.form == form


names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,39}", fullmatch=True).filter(lambda n: n not in PLANS)
selectors = st.just("*") | st.text(max_size=20).map(lambda text: f"decoder/{text}")
integers = st.builds(
    PlanRule,
    select=selectors,
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.none() | st.sampled_from([16, 32, 64, 128, "channel"]),
    symmetric=st.none() | st.booleans(),
    activations=st.none() | st.sampled_from(["float", "int8_group", "int8_token"]),
    method=st.none() | st.sampled_from(["rtn", "mse", "hqq"]),
)
floats = st.builds(PlanRule, select=selectors, bits=st.sampled_from([16, 32]))
texts = st.builds(
    PlanText,
    name=names,
    summary=st.text(max_size=20),
    rule=st.lists(integers | floats, min_size=1, max_size=4).map(tuple),
)


def as_toml(text: PlanText) -> str:
    """The file that a plan might have come from."""

    def line(key: str, value: object) -> str:
        # A JSON string is a TOML one, but for the character that JSON need not escape.
        return f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")

    lines = [line("name", text.name), line("summary", text.summary)]
    for rule in text.rule:
        values = msgspec.structs.asdict(rule).items()
        lines += ["[[rule]]", *(line(key, value) for key, value in values if value is not None)]
    return "\n".join(lines)


@settings(max_examples=40, deadline=None)
@given(text=texts)
def test_rules_are_carried_word_for_word(
    tmp_path_factory: pytest.TempPathFactory, text: PlanText
) -> None:
    file = written(tmp_path_factory.mktemp("plan"), as_toml(text))
    assert read_plan_file(file) == text
    again = msgspec.json.decode(
        msgspec.json.encode(Recipe(quant=text.name, plan=text)), type=Recipe
    )
    assert again.plan == text
    plan = plan_for(again)
    assert plan == build_plan(text, "here")
    for said, rule in zip(text.rule, plan.rules, strict=True):
        assert (rule.select, rule.scheme.bits) == (said.select, said.bits)
        if said.bits < 16:
            scheme = rule.scheme
            group = 0 if said.group == "channel" else said.group or 32
            assert (scheme.group_size, rule.method) == (group, said.method or "rtn")
            assert scheme.symmetric == (said.symmetric is not False)
            assert scheme.activations == (said.activations or "float")


# Which rule decides


def matrices(*names: str) -> list[Matrix]:
    made = []
    for key in names:
        component, _, name = key.partition("/")
        made.append(Matrix(component=component, name=name, rows=4, columns=32, gathered=False))
    return made


INT4 = QuantScheme(bits=4, group_size=32)
EVERY = matrices("vision_encoder/a.weight", "decoder/b.weight", "decoder/head.weight")


def test_a_matrix_without_rule_is_named() -> None:
    plan = QuantPlan("mine", "", (Rule("vision_encoder/*", INT4), Rule("decoder/h*", INT4)))
    with pytest.raises(ConfigError, match=r"no rule selects the matrix 'decoder/b.weight'"):
        check_rules(plan, EVERY)


@pytest.mark.parametrize(
    ("selects", "number"),
    [
        (("encoder/*", "*"), 1),
        (("*", "decoder/*"), 2),
        (("decoder/b.*", "decoder/b.weight", "*"), 2),
        (("decoder/h", "*"), 1),
    ],
    ids=["misspelt", "too late", "shadowed", "not whole"],
)
def test_a_rule_that_decides_about_nothing_is_named(selects: tuple[str, ...], number: int) -> None:
    plan = QuantPlan("mine", "", tuple(Rule(select, INT4) for select in selects))
    with pytest.raises(ConfigError, match=rf"rule {number} decides about no matrix") as caught:
        check_rules(plan, EVERY)
    assert selects[number - 1] in str(caught.value)


def test_named_plans_decide_about_everything() -> None:
    for plan in PLANS.values():
        check_rules(plan, EVERY)


# Through the command line


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle made with a plan file."""
    folder = tmp_path_factory.mktemp("secret-folder")
    rules = WHOLE.replace(
        'select = "*"\nbits = 4', 'select = "*"\nbits = 4\ngroup = 64\nmethod = "hqq"'
    )
    out = folder / "mine.lorg"
    plan = written(folder, rules)
    document("export", ZOO, "--plan", plan, "--out", out, "--measure", 0)
    return out


def test_a_bundle_tells_the_rules_it_was_made_by(made: Path) -> None:
    manifest = open_bundle(made).manifest
    recipe = manifest.recipe
    assert recipe.quant == "mine"
    assert recipe.plan is not None
    assert [rule.select for rule in recipe.plan.rule] == [
        "vision_encoder/*",
        "token_embedding/*",
        "*",
    ]
    assert recipe.plan.rule[2].method == "hqq"
    assert b"secret-folder" not in (made / "manifest.json").read_bytes()
    stored = {entry.name: set(entry.weight_bytes) for entry in manifest.components}
    assert stored == {
        "vision_encoder": {"int8g64z", "float32"},
        "token_embedding": {"float16"},
        "decoder": {"int4g64", "float32"},
    }
    told = document("inspect", made)
    assert told["rules"] == [
        "vision_encoder/*: int8g64z by mse",
        "token_embedding/*: float16",
        "*: int4g64 by hqq",
    ]
    assert "vision_encoder/*: int8g64z by mse" in call("inspect", made).stdout


def test_a_bundle_of_a_plan_file_is_verified_against_its_checkpoint(made: Path) -> None:
    assert document("verify", made)["passed"]
    assert document("verify", made, "--against", ZOO)["passed"]


def test_other_rules_than_the_bundles_do_not_verify(made: Path, tmp_path: Path) -> None:
    """The rules in the manifest are what `verify --against` computes by."""
    other = tmp_path / "other.lorg"
    shutil.copytree(made, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["recipe"]["plan"]["rule"][2]["method"] = "rtn"
    (other / "manifest.json").write_text(json.dumps(manifest))
    result = call("verify", other, "--against", ZOO)
    assert result.exit_code == 1
    assert "logits" in result.stderr


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        (RULE.replace("4", "3"), "int3g32; nearest: int4g32"),
        (RULE.replace("4", "2"), "'token_embedding/table.weight' cannot be gathered as int2g32"),
        (RULE + 'group = "channel"', "nearest: int4g128"),
        (RULE.replace("*", "decoder/*"), "no rule selects the matrix 'vision_encoder/"),
        (RULE + RULE, "rule 2 decides about no matrix"),
    ],
    ids=["bits", "table", "channel", "no rule", "twice"],
)
def test_what_cannot_be_made_is_refused_first(tmp_path: Path, rules: str, told: str) -> None:
    out = tmp_path / "out.lorg"
    result = call("export", ZOO, "--plan", written(tmp_path, HEAD + rules), "--out", out)
    assert result.exit_code == EXIT_WRONG_INPUT
    assert result.stderr.count("\n") == 1
    assert told in result.stderr
    assert not out.exists()


def test_quant_and_plan_exclude_each_other(tmp_path: Path) -> None:
    file = written(tmp_path, WHOLE)
    result = call("export", ZOO, "--quant", "int4", "--plan", file)
    assert result.exit_code == EXIT_WRONG_INPUT
    assert "--quant and --plan" in result.stderr
    text = read_plan_file(file)
    with pytest.raises(ConfigError, match="two plans"):
        plan_for(Recipe(quant="int4", plan=text))


def test_the_later_of_quant_and_plan_goes_before_the_earlier(tmp_path: Path) -> None:
    text = read_plan_file(written(tmp_path, WHOLE))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('quant = "int8"')
    by_plan = build_recipe(recipe, [], {"plan": text})
    assert (by_plan.quant, by_plan.plan) == ("mine", text)
    recipe.write_text(
        WHOLE.replace("[[rule]]", "[[plan.rule]]").replace("\nname", "\n[plan]\nname")
    )
    inside = build_recipe(recipe, [], {})
    assert (inside.quant, inside.plan) == ("mine", text)
    by_name = build_recipe(recipe, [], {"quant": "int8"})
    assert (by_name.quant, by_name.plan) == ("int8", None)
