"""What peers convert, against transformers; the work counted for it, against torch's counter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.modules import Decoder, Tower, decoder_of, tower_of
from benchmarks.peers.peer import Case
from benchmarks.peers.work import decode_bytes, decoder_weights, prefill_flop, vision_flop

TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}


def write_case(folder: Path, text: dict[str, Any], vision: dict[str, Any]) -> Case:
    return Case(
        shape="tiny",
        checkpoint="",
        text=str(folder / "text"),
        vision=str(folder / "vision"),
        tile=vision["image_size"],
        tokens_per_tile=4,
        image_id=7,
        vocab_size=text["vocab_size"],
        prompts={"1": [1, 2, 3]},
        second=[3],
        question="",
        further="",
        context=64,
    )


def write_part(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {k: v.to(torch.bfloat16).contiguous() for k, v in weights.items()},
        folder / "model.safetensors",
    )


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("qwen2", True)])
@torch.no_grad()
def test_the_decoder_is_that_of_transformers(kind: str, tied: bool, tmp_path: Path) -> None:
    import transformers

    config = TEXT | {"model_type": kind, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.float32
    ).eval()
    for parameter in model.parameters():
        parameter.copy_((parameter + torch.randn_like(parameter) * 0.2).bfloat16().float())
    weights = dict(model.state_dict())
    if tied:
        weights.pop("lm_head.weight")
    write_part(tmp_path / "text", config, weights)
    decoder = decoder_of(write_case(tmp_path, config, VISION))
    ids = torch.randint(0, 96, (1, 9))
    caches = [torch.zeros(decoder.cache_shape)] * 4
    beam = torch.zeros(1, dtype=torch.long)
    _, *caches = decoder(ids[:, :5], beam, *caches)
    logits, *_ = decoder(ids[:, 5:], beam, *caches)
    wanted = model(ids).logits[:, -1:]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_tower_is_that_of_transformers(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.Idefics3Config(
        text_config=TEXT,
        vision_config=VISION,
        scale_factor=3,
    )
    model = transformers.models.idefics3.modeling_idefics3.Idefics3Model(config).eval()
    names = {"vision_model.": "tower.", "connector.modality_projection.proj.": "projector."}
    weights = {}
    for name, parameter in model.state_dict().items():
        for old, new in names.items():
            if name.startswith(old):
                parameter.copy_((parameter + torch.randn_like(parameter) * 0.1).bfloat16().float())
                weights[new + name.removeprefix(old)] = parameter
    write_part(tmp_path / "vision", VISION | {"shuffle": 3}, weights)
    write_part(tmp_path / "text", TEXT, {"x": torch.zeros(1)})
    tower = tower_of(write_case(tmp_path, TEXT, VISION))
    pixels = torch.rand(2, 3, 48, 48) * 2 - 1
    wanted = model.connector(model.vision_model(pixels).last_hidden_state)
    torch.testing.assert_close(tower(pixels), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("projector", [{"shuffle": 3}, {"group": 9}])
def test_the_work_of_a_tile_is_what_torch_counts(projector: dict[str, int]) -> None:
    config = VISION | projector
    tower = Tower(config, 48)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, 48, 48))
    assert vision_flop(config, 48) == counter.get_total_flops()


def test_the_work_of_a_prompt_is_what_torch_counts() -> None:
    decoder = Decoder(TEXT)
    tokens = 20
    caches = [torch.zeros(decoder.cache_shape)] * 4
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(torch.zeros(1, tokens, dtype=torch.long), torch.zeros(1, dtype=torch.long), *caches)
    # torch counts the whole square of a causal attention: 4 T T D a layer, half of it unneeded.
    square = 4 * tokens * tokens * 48 * 2
    assert prefill_flop(TEXT, tokens) == counter.get_total_flops() - square // 2


def test_a_decoded_token_reads_every_weight_and_the_cache() -> None:
    decoder = Decoder(TEXT)
    named = decoder.named_parameters()
    matrices = [p.numel() for name, p in named if p.dim() == 2 and "embed" not in name]
    assert sum(decoder_weights(TEXT)) == sum(matrices)
    cache = 10 * 2 * 2 * 2 * 8 * 2  # positions, layers, keys and values, heads, size, bytes
    assert decode_bytes(TEXT, 10) == sum(matrices) * 0.5625 + cache
