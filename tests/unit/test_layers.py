"""Towers and the decoder against transformers, through their weight rules, at random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from lorgnette.export.layers.decoder import LlamaDecoder, llama_rules
from lorgnette.export.layers.mlp import Activation, activate
from lorgnette.export.layers.vision import ClipTower, SiglipTower, clip_rules, siglip_rules
from lorgnette.export.weights import Rule, WeightSource, load_module, module_shapes
from lorgnette.spec import TextSpec, VisionSpec
from tests.eager import random_tiles
from tests.small import tensor_folder

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
TOLERANCE = 2e-5


class Tower(nn.Module):
    """A tower under the name that its rules use."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, tiles: Tensor) -> Tensor:
        return self.tower(tiles)  # type: ignore[no-any-return]


def loaded(
    folder: Path,
    build: Callable[[], nn.Module],
    rules: Mapping[str, Rule],
    tensors: Mapping[str, Tensor],
) -> tuple[nn.Module, WeightSource]:
    """A module filled from a checkpoint by rules."""
    with torch.device("meta"):
        module = build()
    source = WeightSource(tensor_folder(folder, tensors), module_shapes(module), rules)
    return load_module(module, source), source


def randomise(model: nn.Module) -> None:
    """Weights that make biases, norms and tokens count."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() == 1:
                value.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
            else:
                value.copy_(noise / value[0].numel() ** 0.5)


def published(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The tensors of a model as a checkpoint names them."""
    return {
        prefix + name: value.detach().clone().contiguous()
        for name, value in model.state_dict().items()
    }


def pixels(tiles: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """What the published preprocessing makes of bytes."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (torch.from_numpy(tiles) / 255 - mean) / std


def vision_numbers(layers: int, heads: int, image: int, patch: int, eps: float) -> VisionSpec:
    return VisionSpec(
        hidden_size=48,
        intermediate_size=72,
        layers=layers,
        heads=heads,
        image_size=image,
        patch_size=patch,
        norm_eps=eps,
    )


@pytest.mark.parametrize(
    ("layers", "heads", "image", "patch", "eps"),
    [(3, 4, 28, 7, 1e-5), (1, 2, 32, 8, 1e-5), (2, 3, 30, 7, 0.1), (2, 4, 96, 4, 1e-5)],
)
def test_clip_tower_gives_the_last_layer_but_one_without_class_token(
    tmp_path: Path, layers: int, heads: int, image: int, patch: int, eps: float
) -> None:
    spec = vision_numbers(layers, heads, image, patch, eps)
    config = transformers.CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=layers + 1,
        num_attention_heads=heads,
        image_size=image,
        patch_size=patch,
        layer_norm_eps=eps,
        hidden_act="quick_gelu",
        attn_implementation="eager",
    )
    oracle = transformers.CLIPVisionModel(config).eval()
    randomise(oracle)
    prefix = "model.vision_tower.vision_tower.vision_model."
    rules = clip_rules(prefix, spec, rescale=1 / 255, mean=MEAN, std=STD)
    module, source = loaded(
        tmp_path, lambda: Tower(ClipTower(spec)), rules, published(oracle, prefix)
    )
    tiles = random_tiles(2, image)
    with torch.no_grad():
        wanted = oracle(pixels(tiles), output_hidden_states=True).hidden_states[-2][:, 1:]
        got = module(torch.from_numpy(tiles))
    assert got.shape == (2, (image // patch) ** 2, 48)
    assert float(wanted.std()) > 0.5
    assert float((got - wanted).abs().max()) <= TOLERANCE
    unread = {name.removeprefix(prefix) for name in source.checkpoint.tensors}
    unread -= {name.removeprefix(prefix) for name in source.used_tensors()}
    # Nothing but the layer that does not run and the norm behind it.
    assert all(n.startswith((f"encoder.layers.{layers}.", "post_layernorm.")) for n in unread)
    assert len(unread) == 16 + 2


@pytest.mark.parametrize(("image", "patch", "eps"), [(24, 8, 1e-6), (28, 9, 0.1)])
def test_siglip_tower(tmp_path: Path, image: int, patch: int, eps: float) -> None:
    spec = vision_numbers(2, 4, image, patch, eps)
    config = transformers.SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image,
        patch_size=patch,
        layer_norm_eps=eps,
        vision_use_head=False,
        attn_implementation="eager",
    )
    oracle = transformers.SiglipVisionModel(config).eval()
    randomise(oracle)
    prefix = "vision_tower.vision_model."
    rules = siglip_rules(prefix, spec, rescale=1 / 255, mean=MEAN, std=STD)
    module, source = loaded(
        tmp_path, lambda: Tower(SiglipTower(spec)), rules, published(oracle, prefix)
    )
    tiles = random_tiles(2, image)
    with torch.no_grad():
        wanted = oracle(pixels(tiles)).last_hidden_state
        got = module(torch.from_numpy(tiles))
    assert float((got - wanted).abs().max()) <= TOLERANCE
    assert source.used_tensors() == set(source.checkpoint.tensors)


def text_numbers(heads: int, kv_heads: int, size: int, *, bias: bool, tied: bool) -> TextSpec:
    return TextSpec(
        hidden_size=56,
        intermediate_size=88,
        layers=2,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        vocab_size=97,
        max_positions=64,
        rope_theta=1e4,
        norm_eps=1e-5,
        tied_embeddings=tied,
        qkv_bias=bias,
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "kind", "tied"),
    [
        (14, 2, 4, "Qwen2", True),
        (4, 4, 14, "Qwen2", False),
        (2, 2, 80, "Llama", False),
        (2, 2, 128, "Llama", False),
    ],
)
def test_decoder_in_one_pass_and_in_chunks(
    tmp_path: Path, heads: int, kv_heads: int, size: int, kind: str, tied: bool
) -> None:
    spec = text_numbers(heads, kv_heads, size, bias=kind == "Qwen2", tied=tied)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=56,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
        vocab_size=97,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    oracle = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    randomise(oracle)
    biases = [name for name, _ in oracle.named_parameters() if name.endswith(".bias")]
    assert len(biases) == (3 * 2 if kind == "Qwen2" else 0)
    tensors = published(oracle, "language_model.")
    if tied:
        del tensors["language_model.lm_head.weight"]
    head = "language_model.model.embed_tokens" if tied else "language_model.lm_head"
    module, source = loaded(
        tmp_path,
        lambda: LlamaDecoder(spec, 32),
        llama_rules("language_model.model.", head, spec, 32),
        tensors,
    )
    if not tied:
        del tensors["language_model.model.embed_tokens.weight"]
    assert source.used_tensors() == set(tensors)
    embeddings = torch.randn(1, 20, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = oracle(inputs_embeds=embeddings).logits[0]
        for chunks in ([20], [3, 1, 1, 15]):
            caches, past = [torch.zeros(1, kv_heads, 32, size) for _ in range(4)], 0
            for count in chunks:
                part = embeddings[:, past : past + count]
                logits, caches = module(part, torch.tensor([past], dtype=torch.int32), caches)
                past += count
                assert float((logits[0] - wanted[past - 1]).abs().max()) <= TOLERANCE, chunks


def test_activations_are_those_of_transformers() -> None:
    x = torch.linspace(-8, 8, 999)
    kinds: dict[Activation, str] = {
        "gelu": "gelu",
        "gelu_tanh": "gelu_pytorch_tanh",
        "quick_gelu": "quick_gelu",
    }
    for ours, theirs in kinds.items():
        assert torch.equal(activate(x, ours), transformers.activations.ACT2FN[theirs](x))
