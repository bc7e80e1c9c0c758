"""Components as this target traces them: stored matrices by name, a KV cache written in place."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from lorgnette.export.component import Component
from lorgnette.export.trace import build_module
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.quantize.store import QuantizedSource
from lorgnette.targets.coreai.operators import stored_linear, stored_rows


class StoredLinear(nn.Module):
    """A linear layer whose matrix is stored; inputs are filled up to its whole groups."""

    def __init__(self, linear: nn.Linear, matrix: str, scheme: QuantScheme) -> None:
        """Takes over the bias of a layer."""
        super().__init__()
        self.matrix = matrix
        self.rows = linear.out_features
        padded = scheme.padded(linear.in_features) if scheme.is_integer else linear.in_features
        self.missing = padded - linear.in_features
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: `[..., columns]` to `[..., rows]`."""
        if self.missing:
            x = functional.pad(x, (0, self.missing))
        y = stored_linear(x, self.matrix, self.rows)
        return y if self.bias is None else y + self.bias  # type: ignore[no-any-return]


class StoredTable(nn.Module):
    """An embedding whose table is stored: only the rows that are asked for become floats."""

    def __init__(self, table: nn.Embedding, matrix: str, scheme: QuantScheme) -> None:
        """Takes over the shape of a table."""
        super().__init__()
        self.matrix = matrix
        self.columns = table.embedding_dim
        self.scheme = scheme

    def forward(self, token_ids: Tensor) -> Tensor:
        """Shapes: `[1, T]` to `[1, T, columns]`."""
        if not self.scheme.is_integer:
            return _rows(token_ids, self.matrix, "values", self.columns)
        groups, padded = self.scheme.groups(self.columns), self.scheme.padded(self.columns)
        codes = _rows(token_ids, self.matrix, "codes", padded)
        scales = _rows(token_ids, self.matrix, "scales", groups)
        grouped = codes.reshape(*token_ids.shape, groups, padded // groups)
        if not self.scheme.symmetric:
            zeros = _rows(token_ids, self.matrix, "zero_points", groups)
            grouped = grouped - zeros[..., None]
        values = (grouped * scales[..., None]).reshape(*token_ids.shape, padded)
        return values[..., : self.columns]


def _rows(token_ids: Tensor, matrix: str, part: str, width: int) -> Tensor:
    rows: Tensor = stored_rows(token_ids, matrix, part, width)
    return rows


class DecoderInPlace(nn.Module):
    """A decoder that writes its caches, which so become states."""

    def __init__(self, decoder: nn.Module) -> None:
        """Wraps it."""
        super().__init__()
        self.decoder = decoder

    def forward(self, embeddings: Tensor, past_length: Tensor, caches: list[Tensor]) -> Tensor:
        """The logits behind the last position; T more positions stand in the caches."""
        logits, updated = self.decoder(embeddings, past_length, caches)
        for cache, new in zip(caches, updated, strict=True):
            cache.copy_(new)
        # Else the converter takes the one position for an unknown number of them.
        return logits.reshape(1, logits.shape[-1])  # type: ignore[no-any-return]


PREFIX = "decoder."
"""What stands before a decoder's parameters once it is wrapped."""


def stored_module(component: Component, source: QuantizedSource) -> nn.Module:
    """The component's module on the meta device, with its matrices taken out."""
    module = build_module(component)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear | nn.Embedding):
            weight = f"{name}.weight" if name else "weight"
            key, scheme = f"{component.name}/{weight}", source.rule(weight).scheme
            stored: nn.Module = (
                StoredLinear(layer, key, scheme)
                if isinstance(layer, nn.Linear)
                else StoredTable(layer, key, scheme)
            )
            if not name:  # a component that is one layer
                module = stored
            else:
                module.set_submodule(name, stored)
    module.requires_grad_(False)
    return DecoderInPlace(module) if component.cache_inputs else module
