"""The entry points, `lorgnette list` and `lorgnette doctor`."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

import lorgnette
from lorgnette.cli import doctor
from lorgnette.quantize.plan import MIXED, PLANS
from tests.unit.cli_helpers import ROOT, call, document, start

COMMANDS = ("export", "run", "profile", "evaluate", "verify", "inspect", "list", "doctor")


def test_help_is_there_for_every_command() -> None:
    text = call("--help").stdout
    for command in COMMANDS:
        assert f"  {command} " in text
        assert call(command, "--help").stdout.startswith(f"Usage: cli {command} ")


def test_help_loads_nothing_heavy() -> None:
    check = """
import atexit, sys
heavy = {"torch", "onnxruntime", "onnx", "PIL", "numpy", "tokenizers", "safetensors", "jinja2"}
atexit.register(lambda: print("loaded:", sorted(heavy & set(sys.modules))))
"""
    out, err = start(["--help"], before=check).communicate(timeout=60)
    assert err == b""
    assert out.decode().splitlines()[-1] == "loaded: []"


def test_python_dash_m_is_the_same_entry() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorgnette", "--version"], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.decode().strip() == f"lorgnette, version {lorgnette.__version__}"
    assert call("--version").exit_code == 0


def test_an_unknown_command_is_exit_2() -> None:
    assert call("nonesuch").exit_code == 2


def test_the_list_of_families() -> None:
    (smolvlm,) = [f for f in document("list", "families")["families"] if f["name"] == "smolvlm"]
    assert smolvlm["model_types"] == ["idefics3", "smolvlm"]


def test_the_list_of_targets_tells_what_works_here() -> None:
    (target,) = [t for t in document("list", "targets")["targets"] if t["name"] == "onnx-cpu"]
    assert target["can_lower"]
    assert target["can_run"]
    assert target["no_lower_reason"] is None


def test_the_lists_without_the_extra_give_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else 1)
    (target,) = [t for t in document("list", "targets")["targets"] if t["name"] == "onnx-cpu"]
    assert not target["can_lower"]
    assert "no torch: pip install 'lorgnette[export]'" in target["no_lower_reason"]
    assert target["can_run"]
    assert "no torch" in document("list", "families")["families"][0]["reason"]
    assert "pip install" in call("list", "targets").stdout


def test_a_target_whose_engine_is_missing_or_old_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.2.0")
    reasons = {t["name"]: t["no_run_reason"] for t in document("list", "targets")["targets"]}
    assert reasons["onnx-cpu"] == "onnxruntime 0.2.0 is too old"
    assert reasons["coreml"] == "coremltools 0.2.0 is too old"

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    assert not any(t["can_run"] for t in document("list", "targets")["targets"])


def test_the_list_of_schemes() -> None:
    told = document("list", "schemes")["schemes"]
    assert [scheme["name"] for scheme in told] == [*PLANS, MIXED]
    assert all("onnx-cpu" in scheme["targets"] for scheme in told)
    assert call("list", "schemes").stdout.count("\n") == len(PLANS) + 1


def test_doctor_finds_this_environment_sound() -> None:
    told = document("doctor")
    assert told["sound"]
    assert told["problems"] == []
    assert told["usable_cores"] >= 1
    assert told["free_disk_bytes"] > 0
    assert "CPUExecutionProvider" in told["engine"]["providers"]
    assert told["engine"]["version"] == importlib.metadata.version("onnxruntime")
    assert call("doctor").stdout.splitlines()[-1] == "The base install is sound."


def test_doctor_tells_whether_telemetry_was_off_before_lorgnette_turned_it_off() -> None:
    for before, wanted in (
        ("import os; os.environ.pop('ORT_DISABLE_TELEMETRY', None)", None),
        ("import os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'", "1"),
    ):
        out, _ = start(["doctor", "--json"], before=before).communicate(timeout=60)
        assert json.loads(out)["telemetry"] == {"ORT_DISABLE_TELEMETRY": wanted}


def test_doctor_names_what_is_missing_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"click": ">=99", "nonesuch": ">=1", "numpy": ">=1.26"}
    monkeypatch.setattr(doctor, "requirements", lambda: (wanted, {"torch": "==0.1"}))
    result = call("doctor")
    assert result.exit_code == 1
    assert "nonesuch missing, wanted >=1: pip install 'lorgnette'" in result.stdout
    assert "pip install 'lorgnette[export]'" in result.stdout
    assert "sound" not in result.stdout
    told = json.loads(call("doctor", "--json").stdout)
    assert not told["sound"]
    assert [p["name"] for p in told["packages"] if not p["fits"]] == ["click", "nonesuch"]


def test_doctor_tells_of_an_engine_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = call("doctor", "--json")
    assert result.exit_code == 1
    assert "onnxruntime" in json.loads(result.stdout)["problems"][-1]


def test_only_a_missing_export_part_leaves_the_base_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: ({}, {"nonesuch": ">=1"}))
    told = document("doctor")
    assert told["sound"]
    assert "nonesuch" in told["export_problems"][0]


def test_wanted_versions_come_from_the_package_or_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "click>=8.1",
        "pillow>=10.1",
        "tomli; python_version < '3.11'",
        "torch==2.13.0; extra == 'export'",
        'click>=8.1; extra == "export"',
        "pytest>=9; extra == 'dev'",
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: lines)
    assert doctor.requirements() == (
        {"click": ">=8.1", "pillow": ">=10.1"},
        {"torch": "==2.13.0"},
    )

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.requires", absent)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["click>=8.1"]\n'
        '[project.optional-dependencies]\nexport = ["torch==2.13.0"]\n'
    )
    monkeypatch.setattr("lorgnette.__file__", str(tmp_path / "lorgnette" / "__init__.py"))
    assert doctor.requirements() == ({"click": ">=8.1"}, {"torch": "==2.13.0"})
    (tmp_path / "pyproject.toml").unlink()
    assert doctor.requirements() == ({}, {})


RELEASE = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(
    lambda parts: ".".join(map(str, parts))
)


@given(
    version=RELEASE,
    wanted=st.lists(
        st.tuples(st.sampled_from([">=", "<=", ">", "<", "==", "!="]), RELEASE), max_size=3
    ),
)
def test_versions_compare_as_packaging_does(version: str, wanted: list[tuple[str, str]]) -> None:
    specifiers = ",".join(operator + other for operator, other in wanted)
    assert doctor.fits(version, specifiers) == SpecifierSet(specifiers).contains(version)


@given(version=RELEASE, other=RELEASE, operator=st.sampled_from(["==", "!="]))
def test_prefixes_compare_as_packaging_does(version: str, other: str, operator: str) -> None:
    specifier = f"{operator}{other}.*"
    assert doctor.fits(version, specifier) == SpecifierSet(specifier).contains(version)


@pytest.mark.parametrize(("command", "code"), [(["list", "families"], 0), (["lists"], 2)])
def test_a_library_that_aborts_at_exit_does_not_change_the_exit_code(
    command: list[str], code: int
) -> None:
    before = """
import atexit, os, sys, types
sys.modules["coreai.runtime"] = types.ModuleType("coreai.runtime")
atexit.register(os.abort)
"""
    child = start(command, before=before)
    out, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert (b"smolvlm" in out) == (code == 0)
    assert (b"lists" in err) == (code == 2)
