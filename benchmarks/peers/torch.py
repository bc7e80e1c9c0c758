"""Plain PyTorch: transformers' decoder and the tower, eager, in float32 or bfloat16."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.peer import Case, Engine, Peer, PlainEngine, main

PEER = Peer(
    name="torch",
    module="benchmarks.peers.torch",
    rows=("torch-fp32", "torch-bf16"),
    requirements=("torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6"),
    formats={
        "torch-fp32": "PyTorch and transformers, eager, float32",
        "torch-bf16": "PyTorch and transformers, eager, bfloat16",
    },
)


def convert(row: str, case: Case, folder: Path) -> None:
    """Writes both parts in the row's type, as `from_pretrained` reads them."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.peers.modules import tower_of

    dtype = torch.float32 if row == "torch-fp32" else torch.bfloat16
    decoder = AutoModelForCausalLM.from_pretrained(case.text, dtype=dtype)
    decoder.save_pretrained(folder / "decoder")
    torch.save(tower_of(case).to(dtype).state_dict(), folder / "vision.pt")


class TorchEngine(PlainEngine):
    """A model of transformers and its own cache."""

    def __init__(self, case: Case, folder: Path, threads: int) -> None:
        """Loads both."""
        import json

        import torch
        from transformers import AutoModelForCausalLM

        from benchmarks.peers.modules import Tower

        super().__init__(case)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        self._decoder = AutoModelForCausalLM.from_pretrained(folder / "decoder", dtype="auto")
        dtype = next(self._decoder.parameters()).dtype
        config = json.loads((Path(case.vision) / "config.json").read_text())
        with torch.device("meta"):
            tower = Tower(config, self._decoder.config.hidden_size)
        weights = torch.load(folder / "vision.pt", mmap=True, weights_only=True)
        tower.load_state_dict(weights, assign=True)
        self._tower = tower.eval()
        self._tile = torch.rand(1, 3, case.tile, case.tile).to(dtype) * 2 - 1
        self._past = None

    def encode(self) -> None:
        """One tile."""
        self._tower(self._tile)

    def start(self) -> None:
        """Drops the KV cache."""
        self._past = None

    def prefill(self, ids: list[int]) -> int:
        """All at once, logits for the last position."""
        out = self._decoder(
            input_ids=self._torch.tensor([ids]),
            past_key_values=self._past,
            use_cache=True,
            logits_to_keep=1,
        )
        self._past = out.past_key_values
        return int(out.logits[0, -1].argmax())


def load(row: str, case: Case, folder: Path, threads: int) -> Engine:
    """Opens what `convert` made."""
    return TorchEngine(case, folder, threads)


if __name__ == "__main__":
    main(convert, load)
