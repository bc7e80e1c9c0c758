"""Checkpoints with random weights in the published layout, for tests and measurements.

`python -m tests.helpers --config tests/golden/configs/SmolVLM-256M-Instruct.json --out DIR` makes
one of a published size.
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

Config = dict[str, Any]
DtypeName = Literal["float32", "bfloat16", "float16"]

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = GOLDEN / "configs"
PUBLISHED_TOKENIZER = GOLDEN / "text_smolvlm_tokenizer.json.xz"
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
FIRST_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
ROWS = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
LINES = (
    "User: What is in this picture, and where is it?\nAssistant: A red circle on the left.",
    "User: How many blue squares are there?\nAssistant: There are 3 of them.",
    "Read the sign above the door. Describe the weather in one sentence.",
)
PIECES = 448
VOCABULARY = 512
"""Ids of `small_tokenizer`, a multiple of 32."""


def small_tokenizer() -> Tokenizer:
    """A byte-level BPE of SmolVLM's kind, with the same added tokens, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=list(FIRST_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    added = ["<global-img>", *ROWS, FAKE, IMAGE]
    spare = VOCABULARY - tokenizer.get_vocab_size() - len(added) - 1
    added += [f"<|reserved_special_token_{i}|>" for i in range(spare)] + [END]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    return tokenizer


def published_tokenizer(vocab_size: int) -> Tokenizer:
    """The tokenizer of SmolVLM: 49280 ids, or the 49155 of the first 2.2B."""
    source = json.loads(lzma.decompress(PUBLISHED_TOKENIZER.read_bytes()))
    if vocab_size == 49280:
        return Tokenizer.from_str(json.dumps(source))
    if vocab_size != 49155:
        raise ValueError(f"no published tokenizer has {vocab_size} ids")
    source["added_tokens"] = [t for t in source["added_tokens"] if t["id"] < 49152]
    tokenizer = Tokenizer.from_str(json.dumps(source))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (FAKE, IMAGE, END)]
    )
    return tokenizer


def tiny_config(
    model_type: str = "smolvlm",
    *,
    text: Mapping[str, object] | None = None,
    vision: Mapping[str, object] | None = None,
    **top: object,
) -> Config:
    """config.json of a model that runs in milliseconds: 64 wide, 3 + 2 layers, 4 tokens a tile.

    Args:
        model_type: `smolvlm` or `idefics3`.
        text: Keys of text_config to set otherwise.
        vision: Keys of vision_config to set otherwise.
        top: Keys of the top level to set otherwise.
    """
    config: Config = {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": model_type,
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
        },
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
    }
    config["text_config"] |= text or {}
    config["vision_config"] |= vision or {}
    return config | top


def make_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    dtype: DtypeName = "float32",
    shards: int = 1,
    seed: int = 0,
    tied: bool = False,
) -> Path:
    """Writes a checkpoint directory with the weights of a transformers model.

    The vocabulary and the image token follow from `small_tokenizer` where the config is silent.

    Args:
        folder: Where to write; made if it is not there.
        config: config.json, e.g. from `tiny_config`.
        dtype: How the weights are stored.
        shards: In how many safetensors files; more than one come with an index.
        seed: Of the weights.
        tied: Whether the head is the embedding and is not stored.

    Returns:
        The folder.
    """
    import transformers

    tokenizer = small_tokenizer()
    values = copy.deepcopy(dict(config)) | {"tie_word_embeddings": tied}
    values.setdefault("image_token_id", tokenizer.token_to_id(IMAGE))
    values["text_config"].setdefault("vocab_size", tokenizer.get_vocab_size())
    name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[values["model_type"]]
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    with torch.device("meta"):
        shapes = {
            k: tuple(v.shape) for k, v in model_class(config_class(**values)).state_dict().items()
        }
    if tied:
        del shapes["lm_head.weight"]
    kind = getattr(torch, dtype)
    weights = {n: torch.from_numpy(v).to(kind) for n, v in random_weights(shapes, seed)}
    write_small_files(folder, values, tokenizer)
    write_weights(folder, weights, shards)
    return folder


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], seed: int
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Weights under which activations stay of order one and every layer matters.

    A fresh model's are so small that each answer repeats one id.
    """
    draw = np.random.default_rng(seed)
    for name, shape in shapes.items():
        values = draw.standard_normal(shape, dtype=np.float32)
        if name.endswith(".bias"):
            values *= np.float32(0.1)
        elif len(shape) == 1:
            values = 1 + np.float32(0.2) * values
        elif "embed_tokens" in name:
            # As a head it multiplies `width` channels, and logits should not run away.
            values *= np.float32(1 if "lm_head.weight" in shapes else 0.3)
        elif "position_embedding" not in name:
            values *= np.float32(1.5 / math.sqrt(math.prod(shape[1:])))
        yield name, values


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """Writes tensors to one safetensors file, or round robin to several with an index."""
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    place = {tensor: names[i % shards] for i, tensor in enumerate(weights)}
    for name in names:
        part = {k: v.contiguous() for k, v in weights.items() if place[k] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": place}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_small_files(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Writes everything of a checkpoint but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tile = config["vision_config"]["image_size"]
    files: dict[str, Mapping[str, Any]] = {
        "config.json": config,
        "preprocessor_config.json": {
            "do_convert_rgb": True,
            "do_image_splitting": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "SmolVLMImageProcessor",
            "max_image_size": {"longest_edge": tile},
            "processor_class": "SmolVLMProcessor",
            "resample": 1,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": 4 * tile},
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "generation_config.json": {
            "bos_token_id": 0,
            "eos_token_id": tokenizer.token_to_id(END),
            "pad_token_id": 2,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    tokenizer.save(str(folder / "tokenizer.json"))


def published_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published SmolVLM checkpoint."""
    text, vision = config["text_config"], config["vision_config"]
    width, hidden = text["hidden_size"], text["intermediate_size"]
    heads = text.get("num_attention_heads", 32)
    size = text.get("head_dim", width // heads)
    keys = text.get("num_key_value_heads", heads) * size
    eye, inner = vision.get("hidden_size", 1152), vision.get("intermediate_size", 3072)
    patch = vision["patch_size"]

    def layer_norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (eye,), f"{name}.bias": (eye,)}

    def biased(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    tower = "model.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}embeddings.patch_embedding.weight": (eye, 3, patch, patch),
        f"{tower}embeddings.patch_embedding.bias": (eye,),
        f"{tower}embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2, eye),
    }
    for i in range(vision.get("num_hidden_layers", 12)):
        layer = f"{tower}encoder.layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= biased(f"{layer}self_attn.{part}", eye, eye)
        shapes |= biased(f"{layer}mlp.fc1", inner, eye) | biased(f"{layer}mlp.fc2", eye, inner)
        shapes |= layer_norm(f"{layer}layer_norm1") | layer_norm(f"{layer}layer_norm2")
    shapes |= layer_norm(f"{tower}post_layernorm")
    folded = eye * config["scale_factor"] ** 2
    shapes["model.connector.modality_projection.proj.weight"] = (width, folded)
    shapes["model.text_model.embed_tokens.weight"] = (text["vocab_size"], width)
    for i in range(text.get("num_hidden_layers", 32)):
        layer = f"model.text_model.layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (heads * size, width),
            f"{layer}self_attn.k_proj.weight": (keys, width),
            f"{layer}self_attn.v_proj.weight": (keys, width),
            f"{layer}self_attn.o_proj.weight": (width, heads * size),
            f"{layer}mlp.gate_proj.weight": (hidden, width),
            f"{layer}mlp.up_proj.weight": (hidden, width),
            f"{layer}mlp.down_proj.weight": (width, hidden),
            f"{layer}input_layernorm.weight": (width,),
            f"{layer}post_attention_layernorm.weight": (width,),
        }
    shapes["model.text_model.norm.weight"] = (width,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (text["vocab_size"], width)
    return shapes


def make_random_published(
    folder: Path, config_file: Path, dtype: DtypeName = "bfloat16", *, seed: int = 0
) -> Path:
    """Writes a checkpoint of a published shape, tensor by tensor.

    Memory: the largest tensor, twice.
    """
    config = json.loads(config_file.read_text())
    shapes = published_shapes(config)
    write_small_files(folder, config, published_tokenizer(config["text_config"]["vocab_size"]))
    width, label = {"float32": (4, "F32"), "bfloat16": (2, "BF16"), "float16": (2, "F16")}[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": label, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in random_weights(shapes, seed):
            if dtype == "bfloat16":
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
            else:
                file.write(values.astype(dtype).tobytes())
    return folder


def main() -> None:
    """Makes a checkpoint of a published shape from the command line."""
    parser = argparse.ArgumentParser(description="random weights in a published shape")
    parser.add_argument("--config", type=Path, required=True, help="a published config.json")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_random_published(arguments.out, arguments.config, arguments.dtype, seed=arguments.seed)


if __name__ == "__main__":
    main()
