"""lorgnette: compiles small vision-language models for edge and mobile devices.

Opens bundles with `lorgnette.open(path)`, whose `generate(images, prompt)` streams an answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from lorgnette.runtime.model import Model

__version__ = "0.1.0"
__all__ = ["__version__", "open"]


def open(
    path: str | Path,
    *,
    threads: int | None = None,
    keep_vision: bool = True,
    prefill_weights: bool = True,
    wait: bool = True,
) -> Model:
    """Opens a bundle, ready to answer: see `lorgnette.runtime.model.open_model`."""
    # Here and not at the top: importing the package must stay cheap.
    from lorgnette.runtime.model import open_model

    return open_model(
        path,
        threads=threads,
        keep_vision=keep_vision,
        prefill_weights=prefill_weights,
        wait=wait,
    )
