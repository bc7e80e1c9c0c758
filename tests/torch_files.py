"""What the tests of pytorch_model.bin share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorgnette.errors import EXIT_WRONG_INPUT, CheckpointError
from lorgnette.export.checkpoint import open_files

SINGLE = "pytorch_model.bin"
TENSORS = {
    "first": torch.arange(6.0).reshape(2, 3),
    "second": torch.tensor([1.5, -2.25]),
    "third": torch.full((4,), 0.1),
}


def refused(folder: Path, *parts: str) -> None:
    """Opening fails with one line that holds all parts."""
    with pytest.raises(CheckpointError) as caught:
        open_files(folder)
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    told = str(caught.value)
    assert "\n" not in told
    assert len(told) < 700
    for part in parts:
        assert part in told, told
