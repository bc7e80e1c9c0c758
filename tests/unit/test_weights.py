"""Weight maps: names, shapes, strictness in both directions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorgnette.errors import EXIT_WRONG_INPUT, CheckpointError
from lorgnette.export.families.smolvlm import IGNORED_TENSORS
from lorgnette.export.weights import (
    Computed,
    Flatten,
    Part,
    Rule,
    Stack,
    WeightSource,
    check_all_used,
    load_module,
    module_shapes,
    resolve_rule,
)
from tests.eager import Eager
from tests.helpers import make_checkpoint, tiny_config, write_weights
from tests.small import tensor_folder

Weights = dict[str, Tensor]
QUERY = "model.text_model.layers.1.self_attn.q_proj.weight"
PATCH = "model.vision_model.embeddings.patch_embedding.weight"
HEAD = "lm_head.weight"


def refused(folder: Path, change: Callable[[Weights], object], *parts: str) -> None:
    """Changes the weights of a good checkpoint and expects it to be refused on loading."""
    make_checkpoint(folder, tiny_config())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    write_weights(folder, weights)
    with pytest.raises(CheckpointError) as caught:
        assert Eager(folder).modules
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", [QUERY, PATCH, HEAD, "model.text_model.norm.weight"])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    refused(tmp_path, lambda w: w.pop(name), f"'{name}' is missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.text_model.layers.3.self_attn.q_proj.weight",
        "model.text_model.layers.0.self_attn.q_proj.bias",
        "model.vision_model.head.probe",
        "lora.weight",
    ],
)
def test_unknown_tensor(tmp_path: Path, name: str) -> None:
    refused(
        tmp_path, lambda w: w.update({name: torch.ones(2)}), f"1 unknown tensor(s), first '{name}'"
    )


def test_unknown_tensors_are_counted(tmp_path: Path) -> None:
    extra = {f"extra.{i}": torch.ones(1) for i in range(3)}
    refused(tmp_path, lambda w: w.update(extra), "3 unknown", "'extra.0'")


@pytest.mark.parametrize(
    "name",
    [
        "model.text_model.layers.2.self_attn.rotary_emb.inv_freq",
        "model.vision_model.embeddings.position_ids",
    ],
)
def test_leftovers_of_old_exporters_are_ignored(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, tiny_config())
    weights = load_file(tmp_path / "model.safetensors")
    write_weights(tmp_path, weights | {name: torch.ones(3)})
    assert Eager(tmp_path).modules


@pytest.mark.parametrize("name", [QUERY, PATCH, "model.text_model.norm.weight"])
@pytest.mark.parametrize("kind", ["longer", "transposed", "flat", "more axes"])
def test_wrong_shape(tmp_path: Path, name: str, kind: str) -> None:
    def change(weights: Weights) -> None:
        old = weights[name]
        weights[name] = {
            "longer": torch.cat([old, old]),
            "transposed": old.movedim(0, -1)[..., None] if old.dim() != 4 else old.movedim(0, -1),
            "flat": old.flatten()[:-1],
            "more axes": old[None],
        }[kind].contiguous()

    refused(tmp_path, change, f"'{name}' has the wrong shape", "wanted [", "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [QUERY, PATCH, "model.vision_model.post_layernorm.bias"])
def test_value_that_is_not_finite(tmp_path: Path, name: str, value: float) -> None:
    refused(tmp_path, lambda w: w[name].flatten()[-1:].fill_(value), f"'{name}'", "not finite")


def test_double_that_overflows_float32(tmp_path: Path) -> None:
    name = "model.text_model.norm.weight"
    refused(
        tmp_path, lambda w: w.update({name: w[name].double() * 1e300}), f"'{name}'", "not finite"
    )


def test_rules() -> None:
    rules: dict[str, Rule] = {
        "embed": Flatten("conv.{i}", (2, 3)),
        "embed.weight": Flatten("conv.weight", (4, 3, 2, 2)),
        "layers.{i}.up": "model.h.{i}.w1",
        "layers.{i}.gain": "model.h.{i}.g.weight",
        "norm": "model.norm",
        "layers.{i}.both": Stack((("model.h.{i}.a", 3), ("model.h.{i}.b", 1))),
        "table": Computed(lambda: torch.ones(1)),
    }
    for name, shape, wanted in (
        ("layers.12.up.weight", (4, 5), [("model.h.12.w1.weight", (4, 5))]),
        ("layers.3.up.bias", (4,), [("model.h.3.w1.bias", (4,))]),
        ("norm.weight", (4,), [("model.norm.weight", (4,))]),
        ("embed.weight", (4, 12), [("conv.weight", (4, 3, 2, 2))]),
        ("layers.3.gain", (4,), [("model.h.3.g.weight", (4,))]),
        (
            "layers.2.both.weight",
            (4, 5),
            [("model.h.2.a.weight", (3, 5)), ("model.h.2.b.weight", (1, 5))],
        ),
    ):
        assert resolve_rule(name, shape, rules) == tuple(Part(*part) for part in wanted)
    assert resolve_rule("table", (1,), rules) is rules["table"]
    with pytest.raises(KeyError):
        resolve_rule("head.weight", (4, 4), rules)


class Small(nn.Module):
    """A parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Linear(12, 2)
        self.plain = nn.Parameter(torch.empty(3))
        self.table = nn.Buffer(torch.empty(2, 2))


def test_source_reads_flattens_and_computes(tmp_path: Path) -> None:
    conv = torch.arange(24.0).reshape(2, 3, 2, 2)
    weights = {"c.weight": conv, "c.bias": torch.ones(2), "p": torch.arange(3.0)}
    checkpoint = tensor_folder(tmp_path, weights)
    with torch.device("meta"):
        module = Small()
    rules: dict[str, Rule] = {
        "flat.weight": Flatten("c.weight", (2, 3, 2, 2)),
        "flat": "c",
        "plain": "p",
        "table": Computed(lambda: torch.eye(2, dtype=torch.float64)),
    }
    source = WeightSource(checkpoint, module_shapes(module), rules)
    assert source.used_tensors() == {"c.weight", "c.bias", "p"}
    assert [source.origin(n) for n in ("flat.weight", "plain", "table")] == ["c.weight", "p", None]
    loaded = load_module(module, source).state_dict()
    assert torch.equal(loaded["flat.weight"], conv.reshape(2, 12))
    assert torch.equal(loaded["flat.bias"], torch.ones(2))
    assert torch.equal(loaded["plain"], weights["p"])
    assert torch.equal(loaded["table"], torch.eye(2))
    assert {t.dtype for t in loaded.values()} == {torch.float32}
    check_all_used(checkpoint, [source], {})


def test_every_published_tensor_is_read_once_or_ignored(tmp_path: Path) -> None:
    """No tensor feeds two parameters but a tied embedding."""
    for tied in (False, True):
        eager = Eager(make_checkpoint(tmp_path / str(tied), tiny_config(), tied=tied))
        used = [
            origin
            for source in eager.sources.values()
            for name in source.shapes
            for origin in (source.origin(name) or "").split("+")
            if origin
        ]
        twice = {name for name in used if used.count(name) > 1}
        assert twice == ({"model.text_model.embed_tokens.weight"} if tied else set())
        assert set(used) == set(eager.checkpoint.tensors)
    assert HEAD.replace(".", r"\.") in IGNORED_TENSORS


def test_stacked_rows(tmp_path: Path) -> None:
    """Rows come in the order of the rule; a part of another height is refused."""
    weights = {"a.weight": torch.arange(6.0).reshape(3, 2), "b.weight": torch.full((1, 2), 9.0)}
    checkpoint = tensor_folder(tmp_path, weights)
    shapes = {"both.weight": (4, 2)}
    source = WeightSource(checkpoint, shapes, {"both": Stack((("a", 3), ("b", 1)))})
    assert torch.equal(
        source.tensor("both.weight"), torch.cat([weights["a.weight"], weights["b.weight"]])
    )
    assert source.used_tensors() == {"a.weight", "b.weight"}
    with pytest.raises(CheckpointError, match=r"'a\.weight' has the wrong shape"):
        WeightSource(checkpoint, shapes, {"both": Stack((("a", 2), ("b", 2)))})
