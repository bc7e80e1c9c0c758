"""The trained checkpoint and its bundles, exported once for all tests of the runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorgnette.runtime.model import Model, open_model
from lorgnette.runtime.tokenizer import Tokenizer
from tests.runtime.support import FakeEngine, fake_model

CHECKPOINT = Path(__file__).parents[1] / "zoo" / "checkpoints" / "smolvlm-tiny"
SCHEMES = ("fp32", "fp16", "int8", "int4")
"""Of these, int8 and int4 are calibrated; int4-fast is the one that is not."""


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The small trained checkpoint of the zoo."""
    return CHECKPOINT


@pytest.fixture(scope="session")
def bundle_of(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the bundle of a scheme when it is first asked for; never written to."""
    from lorgnette.export.pipeline import export
    from lorgnette.export.sample_set import Pictures
    from lorgnette.recipe import Recipe

    folder = tmp_path_factory.mktemp("bundles")

    def bundle_of(scheme: str) -> Path:
        path = folder / f"{scheme}.lorg"
        if not path.exists():
            export(checkpoint, path, Recipe(quant=scheme), pictures=Pictures(measure=0))
        return path

    return bundle_of


@pytest.fixture(scope="session")
def fp32(bundle_of: Callable[[str], Path]) -> Path:
    """The float32 bundle, which answers as the original does."""
    return bundle_of("fp32")


@pytest.fixture(scope="session")
def model(fp32: Path) -> Model:
    """The float32 bundle, opened."""
    return open_model(fp32, threads=1)


@pytest.fixture(scope="session")
def tokenizer(model: Model) -> Tokenizer:
    """The tokenizer of every bundle here."""
    return model.tokenizer


@pytest.fixture(scope="session")
def stop(model: Model) -> int:
    """The token that ends an answer."""
    return model.manifest.prompt.stop_token_ids[0]


@pytest.fixture(scope="session")
def faked(fp32: Path, stop: int) -> tuple[Model, FakeEngine]:
    """One model for tests that set the answer themselves."""
    engine = FakeEngine(lambda _: stop)
    return fake_model(fp32, engine), engine
