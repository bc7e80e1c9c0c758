"""Plans as the text of a plan file."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence

import msgspec

from lorgnette.quantize.plan import Rule
from lorgnette.quantize.plan_file import CHANNEL, TENSOR
from lorgnette.recipe import PlanRule, PlanText


def rule_text(rule: Rule) -> PlanRule:
    """A rule as a plan file says it: what it leaves out means the same."""
    scheme = rule.scheme
    if not scheme.is_integer:
        return PlanRule(select=rule.select, bits=scheme.bits)
    scaling = None if rule.scaling == "none" else rule.scaling
    if scheme.palette:
        return PlanRule(
            select=rule.select,
            bits=scheme.bits,
            palette=True,
            rows=scheme.table_rows or None,
            method=rule.method,
            scaling=scaling,
        )
    return PlanRule(
        select=rule.select,
        bits=scheme.bits,
        group=scheme.group_size or (TENSOR if scheme.per_tensor else CHANNEL),
        symmetric=None if scheme.symmetric else False,
        narrow=True if scheme.narrow else None,
        scale_bits=None if scheme.scale_bits == 32 else scheme.scale_bits,
        activations=None if scheme.activations == "float" else scheme.activations,
        method=rule.method,
        scaling=scaling,
    )


def to_toml(
    text: PlanText, notes: Mapping[int, str] | None = None, head: Sequence[str] = ()
) -> str:
    """A plan as the text of a plan file, which `read_plan_file` reads back to the same.

    Args:
        text: The plan.
        notes: A comment in front of a rule, by the rule's number from 0.
        head: Comments at the top.
    """
    lines = [_comment(line) for line in head]
    lines += _pairs(text, PlanText, ("rule",))
    for number, rule in enumerate(text.rule):
        note = (notes or {}).get(number)
        lines += ["", *([_comment(note)] if note else []), "[[rule]]"]
        lines += _pairs(rule, PlanRule, ())
    return "\n".join(lines) + "\n"


def _pairs(
    of: PlanText | PlanRule, kind: type[PlanText | PlanRule], but: Collection[str]
) -> list[str]:
    """The keys that do not have their defaults."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(kind)}
    return [
        f"{key} = {_value(value)}"
        for key, value in msgspec.structs.asdict(of).items()
        if key not in but and value != defaults[key]
    ]


def _value(value: object) -> str:
    if isinstance(value, float):
        return repr(value)
    # A JSON string is a TOML one, but for the character that JSON need not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    return "# " + re.sub(r"[\x00-\x1f\x7f]", " ", text)
