"""Settings and fixtures of every test."""

from __future__ import annotations

import os

# Before anything imports these libraries, which read them once.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# A busy machine is slow, not wrong. Elsewhere than in CI examples differ from run to run.
settings.register_profile("patient", settings.default, deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def ort_floor_path() -> Path:
    """The folder with the oldest onnxruntime supported, to be put first on PYTHONPATH."""
    folder = ROOT / ".ort-floor"
    if not (folder / "onnxruntime" / "__init__.py").is_file():
        pytest.fail(f"{folder} holds no onnxruntime: run 'make ort-floor'", pytrace=False)
    return folder


@pytest.fixture
def ort_floor_env(ort_floor_path: Path) -> dict[str, str]:
    """The environment of a subprocess that gets the oldest onnxruntime and this checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ort_floor_path), str(ROOT)])}
