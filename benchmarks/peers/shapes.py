"""The shapes that are measured: random weights in every form that a peer reads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.peers.peer import Case
from lorgnette.bundle import open_bundle
from lorgnette.manifest import Manifest
from lorgnette.runtime.model import TOKENIZER
from lorgnette.runtime.preprocess import grid_for
from lorgnette.runtime.prompt import ImagePart, Message, continue_prompt, encode_prompt
from lorgnette.runtime.tokenizer import Tokenizer
from lorgnette.spec import TilePreprocess
from tests.helpers import make_random_published
from tests.make_omnivlm import (
    make_omnivlm,
    make_published_pair,
    published_config,
)

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "tests/golden/configs"
QUESTION = "Can you describe this image?"
SECOND = "What stands on the left of it, and which colour does it have?"
CONTEXT = 2048


@dataclass(frozen=True)
class Shape:
    """A published shape.

    Attributes:
        name: As on the command line.
        config: Its config.json.
        tiles: Tiles of the full tiling of a picture as large as a tile.
    """

    name: str
    config: Path
    tiles: int


SHAPES = {
    "SmolVLM-256M": Shape("SmolVLM-256M", CONFIGS / "SmolVLM-256M-Instruct.json", 17),
    "OmniVLM-968M": Shape("OmniVLM-968M", CONFIGS / "omnivlm/OmniVLM-968M.json", 1),
}


def make_case(shape: Shape, folder: Path, bundle: Path | None) -> Case:
    """Makes what is not there yet: checkpoint, decoder, tower, bundle, ids.

    Args:
        shape: What to make.
        folder: Where it is kept.
        bundle: Our bundle; None exports one with `int4-fast`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    _once(checkpoint, lambda place: _make_checkpoint(shape, place))
    split = _split_omnivlm if shape.name.startswith("OmniVLM") else _split_smolvlm
    parts = folder / "parts"
    _once(parts, lambda place: split(shape, checkpoint, place))
    if bundle is None:
        bundle = folder / "ours.lorg"
        if not bundle.exists():
            _export(checkpoint, bundle)
    case = _case(shape, folder, bundle.resolve())
    case.save(folder / "case.json")
    return case


def _once(place: Path, make: Callable[[Path], None]) -> None:
    """Makes a folder unless it is there whole."""
    if place.exists():
        return
    unfinished = place.with_name(f"{place.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    make(unfinished)
    unfinished.rename(place)


def _make_checkpoint(shape: Shape, place: Path) -> None:
    if shape.name.startswith("OmniVLM"):
        make_published_pair(place, shape.config)
    else:
        make_random_published(place, shape.config)


def _export(checkpoint: Path, bundle: Path) -> None:
    print(f"exporting {bundle.name}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "lorgnette", "export", str(checkpoint)]
    command += ["--target", "onnx-cpu", "--quant", "int4-fast", "--context", str(CONTEXT)]
    command += ["--measure", "0", "--out", str(bundle)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def _split_smolvlm(shape: Shape, checkpoint: Path, place: Path) -> None:
    """The decoder as a Llama of transformers, the tower as its SigLIP with a projector behind."""
    config = json.loads((checkpoint / "config.json").read_text())
    names = {
        "model.text_model.": "model.",
        "lm_head.": "lm_head.",
        "model.vision_model.": "tower.",
        "model.connector.modality_projection.proj.": "projector.",
    }
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        _write_parts(place, _renamed(tensors, names))
    vision = {"num_hidden_layers": 12, "intermediate_size": 3072} | config["vision_config"]
    _write_vision(place, vision | {"layer_norm_eps": 1e-6, "shuffle": config["scale_factor"]})
    _write_text(place, config["text_config"], "Llama", tied=config["tie_word_embeddings"])


def _split_omnivlm(shape: Shape, checkpoint: Path, place: Path) -> None:
    """The decoder as a Qwen2 of transformers, the tower as its SigLIP with a projector behind."""
    config = published_config(shape.config)
    names = {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "tower.",
        "multi_modal_projector.": "projector.",
    }
    normal = make_omnivlm(place / "normal", config, dtype="bfloat16")
    with safe_open(normal / "model.safetensors", "pt") as file:
        tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        _write_parts(place, _renamed(tensors, names))
    shutil.rmtree(normal)
    _write_vision(place, config["vision_config"] | {"group": config["projector_group"]})
    _write_text(place, config["text_config"], "Qwen2", tied=config["tie_word_embeddings"])


def _renamed(
    tensors: Iterator[tuple[str, torch.Tensor]], names: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors under the names of the parts; what no part has is left out."""
    for name, tensor in tensors:
        for old, new in names.items():
            if name.startswith(old):
                yield new + name.removeprefix(old), tensor


def _write_parts(place: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    text: dict[str, torch.Tensor] = {}
    vision: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        part = text if name.startswith(("model.", "lm_head.")) else vision
        part[name] = tensor.to(torch.bfloat16).contiguous()
    for folder, part in (("text", text), ("vision", vision)):
        (place / folder).mkdir()
        save_file(part, place / folder / "model.safetensors", metadata={"format": "pt"})


def _write_vision(place: Path, config: Mapping[str, Any]) -> None:
    (place / "vision" / "config.json").write_text(json.dumps(dict(config), indent=1))


def _write_text(place: Path, config: Mapping[str, Any], kind: str, *, tied: bool) -> None:
    """config.json and the tokenizer, as transformers' class reads them."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    values = dict(config) | {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    if kind == "Llama":
        values |= ids
    (place / "text" / "config.json").write_text(json.dumps(values, indent=1))


def _case(shape: Shape, folder: Path, bundle: Path) -> Case:
    manifest = open_bundle(bundle).manifest
    tokenizer = Tokenizer.from_file(bundle / TOKENIZER)
    edge = manifest.spec.vision.image_size
    grids = {"1": (0, 0)}
    if isinstance(manifest.preprocess, TilePreprocess):
        grid = grid_for(edge, edge, manifest.preprocess)
        grids[str(grid[0] * grid[1] + 1)] = grid
    prompts = {tiles: _ids(manifest, tokenizer, *grid) for tiles, grid in grids.items()}
    if str(shape.tiles) not in prompts:
        raise SystemExit(f"{bundle}: a picture makes {max(grids)} tiles, not {shape.tiles}")
    last = prompts[str(shape.tiles)]
    again = continue_prompt(manifest.prompt, tokenizer, last, [Message("user", (SECOND,))])
    return Case(
        shape=shape.name,
        checkpoint=str((folder / "checkpoint").resolve()),
        text=str((folder / "parts/text").resolve()),
        vision=str((folder / "parts/vision").resolve()),
        tile=edge,
        tokens_per_tile=manifest.spec.image_tokens_per_tile,
        image_id=manifest.spec.image_token_id,
        vocab_size=manifest.spec.text.vocab_size,
        prompts=prompts,
        second=again.ids[again.keep :],
        question=QUESTION,
        further=SECOND,
        context=CONTEXT,
        bundle=str(bundle),
    )


def _ids(manifest: Manifest, tokenizer: Tokenizer, rows: int, cols: int) -> list[int]:
    message = Message("user", (ImagePart(rows, cols), QUESTION))
    return encode_prompt(manifest.prompt, tokenizer, [message])
