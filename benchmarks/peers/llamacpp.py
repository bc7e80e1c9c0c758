"""llama.cpp through llama-cpp-python: Q4_0 or Q8_0 decoder, F16 vision tower through mtmd."""

from __future__ import annotations

import ctypes
import json
import math
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.peer import Case, Engine, Peer, PlainEngine, main
from benchmarks.peers.weights import read_weights

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

PEER = Peer(
    name="llamacpp",
    module="benchmarks.peers.llamacpp",
    rows=("llamacpp-q4_0", "llamacpp-q8_0"),
    requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6"),
    build={"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": "3"},
    formats={
        "llamacpp-q4_0": "llama.cpp, Q4_0 by its own quantiser, vision tower F16 (mtmd)",
        "llamacpp-q8_0": "llama.cpp, Q8_0 by its own quantiser, vision tower F16 (mtmd)",
    },
)
FILE_TYPES = {"llamacpp-q4_0": 2, "llamacpp-q8_0": 7}
"""Source: enum llama_ftype of llama.h."""
BATCH = 2048
TEXT_NAMES = (
    ("model.layers.", "blk."),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    (".self_attn.o_proj", ".attn_output"),
    (".input_layernorm", ".attn_norm"),
    (".post_attention_layernorm", ".ffn_norm"),
    *((f".self_attn.{part}_proj", f".attn_{part}") for part in "qkv"),
    *((f".mlp.{part}_proj", f".ffn_{part}") for part in ("gate", "up", "down")),
)
VISION_NAMES = (
    ("tower.encoder.layers.", "v.blk."),
    ("tower.embeddings.patch_embedding", "v.patch_embd"),
    ("tower.embeddings.position_embedding", "v.position_embd"),
    ("tower.post_layernorm", "v.post_ln"),
    (".self_attn.out_proj", ".attn_out"),
    (".layer_norm", ".ln"),
    (".mlp.fc1", ".ffn_up"),
    (".mlp.fc2", ".ffn_down"),
    *((f".self_attn.{part}_proj", f".attn_{part}") for part in "qkv"),
)
"""Source: gguf's tensor_mapping.py and clip-impl.h of llama.cpp."""


def convert(row: str, case: Case, folder: Path) -> None:
    """Writes F16 GGUF files and lets llama.cpp quantise the decoder."""
    import llama_cpp

    full = folder / "decoder-f16.gguf"
    _write_text(case, full)
    _write_vision(case, folder / "vision.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[row]
    target = str(folder / "decoder.gguf").encode()
    if llama_cpp.llama_model_quantize(str(full).encode(), target, ctypes.byref(params)) != 0:
        raise RuntimeError("llama_model_quantize failed")
    full.unlink()


def _write_text(case: Case, file: Path) -> None:
    import gguf
    import numpy as np

    config = json.loads((Path(case.text) / "config.json").read_text())
    llama = config["model_type"] == "llama"
    writer = gguf.GGUFWriter(file, "llama" if llama else "qwen2")
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if llama:
        writer.add_rope_dimension_count(config["hidden_size"] // heads)
    _add_tokens(writer, case, "smollm" if llama else "qwen2")
    for name, values in read_weights(Path(case.text) / "model.safetensors"):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if llama and ".self_attn.q_proj" in name:
            values = _interleaved(values, heads)
        elif llama and ".self_attn.k_proj" in name:
            values = _interleaved(values, keys)
        stored = values if values.ndim == 1 else values.astype(np.float16)
        writer.add_tensor(_renamed(name, TEXT_NAMES), stored)
    _finish(writer)


def _interleaved(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a head from halves to pairs, which is how llama.cpp's Llama rotates them."""
    halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _add_tokens(writer: GGUFWriter, case: Case, kind: str) -> None:
    tokenizer = json.loads((Path(case.bundle) / "tokenizer/tokenizer.json").read_text())
    names = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    names |= special
    rows = range(case.vocab_size)
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in rows])
    # 1 normal, 3 control, 5 unused: gguf.TokenType
    writer.add_token_types([3 if i in special else 1 if i in names else 5 for i in rows])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _write_vision(case: Case, file: Path) -> None:
    """The tower with an Idefics3 projector.

    mtmd knows no projector that joins 9 tokens of a row (OmniVLM's): such a tower gets the one
    that joins 3 x 3 of them, a single matrix, which is a little less work.
    """
    import gguf
    import numpy as np

    config = json.loads((Path(case.vision) / "config.json").read_text())
    text = json.loads((Path(case.text) / "config.json").read_text())
    shuffle = config.get("shuffle") or math.isqrt(config["group"])
    writer = gguf.GGUFWriter(file, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "idefics3")
    writer.add_bool("clip.use_gelu", True)
    edge = config["image_size"]
    for key, value in (
        ("image_size", edge),
        ("preproc_image_size", edge),
        ("patch_size", config["patch_size"]),
        ("embedding_length", config["hidden_size"]),
        ("feed_forward_length", config["intermediate_size"]),
        ("projection_dim", text["hidden_size"]),
        ("attention.head_count", config["num_attention_heads"]),
        ("block_count", config["num_hidden_layers"]),
        ("projector.scale_factor", shuffle),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    rows = text["hidden_size"], shuffle * shuffle * config["hidden_size"]
    joined = np.zeros(rows, np.float32)
    for name, values in read_weights(Path(case.vision) / "model.safetensors"):
        if name == "projector.weight":
            joined = values
        elif name.startswith("tower.") and ".head." not in name:
            exact = values.ndim == 1 or "position" in name
            stored = values if exact else values.astype(np.float16)
            writer.add_tensor(_renamed(name, VISION_NAMES), stored)
    writer.add_tensor("mm.model.fc.weight", joined.astype(np.float16))
    _finish(writer)


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for old, new in names:
        name = name.replace(old, new)
    return name


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaEngine(PlainEngine):
    """One model, one context, one picture's chunk that stands for every tile."""

    def __init__(self, case: Case, folder: Path, threads: int) -> None:
        """Opens both files."""
        import llama_cpp
        from llama_cpp import mtmd_cpp

        super().__init__(case)
        self._c, self._m = llama_cpp, mtmd_cpp
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(
            str(folder / "decoder.gguf").encode(), model_params
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch = case.context, BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._filled = 0
        self._chunks = self._open_picture(folder, threads)
        self._chunk = self._first_picture()

    def _open_picture(self, folder: Path, threads: int) -> Any:  # noqa: ANN401  a C pointer
        """Opens the tower and preprocesses a picture, which no figure includes."""
        import numpy as np

        m = self._m
        params = m.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.warmup = False, threads, False
        self._tower = m.mtmd_init_from_file(
            str(folder / "vision.gguf").encode(), self._model, params
        )
        if not self._tower:
            raise RuntimeError("mtmd refuses the vision tower")
        edge = self.case.tile
        pixels = np.random.default_rng(0).integers(0, 256, (edge, edge, 3), np.uint8)
        data = (ctypes.c_uint8 * pixels.size).from_buffer_copy(pixels.tobytes())
        bitmap = m.mtmd_bitmap_init(edge, edge, data)
        marker = m.mtmd_default_marker()
        text = m.mtmd_input_text(marker, len(marker), False, True)
        chunks = m.mtmd_input_chunks_init()
        bitmaps = (m.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if m.mtmd_tokenize(self._tower, chunks, ctypes.byref(text), bitmaps, 1) != 0:
            raise RuntimeError("mtmd_tokenize failed")
        return chunks

    def _first_picture(self) -> Any:  # noqa: ANN401  a C pointer
        m = self._m
        for index in range(m.mtmd_input_chunks_size(self._chunks)):
            chunk = m.mtmd_input_chunks_get(self._chunks, index)
            if m.mtmd_input_chunk_get_type(chunk) == 1:  # MTMD_INPUT_CHUNK_TYPE_IMAGE
                tokens = m.mtmd_input_chunk_get_n_tokens(chunk)
                if tokens != self.case.tokens_per_tile:
                    raise RuntimeError(f"a tile makes {tokens} image tokens")
                return chunk
        raise RuntimeError("mtmd made no picture")

    def encode(self) -> None:
        """One tile."""
        if self._m.mtmd_encode_chunk(self._tower, self._chunk) != 0:
            raise RuntimeError("mtmd_encode_chunk failed")

    def start(self) -> None:
        """Empties the KV cache."""
        self._c.llama_memory_clear(self._memory, True)
        self._filled = 0

    def prefill(self, ids: list[int]) -> int:
        """All at once; llama.cpp cuts it into pieces of 512 by itself."""
        self._append(ids)
        return self._likeliest()

    def _append(self, ids: list[int]) -> None:
        array = (self._c.llama_token * len(ids))(*ids)
        batch = self._c.llama_batch_get_one(array, len(ids))
        if self._c.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self._filled += len(ids)

    def _likeliest(self) -> int:
        import numpy as np

        logits = self._c.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self.case.vocab_size,)).argmax())

    def answer(self, tiles: int) -> float | None:
        """As mtmd's helper evaluates a prompt: text, then a tile's image tokens, in turns."""
        self.start()
        for image, run in groupby(self.case.prompts[str(tiles)], self.case.image_id.__eq__):
            if not image:
                self._append(list(run))
                continue
            self.encode()
            self._append_picture()
        self._likeliest()
        return None

    def _append_picture(self) -> None:
        m, new = self._m, ctypes.c_int32(0)
        failed = m.mtmd_helper_decode_image_chunk(
            self._tower,
            self._context,
            self._chunk,
            m.mtmd_get_output_embd(self._tower),
            self._filled,
            0,
            BATCH,
            ctypes.byref(new),
            m.mtmd_helper_post_decode_callback(),
            None,
        )
        if failed:
            raise RuntimeError("mtmd_helper_decode_image_chunk failed")
        self._filled = new.value


def load(row: str, case: Case, folder: Path, threads: int) -> Engine:
    """Opens what `convert` made."""
    return LlamaEngine(case, folder, threads)


if __name__ == "__main__":
    main(convert, load)
