"""Muon for the inner matrices and AdamW for everything else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.zoo.model import Params


@dataclass(frozen=True)
class Rates:
    """Full learning rates; `vision` is a factor on both for vision and projector."""

    muon: float
    adam: float
    vision: float = 1.0


_OUTER = ("embed_tokens", "position_embedding", "patch_embedding", "head.")


def is_eye(name: str) -> bool:
    """Whether a tensor is part of the vision transformer or of the projector."""
    return any(part in name for part in ("vision_model.", "connector.", "projector."))


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with singular values near one, by Newton-Schulz iteration.

    Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.

    Shapes:
        matrices: [L, rows, cols], one for each of L layers.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.transpose(1, 2) if tall else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Optimiser:
    """Both methods over one dict of parameters; matrices of equal shape are handled together."""

    def __init__(self, params: Params, rates: Rates) -> None:
        """Sort the parameters into the two methods."""
        self.params = params
        self.rates = rates
        inner = [n for n, p in params.items() if p.ndim == 2 and not any(o in n for o in _OUTER)]
        self.groups: dict[tuple[tuple[int, ...], float], list[str]] = {}
        for name in inner:
            key = (tuple(params[name].shape), self._factor(name))
            self.groups.setdefault(key, []).append(name)
        self.momentum = {n: torch.zeros_like(params[n]) for n in inner}
        rest = [
            {"params": [p], "factor": self._factor(n)}
            for n, p in params.items()
            if n not in self.momentum
        ]
        self.adam = torch.optim.AdamW(rest, lr=rates.adam, betas=(0.9, 0.98), weight_decay=0.01)

    def _factor(self, name: str) -> float:
        return self.rates.vision if is_eye(name) else 1.0

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update from the gradients, at `scale` times the full learning rates."""
        for group in self.adam.param_groups:
            group["lr"] = self.rates.adam * scale * group["factor"]
        self.adam.step()
        self.adam.zero_grad()
        for (shape, factor), names in self.groups.items():
            directions = []
            for name in names:
                grad = self.params[name].grad
                if grad is None:
                    grad = torch.zeros(shape)
                momentum = self.momentum[name].lerp_(grad, 0.05)
                directions.append(grad.lerp(momentum, 0.95))
                self.params[name].grad = None
            updates = orthogonalise(torch.stack(directions))
            rate = self.rates.muon * scale * factor * max(1.0, shape[0] / shape[1]) ** 0.5
            for name, update in zip(names, updates, strict=True):
                self.params[name].mul_(1 - 0.02 * rate).add_(update, alpha=-rate)
