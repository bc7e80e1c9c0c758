"""Plans that a user writes: a TOML file of ordered rules.

    name = "small-eyes"
    summary = "what it is for"
    rotate = false                  # true: rotate the decoder's residual stream; left out: false
    cache_bits = 32                 # 8: a KV cache of 8 bits; left out: 32
    max_kl = 0.01                   # refuse to export if answers diverge more; left out: any
    min_same_answer = 0.98          # refuse if fewer answers stay the same; left out: any

    [[rule]]
    select = "vision_encoder/*"     # fnmatch over component/parameter
    bits = 8                        # 2, 3, 4, 8: integers; 16, 32: floats, with nothing below
    group = 32                      # columns with one scale; or "channel", "tensor"; left out: 32
    scale_bits = 32                 # of a group's scale: 32, 16 or 8, which is a whole multiple of
                                    # one number a row; left out: 32
    symmetric = true                # false: a zero point a group; left out: true
    narrow = false                  # true: codes of 8 bits by channel use half their range, which
                                    # x86 processors without VNNI multiply faster; left out: false
    activations = "float"           # or "int8_group", "int8_token", "int8_static"
    method = "rtn"                  # or "mse", "hqq", "gptq"; left out: "rtn"
    scaling = "none"                # or "awq", "outliers", "smoothquant": rescale first

    [[rule]]
    select = "*"
    bits = 6                        # of a palette: 4, 6, 8
    palette = true                  # codes index a table of values
    rows = 16                       # rows that share a table; left out: all
    method = "kmeans"               # which is the method of palettes

The first rule that selects a matrix decides about it.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import msgspec

from lorgnette.errors import ConfigError
from lorgnette.quantize.methods import method_names
from lorgnette.quantize.plan import GROUP, PLANS, Promise, QuantPlan, Rule, Scaling, find_plan
from lorgnette.quantize.scheme import (
    FLOAT_BITS,
    GROUP_SIZES,
    INTEGER_BITS,
    PALETTE_BITS,
    Activations,
    QuantScheme,
    ScaleBits,
)
from lorgnette.recipe import PlanRule, PlanText, Recipe

if TYPE_CHECKING:
    from typing import Any

CHANNEL, TENSOR = "channel", "tensor"
PALETTE_METHOD = "kmeans"
MAX_BYTES = 1 << 20
MAX_RULES = 1000
INTEGER_KEYS = (
    "group",
    "scale_bits",
    "symmetric",
    "narrow",
    "activations",
    "method",
    "scaling",
    "palette",
    "rows",
)
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")


class Named(Protocol):
    """A matrix, by what selectors see of it."""

    @property
    def component(self) -> str:
        """Its component."""

    @property
    def name(self) -> str:
        """Its parameter."""


def plan_for(recipe: Recipe) -> QuantPlan:
    """The plan that a recipe asks for: its own rules, or a named plan.

    Raises:
        ConfigError: There is no plan of that name, or its own is not a plan.
    """
    if recipe.plan is None:
        return find_plan(recipe.quant)
    if recipe.plan.name != recipe.quant:
        raise ConfigError(
            "the recipe asks for two plans",
            got=f"quant {recipe.quant!r} and plan {recipe.plan.name!r}",
            hint="give one of them",
        )
    return build_plan(recipe.plan, f"plan '{recipe.plan.name}'")


def read_plan_file(path: Path) -> PlanText:
    """The rules of a plan file, checked.

    Raises:
        ConfigError: It cannot be read, or a key or a value is not a plan's.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError("the plan is too long", where=path, wanted=f"<= {MAX_BYTES} bytes")
        values = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise ConfigError("cannot read the plan", where=path, got=error.strerror) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError("the plan is not valid TOML", where=path, got=error) from error
    text = _convert(values, str(path))
    build_plan(text, str(path))
    return text


def build_plan(text: PlanText, where: str) -> QuantPlan:
    """The plan that plain data means.

    Raises:
        ConfigError: A value is out of bounds.
    """
    if not NAME.fullmatch(text.name):
        raise ConfigError(
            "a plan's name is not allowed",
            where=where,
            got=repr(text.name),
            wanted="up to 40 of a-z, 0-9, '.', '_' and '-', the first a letter or digit",
        )
    if text.name in PLANS:
        raise ConfigError("the name is that of a built-in plan", where=where, got=repr(text.name))
    if not 1 <= len(text.rule) <= MAX_RULES:
        raise ConfigError(
            "a plan has no rules" if not text.rule else "a plan has too many rules",
            where=where,
            got=len(text.rule),
            wanted=f"1 to {MAX_RULES} of [[rule]]",
        )
    rules = (
        _rule(rule, f"{where}, rule {number}") for number, rule in enumerate(text.rule, start=1)
    )
    return QuantPlan(
        text.name,
        text.summary,
        tuple(rules),
        rotate=text.rotate,
        cache_bits=_cache_bits(text.cache_bits, where),
        promise=_promise(text, where),
    )


def _cache_bits(bits: int, where: str) -> Literal[8, 32]:
    _one_of("cache_bits", bits, (8, 32), where)
    return 8 if bits == 8 else 32


def _promise(text: PlanText, where: str) -> Promise | None:
    if text.max_kl is None and text.min_same_answer is None:
        return None
    kl = math.inf if text.max_kl is None else text.max_kl
    same = 0.0 if text.min_same_answer is None else text.min_same_answer
    if not kl >= 0:
        raise ConfigError("'max_kl' is out of bounds", where=where, got=kl, wanted="0 or more")
    if not 0 <= same <= 1:
        raise ConfigError(
            "'min_same_answer' is out of bounds", where=where, got=same, wanted="0 to 1"
        )
    return Promise(kl, same)


def check_rules(plan: QuantPlan, matrices: Sequence[Named]) -> None:
    """Checks that every matrix is selected by a rule, and that every rule decides about some.

    Named plans are for every family, so a rule of theirs may be for what this model has not.

    Raises:
        ConfigError: Naming the matrix, or the rule that is misspelt or comes too late.
    """
    used = {id(plan.rule_for(matrix.component, matrix.name)) for matrix in matrices}
    if plan is PLANS.get(plan.name):
        return
    for number, rule in enumerate(plan.rules, start=1):
        if id(rule) not in used:
            components = ", ".join(dict.fromkeys(matrix.component for matrix in matrices))
            raise ConfigError(
                f"rule {number} decides about no matrix",
                where=f"plan '{plan.name}'",
                got=f"select {rule.select!r}",
                wanted=f"component/parameter of {components}",
                hint="the first rule that selects a matrix decides; patterns are matched whole",
            )


def _convert(values: dict[str, Any], where: str) -> PlanText:
    """TOML as plan data; the first key or value that is none is named with its rule."""
    _check_keys(values, PlanText.__struct_fields__, where)
    rules = values.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ConfigError("rules are not a list of tables", where=where, wanted="[[rule]]")
    for number, rule in enumerate(rules, start=1):
        _check_keys(rule, PlanRule.__struct_fields__, f"{where}, rule {number}")
        try:
            msgspec.convert(rule, PlanRule)
        except msgspec.ValidationError as error:
            raise ConfigError(
                "a rule has a value of the wrong kind or lacks one",
                where=f"{where}, rule {number}",
                got=error,
            ) from error
    try:
        return msgspec.convert({**values, "rule": rules}, PlanText)
    except msgspec.ValidationError as error:
        raise ConfigError(
            "the plan has a value of the wrong kind or lacks one", where=where, got=error
        ) from error


def _check_keys(values: Collection[str], known: Collection[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(
                "unknown key of a plan",
                where=where,
                got=repr(key),
                wanted=f"one of {', '.join(known)}",
            )


def _rule(text: PlanRule, where: str) -> Rule:
    integers = PALETTE_BITS if text.palette else INTEGER_BITS
    _one_of("bits", text.bits, (*integers, *FLOAT_BITS), where)
    if "/" not in text.select and text.select != "*":
        raise ConfigError(
            "a selector names no component",
            where=where,
            got=repr(text.select),
            wanted="component/parameter, such as 'decoder/*', or '*'",
        )
    if text.bits in FLOAT_BITS:
        _refuse(text, INTEGER_KEYS, f"bits = {text.bits}", where)
        return Rule(text.select, QuantScheme(bits=text.bits))
    method = text.method or (PALETTE_METHOD if text.palette else "rtn")
    _one_of("method", method, method_names(), where)
    if (method == PALETTE_METHOD) != bool(text.palette):
        raise ConfigError(
            "palettes and their method go together",
            where=where,
            got=f"palette = {str(bool(text.palette)).lower()} and method {method!r}",
            wanted=f"palette = true with method {PALETTE_METHOD!r}, or neither",
        )
    scaling = text.scaling or "none"
    _one_of("scaling", scaling, get_args(Scaling), where)
    scheme = _palette(text, where) if text.palette else _steps(text, where)
    return Rule(text.select, scheme, method, msgspec.convert(scaling, Scaling))


def _palette(text: PlanRule, where: str) -> QuantScheme:
    keys = ("group", "scale_bits", "symmetric", "narrow", "activations")
    _refuse(text, keys, "palette = true", where)
    rows = text.rows or 0
    if rows < 0:
        raise ConfigError("'rows' is out of bounds", where=where, got=rows, wanted="1 or more")
    return QuantScheme(bits=text.bits, palette=True, table_rows=rows)


def _steps(text: PlanRule, where: str) -> QuantScheme:
    """The scheme of codes that are multiples of a step."""
    _refuse(text, ("rows",), "no palette", where)
    group = GROUP if text.group is None else text.group
    _one_of("group", group, (*GROUP_SIZES, CHANNEL, TENSOR), where)
    activations = "float" if text.activations is None else text.activations
    _one_of("activations", activations, get_args(Activations), where)
    scale_bits = 32 if text.scale_bits is None else text.scale_bits
    _one_of("scale_bits", scale_bits, get_args(ScaleBits), where)
    symmetric = text.symmetric is not False
    if text.narrow and (text.bits != 8 or not isinstance(group, str) or not symmetric):
        raise ConfigError(
            "'narrow' is for symmetric codes of 8 bits by channel",
            where=where,
            got=f"{text.bits} bits, group {group}, symmetric {str(symmetric).lower()}",
        )
    return QuantScheme(
        bits=text.bits,
        narrow=bool(text.narrow),
        scale_bits=msgspec.convert(scale_bits, ScaleBits),
        group_size=0 if isinstance(group, str) else group,
        symmetric=symmetric,
        activations=msgspec.convert(activations, Activations),
        per_tensor=group == TENSOR,
    )


def _refuse(text: PlanRule, keys: Collection[str], kind: str, where: str) -> None:
    """Refuses keys that mean nothing for a kind of rule."""
    for key in keys:
        if getattr(text, key) is not None:
            raise ConfigError(f"'{key}' does not go with {kind}", where=where)


def _one_of(key: str, value: object, allowed: Collection[object], where: str) -> None:
    if value not in allowed:
        raise ConfigError(
            f"'{key}' is out of bounds",
            where=where,
            got=repr(value),
            wanted=f"one of {', '.join(map(str, allowed))}",
        )
