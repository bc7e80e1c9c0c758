"""Good checkpoints of MobileVLM and OmniVLM, made once, to be broken in copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli_helpers import BOTH, SMALL, ZOO, Made, document


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good checkpoint of every form."""
    folder = tmp_path_factory.mktemp("originals")
    # Here and not at the top: most tests of this folder run without them.
    from tests import make_mobilevlm as mobilevlm
    from tests import make_omnivlm as omnivlm

    mobilevlm.make_mobilevlm(folder / "mobilevlm", mobilevlm.tiny_config())
    omnivlm.make_omnivlm(folder / "omnivlm", omnivlm.tiny_config())
    omnivlm.make_gguf_pair(folder / "pair", omnivlm.tiny_config(), kind="F16")
    return folder


@pytest.fixture
def copy_of(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint that may be broken."""

    def copy_of(name: str) -> Path:
        return Path(shutil.copytree(originals / name, tmp_path / name))

    return copy_of


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two targets from one export."""
    folder = tmp_path_factory.mktemp("targets")
    told = document("export", ZOO, "--target", ",".join(BOTH), "--out", folder / "a.lorg", *SMALL)
    return [folder / f"a-{name}.lorg" for name in BOTH], told
