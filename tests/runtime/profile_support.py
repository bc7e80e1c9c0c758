"""What the tests of profiles share: a document to change, a clock, and a check by JSON schema."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorgnette.runtime.engines.engine import DecoderState, Engine
from lorgnette.runtime.profile.document import Profile
from lorgnette.runtime.profile.measure import Asked, measure

Json = dict[str, Any]
SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "profile-1.schema.json"
KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


@functools.cache
def small_profile(bundle: Path) -> Profile:
    """A real profile with few runs, made once."""
    return measure(bundle, Asked(threads=1, sweep=(1,), runs=2, seconds=0.5))


def mistakes(value: object, schema: Json, root: Json, where: str = "$") -> Iterator[str]:
    """Where a value is not as a JSON schema says; knows the words that msgspec writes."""
    known = {"$ref", "$defs", "$schema", "anyOf", "type", "title", "description", "default"}
    known |= {"properties", "required", "items", "prefixItems", "additionalProperties"}
    known |= {"minimum", "maximum", "minItems", "maxItems", "enum"}
    unknown = set(schema) - known
    if unknown:
        yield f"{where}: schema has {unknown}"
    if "$ref" in schema:
        yield from mistakes(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, where)
    if "anyOf" in schema:
        tries = [list(mistakes(value, each, root, where)) for each in schema["anyOf"]]
        if all(tries):
            yield from min(tries, key=len)
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r}"
    kind = schema.get("type")
    if kind is not None:
        fits = isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))
        if not fits:
            yield f"{where}: {type(value).__name__} in place of {kind}"
            return
    if isinstance(value, int | float) and not schema.get("minimum", value) <= value:
        yield f"{where}: {value} is too small"
    if isinstance(value, int | float) and not schema.get("maximum", value) >= value:
        yield f"{where}: {value} is too large"
    yield from _inside(value, schema, root, where)


def _inside(value: object, schema: Json, root: Json, where: str) -> Iterator[str]:
    """Mistakes in the parts of objects and arrays."""
    if isinstance(value, dict):
        for name in schema.get("required", []):
            if name not in value:
                yield f"{where}: no {name}"
        others = schema.get("additionalProperties")
        for name, part in value.items():
            inner = schema.get("properties", {}).get(name, others)
            if isinstance(inner, dict):
                yield from mistakes(part, inner, root, f"{where}.{name}")
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{where}: {len(value)} items"
        for index, part in enumerate(value):
            inner = first[index] if index < len(first) else schema.get("items")
            if isinstance(inner, dict):
                yield from mistakes(part, inner, root, f"{where}[{index}]")


def nulls(value: object, where: str = "$") -> Iterator[tuple[str, str]]:
    """Every null of a document and the reason beside it, empty where there is none."""
    if isinstance(value, dict):
        reasons = value.get("reasons") or {}
        for name, part in value.items():
            if part is None:
                yield f"{where}.{name}", reasons.get(name) or value.get("reason") or ""
            yield from nulls(part, f"{where}.{name}")
    if isinstance(value, list):
        for index, part in enumerate(value):
            assert part is not None, f"{where}[{index}]: a null without a name"
            yield from nulls(part, f"{where}[{index}]")


class Clock:
    """A clock that stands still but for the work that is said to take time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Takes the place of `time.perf_counter`."""
        self.ms = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.ms / 1e3)


class SlowEngine:
    """An engine whose entry points take a time of their own on a clock.

    Args:
        engine: What does the work.
        clock: The clock.
        costs: Milliseconds of `encode` (a tile), `embed` (a call), `prefill` (a position) and
            `decode` (a call).
    """

    def __init__(self, engine: Engine, clock: Clock, costs: dict[str, float]) -> None:
        """Wraps the engine."""
        self._engine, self._clock, self._costs = engine, clock, costs
        self.runs: list[tuple[int, int]] = []
        """Past length and new positions of every decoder call."""

    def wait(self) -> None:
        self._engine.wait()

    def expect(self, positions: int) -> None:
        self._engine.expect(positions)

    def release_vision(self) -> None:
        self._engine.release_vision()

    def without_prefill_weights(self) -> None:
        self._engine.without_prefill_weights()

    def encode(self, tiles: np.ndarray[Any, Any], *, more: bool = False) -> Any:
        self._clock.ms += self._costs["encode"] * len(tiles)
        return self._engine.encode(tiles, more=more)

    def embed(self, token_ids: np.ndarray[Any, Any]) -> Any:
        self._clock.ms += self._costs["embed"]
        return self._engine.embed(token_ids)

    def new_prefill_state(self) -> None:
        """One graph is as slow as the other here."""

    def new_state(self) -> SlowState:
        return SlowState(self._engine.new_state(), self._clock, self._costs, self.runs)


class SlowState:
    """A KV cache of a `SlowEngine`."""

    def __init__(
        self,
        state: DecoderState,
        clock: Clock,
        costs: dict[str, float],
        runs: list[tuple[int, int]],
    ) -> None:
        self.capacity = state.capacity
        self._state, self._clock, self._costs, self._runs = state, clock, costs, runs

    def run(self, embeddings: np.ndarray[Any, Any], past_length: int) -> Any:
        count = len(embeddings)
        self._runs.append((past_length, count))
        decode = count == 1
        self._clock.ms += self._costs["decode"] if decode else self._costs["prefill"] * count
        return self._state.run(embeddings, past_length)
