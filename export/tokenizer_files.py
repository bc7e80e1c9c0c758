"""placeholder until the branch lands"""

from __future__ import annotations

from lorgnette.errors import CheckpointError
from lorgnette.export.checkpoint import Checkpoint


def read_tokenizer_json(checkpoint: Checkpoint) -> bytes:
    data = checkpoint.data("tokenizer.json")
    if data is None:
        raise CheckpointError("file is missing", where=checkpoint.path / "tokenizer.json")
    return data


def gguf_tokenizer_json(checkpoint: Checkpoint) -> bytes:
    raise CheckpointError("not yet", where=checkpoint.path)
