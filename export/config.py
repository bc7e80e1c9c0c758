"""Reading a published config strictly: every key is taken, fixed, or ignored with a reason."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lorgnette.errors import ConfigError

GENERIC_KEYS = frozenset(
    {
        *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
        *("transformers.js_config", "name_or_path", "use_cache", "initializer_range"),
        *("attention_dropout", "pretraining_tp", "vocab_size", "return_dict", "problem_type"),
        *("output_hidden_states", "output_attentions", "output_scores", "torchscript"),
        *("use_bfloat16", "tf_legacy_loss", "pruned_heads", "chunk_size_feed_forward"),
        *("is_encoder_decoder", "is_decoder", "cross_attention_hidden_size"),
        *("add_cross_attention", "tie_encoder_decoder", "max_length", "min_length"),
        *("do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
        *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
        *("num_return_sequences", "return_dict_in_generate", "forced_bos_token_id"),
        *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
        *("suppress_tokens", "begin_suppress_tokens", "finetuning_task", "id2label", "label2id"),
        *("tokenizer_class", "prefix", "bos_token_id", "pad_token_id", "eos_token_id"),
        *("sep_token_id", "decoder_start_token_id", "task_specific_params"),
    }
)
"""Keys every transformers config may carry: run-time switches, training settings, bookkeeping."""


class ConfigReader:
    """One JSON object of a config; `finish` refuses what nobody asked for.

    Args:
        values: The object.
        where: How to name it in an error, e.g. `config.json text_config`.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """Starts with every key unread."""
        self.values = values
        self.where = where
        self._seen: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key stands there with a value other than null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, most: int = 2**24) -> int:
        """A positive integer no larger than `most`; without default the key is required."""
        value = self._take(key, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]  # a square size spelt [height, width]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise self._error(key, value, f"an integer from 1 to {most}")
        return value

    def token_id(self, key: str, default: int | None = None) -> int:
        """A token id, zero included."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**24:
            raise self._error(key, value, "a token id")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive finite number."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(key, value, "a number")
        if not 0 < value <= sys.float_info.max:  # compares integers of any size, refuses NaN
            raise self._error(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def section(self, key: str) -> ConfigReader:
        """A nested object; empty where the key is missing."""
        value = self._take(key, {})
        if not isinstance(value, dict):
            raise self._error(key, value, "an object")
        return ConfigReader(value, f"{self.where} {key}")

    def fixed(self, key: str, *allowed: object) -> None:
        """Takes a key that may be missing or null but must otherwise be one of `allowed`."""
        value = self._take(key, None)
        if value is not None and value not in allowed:
            raise self._error(key, value, " or ".join(map(repr, allowed)))

    def choice(self, key: str, *allowed: str) -> str:
        """A required string, one of `allowed`."""
        value = self._take(key, None)
        if not isinstance(value, str) or value not in allowed:
            raise self._error(key, value, " or ".join(map(repr, allowed)))
        return value

    def ignore(self, keys: Mapping[str, str]) -> None:
        """Takes keys that do not change the model; the values say why."""
        self._seen |= keys.keys()

    def finish(self) -> None:
        """Refuses the first key that was neither read nor ignored.

        Raises:
            ConfigError: An unknown key.
        """
        for key in self.values:
            if key not in self._seen and key not in GENERIC_KEYS and not key.startswith("_"):
                raise ConfigError(
                    f"unknown config key '{key}'",
                    where=self.where,
                    got=str(self.values[key])[:80],
                    hint="it may change the answer, so it is refused rather than ignored; "
                    "remove the key if it has no effect",
                )

    def _take(self, key: str, default: object) -> Any:  # noqa: ANN401  (JSON)
        self._seen.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def _error(self, key: str, value: object, wanted: str) -> ConfigError:
        if value is None:
            return ConfigError(f"config key '{key}' is missing", where=self.where, wanted=wanted)
        return ConfigError(
            f"config key '{key}' is not supported",
            where=self.where,
            got=str(value)[:80],
            wanted=wanted,
        )


def read_rope_theta(text: ConfigReader) -> float:
    """The rotary base in either spelling: `rope_theta`, or inside `rope_parameters`.

    Raises:
        ConfigError: A scaled variant, which would need other tables.
    """
    theta = text.number("rope_theta", 10000.0)
    text.fixed("rope_scaling")
    text.fixed("rope_interleaved", False)
    if text.has("rope_parameters"):
        rope = text.section("rope_parameters")
        rope.fixed("rope_type", "default")
        rope.fixed("partial_rotary_factor", 1.0)
        theta = rope.number("rope_theta", theta)
        rope.finish()
    else:
        text.ignore({"rope_parameters": "null means the default"})
    return theta
