"""The type checker sees every folder: errors planted there are found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# One module of lorgnette/ itself and of each folder that a link leads to.
PLANTED_IN = (
    "lorgnette/errors.py",
    "lorgnette/export/config.py",
    "lorgnette/quantize/scheme.py",
    "lorgnette/runtime/rng.py",
    "lorgnette/targets/__init__.py",
)

# A wrong assignment is found by any setting, a bare function only by strict ones.
PLANT = """

_planted: int = "text"


def _unannotated(x):
    return x
"""


def test_errors_planted_in_every_folder_are_found(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    if (ROOT / ".mypy_cache").is_dir():  # `make types` has filled it: seconds instead of a minute
        shutil.copytree(ROOT / ".mypy_cache", cache)
    command = [sys.executable, "-m", "mypy", "-p", "lorgnette", "--cache-dir", str(cache)]
    wanted = set()
    for number, name in enumerate(PLANTED_IN):
        planted = tmp_path / f"{number}.py"
        text = (ROOT / name).read_text(encoding="utf-8")
        planted.write_text(text + PLANT, encoding="utf-8")
        command += ["--shadow-file", name, str(planted)]
        first = len(text.splitlines()) + 3
        wanted |= {f"{name}:{first}: [assignment]", f"{name}:{first + 3}: [no-untyped-def]"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    found = {f"{line.split(' error: ')[0]} {line.rsplit(' ', 1)[1]}" for line in errors}
    assert wanted <= found, done.stdout
