"""The quantised model: every matrix's codes, computed once and kept on disk during an export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorgnette.errors import ConfigError
from lorgnette.export.weights import WeightSource
from lorgnette.quantize.plan import QuantPlan, Rule
from lorgnette.quantize.scheme import QuantTensor

Array = NDArray[np.float32]
Element = TypeVar("Element", bound=np.generic)


class QuantizedSource:
    """The parameters of one component as a plan rounds them.

    Codes that calibration has placed are kept; those of methods that look at nothing but the
    weights are computed when they are first asked for. Both lie in files that are mapped into
    memory, so that holding a model's codes costs none.

    Attributes:
        component: Its name.
        shapes: Its parameters and buffers, name to shape.
        matrices: The parameters that the plan applies to.
    """

    def __init__(
        self,
        component: str,
        source: WeightSource,
        matrices: Iterable[str],
        plan: QuantPlan,
        folder: Path,
    ) -> None:
        """Wraps the weights as published; `folder` exists and takes files of this component."""
        self.component = component
        self.shapes = source.shapes
        self.matrices = frozenset(matrices)
        self._source = source
        self._plan = plan
        self._folder = folder
        self._codes: dict[str, QuantTensor] = {}
        self._changed: dict[str, Array] = {}
        self._placed: set[str] = set()
        self._cache_scales: dict[str, Array] = {}
        self._tied: dict[str, tuple[QuantizedSource, str]] = {}

    @property
    def cache_bits(self) -> int:
        """Bits of an element of the KV cache, for a component that has one."""
        return self._plan.cache_bits

    def cache_scale(self, name: str) -> Array:
        """Steps of a KV cache of 8 bits, `key_0` or `value_0` and so on: float32 `[Hkv, Dh]`.

        Raises:
            ConfigError: Nothing was calibrated.
        """
        if name not in self._cache_scales:
            raise ConfigError(
                "no range is known of a KV cache of 8 bits",
                where=f"{self.component}/{name}",
                hint="it needs calibration",
            )
        return self._cache_scales[name]

    def place_cache_scale(self, name: str, scale: Array) -> None:
        """Keeps what calibration found."""
        self._cache_scales[name] = scale

    def rule(self, name: str) -> Rule:
        """The rule that decides about a matrix."""
        return self._plan.rule_for(self.component, name)

    def find_rule(self, name: str) -> Rule | None:
        """The rule that would decide about a parameter, matrix or not; None where none fits."""
        return self._plan.find_rule(self.component, name)

    def storage_key(self, name: str) -> str:
        """Equal keys mean equal numbers, so that a target stores tied parameters once."""
        if self.is_tied(name):
            source, first = self._tied[name]
            return source.storage_key(first)
        origin = self._source.origin(name)
        if origin is None or name in self._changed or name in self._placed:
            return f"{self.component}/{name}"
        return f"{origin}.{self.rule(name).method}" if name in self.matrices else origin

    def unrounded(self, name: str) -> Array:
        """A parameter as float32: as published, or as a rescale has changed it."""
        return self._changed[name] if name in self._changed else self._source.array(name)

    def tensor(self, name: str) -> Tensor:
        """A parameter as float32 with the numbers that its scheme can hold."""
        if name not in self.matrices:
            return torch.from_numpy(self.unrounded(name))
        scheme = self.rule(name).scheme
        if scheme.is_integer:
            return torch.from_numpy(self.codes(name).dequantize())
        value = torch.from_numpy(self.unrounded(name))
        return value.to(torch.float16).to(torch.float32) if scheme.bits == 16 else value

    def codes(self, name: str) -> QuantTensor:
        """Codes and scales of a matrix whose scheme is of integers."""
        if self.is_tied(name):
            source, first = self._tied[name]
            return source.codes(first)
        if name not in self._codes:
            made = self._plan.quantize(self.component, name, self.unrounded(name))
            self._codes[name] = self._keep(name, made)
        return self._codes[name]

    def method(self, name: str) -> str:
        """The method that chooses a matrix's codes, or those of the one that it follows."""
        if self.is_tied(name):
            source, first = self._tied[name]
            return source.method(first)
        return self.rule(name).method

    def is_tied(self, name: str) -> bool:
        """Whether a matrix is another's, whose rule and codes are its own."""
        if name not in self._tied:
            return False
        source, first = self._tied[name]
        return first not in source._changed  # else it is another's no more

    def tie(self, name: str, source: QuantizedSource, first: str) -> None:
        """Makes a matrix follow another that was published as the same tensor."""
        self._tied[name] = (source, first)

    def place(self, name: str, made: QuantTensor) -> None:
        """Keeps the codes that calibration has chosen for a matrix."""
        self._codes[name] = self._keep(name, made)
        self._placed.add(name)

    def change(self, name: str, value: Array) -> None:
        """Puts other float32 numbers in the place of a parameter, as a rescale does."""
        self._changed[name] = self._mapped(f"{name}.changed", value)
        self._codes.pop(name, None)
        self._placed.discard(name)
        self._tied.pop(name, None)

    def _keep(self, name: str, made: QuantTensor) -> QuantTensor:
        return QuantTensor(
            self._mapped(f"{name}.codes", made.codes),
            made.scales,
            made.zero_points,
            made.columns,
            made.scheme,
            made.tables,
            made.input_range,
        )

    def _mapped(self, name: str, array: NDArray[Element]) -> NDArray[Element]:
        path = self._folder / f"{name}.npy"
        path.unlink(missing_ok=True)
        np.save(path, array)
        mapped: NDArray[Element] = np.load(path, mmap_mode="c")
        return mapped


class QuantizedModel:
    """All components of a model as a plan rounds them.

    Attributes:
        plan: The plan.
        sources: The parameters of each component, by name.
    """

    def __init__(
        self,
        sources: Mapping[str, WeightSource],
        matrices: Mapping[str, Iterable[str]],
        plan: QuantPlan,
        folder: Path,
    ) -> None:
        """Makes a folder for each component inside `folder`, which must not exist yet."""
        self.plan = plan
        self.sources: dict[str, QuantizedSource] = {}
        for name, source in sources.items():
            place = folder / name
            place.mkdir(parents=True)
            self.sources[name] = QuantizedSource(name, source, matrices[name], plan, place)
        self._tie(sources)

    def _tie(self, sources: Mapping[str, WeightSource]) -> None:
        """A tensor that two matrices share is stored once where both ask for the same codes.

        A table takes the codes of its head where calibration chooses those, in the same form: what
        is right for the logits serves the look-up better than codes by the weights alone (measured
        on the zoo), and one matrix is stored.
        """
        first: dict[tuple[str, ...], tuple[QuantizedSource, str]] = {}
        free: dict[tuple[str, str], tuple[QuantizedSource, str]] = {}
        for source in self.sources.values():
            for name in sorted(source.matrices):
                origin, rule = sources[source.component].origin(name), source.rule(name)
                # The range of static activations belongs to one matrix, and lies with its codes.
                if origin is None or rule.scheme.activations == "int8_static":
                    continue
                kind = (origin, rule.scheme.form, rule.method, rule.scaling)
                held = first.setdefault(kind, (source, name))
                if held != (source, name):
                    source.tie(name, *held)
                elif not rule.looks_at_inputs:
                    free.setdefault(kind[:2], held)
                elif rule.scaling == "none" and kind[:2] in free:
                    follower, follows = free[kind[:2]]
                    follower.tie(follows, source, name)
