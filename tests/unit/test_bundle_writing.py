"""Writing a bundle is all or nothing, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorgnette.bundle import open_bundle, writing
from lorgnette.errors import EXIT_WRONG_INPUT, LorgnetteError
from tests.small_bundle import fill, make_bundle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.lorg")


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    def interrupted() -> None:
        with writing(tmp_path / "x.lorg") as folder:
            fill(folder)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_the_final_name_appears_last(tmp_path: Path) -> None:
    with writing(tmp_path / "deep" / "x.lorg") as folder:
        assert not (tmp_path / "deep" / "x.lorg").exists()
        fill(folder)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.lorg"]


@pytest.mark.parametrize("name", ["x", "x.zip", ".lorg", "x.lorg.d", "x.LORG"])
def test_wrong_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(LorgnetteError, match=r"end in \.lorg") as caught, writing(tmp_path / name):
        pytest.fail("entered")
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    assert list(tmp_path.iterdir()) == []


def test_existing_bundle_is_kept(path: Path) -> None:
    with pytest.raises(LorgnetteError, match=r"exists already.*--force") as caught, writing(path):
        pytest.fail("entered")
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    open_bundle(path).check_digests()


def test_existing_bundle_is_replaced(path: Path) -> None:
    with writing(path, replace=True) as folder:
        fill(folder, b"another")
    assert open_bundle(path).file("graphs/decoder.onnx").read_bytes() == b"another"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_failed_replacement_keeps_the_old(path: Path) -> None:
    with pytest.raises(RuntimeError), writing(path, replace=True):
        raise RuntimeError
    open_bundle(path).check_digests()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_failed_renaming_keeps_the_old(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(str(os.getpid())) and "old" not in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(LorgnetteError, match="Input/output"), writing(path, replace=True) as folder:
        fill(folder, b"another")
    assert open_bundle(path).file("graphs/decoder.onnx").read_bytes() == b"graph"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "broken link"])
def test_what_is_no_bundle_is_never_replaced(path: Path, kind: str) -> None:
    final = path.with_name("other.lorg")
    if kind == "folder":
        final.mkdir()
        (final / "thesis.txt").write_text("x")
    elif kind == "file":
        final.write_text("x")
    else:
        final.symlink_to(path if kind == "link" else path / "nowhere")
    with pytest.raises(LorgnetteError, match="not a bundle"), writing(final, replace=True):
        pytest.fail("entered")
    assert os.path.lexists(final)
    open_bundle(path).check_digests()


CHILD = """
import sys, time
from lorgnette.bundle import writing
with writing(sys.argv[1]) as folder:
    (folder / "half").write_bytes(b"0" * 1000)
    print(folder, flush=True)
    time.sleep(60)
"""


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "x.lorg"
    command = [sys.executable, "-c", CHILD, str(target)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    partial = Path(child.stdout.readline().strip())
    assert partial.is_dir()
    assert partial.parent == tmp_path
    with writing(target) as folder:  # the other one is alive: its folder is left alone
        assert partial.is_dir()
        fill(folder)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert partial.is_dir()
    with writing(target, replace=True) as folder:
        assert not partial.exists()
        fill(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["x.lorg"]


def test_leftovers_under_our_own_process_id_are_removed(tmp_path: Path) -> None:
    """As in a container, where each run may have the same one."""
    partial = tmp_path / f".x.lorg.partial-{os.getpid()}"
    partial.mkdir()
    (partial / "half").write_text("0")
    with writing(tmp_path / "x.lorg") as folder:
        assert not (folder / "half").exists()
        fill(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["x.lorg"]


@pytest.mark.parametrize(
    "other", [".y.lorg.partial-999999999", ".x.lorg.partial-abc", "x.lorg.bak"]
)
def test_other_folders_are_left_alone(tmp_path: Path, other: str) -> None:
    (tmp_path / other).mkdir()
    with writing(tmp_path / "x.lorg") as folder:
        fill(folder)
    assert (tmp_path / other).is_dir()


def test_brackets_in_a_name(tmp_path: Path) -> None:
    (tmp_path / ".[ab].lorg.partial-999999999").mkdir()
    with writing(tmp_path / "[ab].lorg") as folder:
        fill(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["[ab].lorg"]


def test_full_disk(tmp_path: Path) -> None:
    def interrupted() -> None:
        with writing(tmp_path / "x.lorg") as folder:
            (folder / "half").write_text("0")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(LorgnetteError) as caught:
        interrupted()
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    for part in ("cannot write the bundle", "x.lorg", "No space left", "free some space"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(LorgnetteError, match="cannot write the bundle"),
        writing(tmp_path / "file" / "x.lorg"),
    ):
        pytest.fail("entered")
