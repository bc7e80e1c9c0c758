"""The errors of a bundle's matrices, as the bundle itself records them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from lorgnette.bundle import list_files, open_bundle
from lorgnette.errors import BundleError
from lorgnette.export.check import Parts
from lorgnette.export.families import open_checkpoint
from lorgnette.export.pipeline import read_parts
from lorgnette.export.quality_report import TENSORS_FILE, plan_tensors, read_tensors, write_tensors
from lorgnette.quantize.plan import PLANS
from lorgnette.recipe import Recipe
from lorgnette.runtime.model import open_model
from tests.runtime.support import copy_bundle, redigest


@pytest.fixture(scope="module")
def parts(checkpoint: Path) -> Parts:
    return read_parts(open_checkpoint(checkpoint, None), Recipe())


@pytest.fixture
def recorded(bundle_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a bundle that records the errors of its matrices."""
    return copy_bundle(bundle_of("int4-fast"), tmp_path / "recorded.lorg")


def test_a_bundle_records_the_errors_of_its_matrices(
    recorded: Path, fp32: Path, parts: Parts
) -> None:
    opened = open_bundle(recorded)
    wanted, _ = plan_tensors(parts, PLANS["int4-fast"], opened.manifest)
    assert {(tensor.component, tensor.name): tensor for tensor in wanted} == {
        (tensor.component, tensor.name): tensor for tensor in read_tensors(opened) or ()
    }
    assert read_tensors(open_bundle(fp32)) == ()  # nothing is rounded, and that is on record


def test_a_calibrated_bundle_records_what_cannot_be_made_again(
    bundle_of: Callable[[str], Path], parts: Parts
) -> None:
    fast, calibrated = (
        {
            (tensor.component, tensor.name): tensor
            for tensor in read_tensors(open_bundle(path)) or ()
        }
        for path in (bundle_of("int4-fast"), bundle_of("int4"))
    )
    assert fast.keys() == calibrated.keys()
    assert {tensor.method for tensor in calibrated.values()} == {"gptq", "mse"}
    assert all(tensor.scheme == fast[key].scheme for key, tensor in calibrated.items())
    assert all((tensor.sqnr_db or 0) > 12 for tensor in calibrated.values())


def test_a_bundle_may_record_nothing_of_its_matrices(recorded: Path) -> None:
    """Older ones do not."""
    manifest = open_bundle(recorded).manifest
    (recorded / TENSORS_FILE).unlink()
    changed = msgspec.structs.replace(manifest, files=list_files(recorded))
    (recorded / "manifest.json").write_bytes(msgspec.json.encode(changed))
    assert read_tensors(open_bundle(recorded)) is None
    open_model(recorded, threads=1)


def test_records_are_read_as_they_were_written(recorded: Path, fp32: Path, tmp_path: Path) -> None:
    written = read_tensors(open_bundle(recorded))
    assert written
    path = copy_bundle(fp32, tmp_path / "again.lorg")
    write_tensors(path, written)
    assert read_tensors(open_bundle(redigest(path))) == written


@pytest.mark.parametrize("data", [b"[", b"{}", b'[{"name": "a"}]', b"\xff"])
def test_damaged_records_are_told(recorded: Path, data: bytes) -> None:
    (recorded / TENSORS_FILE).write_bytes(data)
    with pytest.raises(BundleError, match="errors of matrices are damaged"):
        read_tensors(open_bundle(redigest(recorded)))
