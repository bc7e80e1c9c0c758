"""What a profile tells of the machine: from its system's files, or null with the reason."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lorgnette.runtime.profile import machine, memory, pagecache
from lorgnette.runtime.profile.noise import NoiseWatch
from lorgnette.runtime.profile.stats import figure
from tests.runtime.profile_support import nulls

ARM = """processor\t: 0
BogoMIPS\t: 48.00
Features\t: fp asimd evtstrm aes asimddp i8mm sve2
Hardware\t: Some Board
"""
X86 = "model name\t: Fast CPU\ncpu MHz\t\t: 2445.5\nflags\t\t: fpu avx2 avx512_vnni\n"


def write(root: Path, files: dict[str, str]) -> Path:
    """Files below a root, with their folders."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def plain_nulls(part: msgspec.Struct) -> dict[str, str]:
    return dict(nulls(msgspec.to_builtins(part)))


@pytest.mark.parametrize(
    ("text", "name", "features"),
    [
        (ARM, "Some Board", ["asimd", "asimddp", "i8mm"]),
        (X86, "Fast CPU", ["avx2", "avx512_vnni"]),
    ],
)
def test_a_processor_is_told_by_name_and_features(
    tmp_path: Path, text: str, name: str, features: list[str]
) -> None:
    write(tmp_path, {"proc/cpuinfo": text, "proc/meminfo": "MemTotal: 2048 kB\n"})
    found = machine.describe_machine("executorch", 4, tmp_path)
    assert (found.cpu, list(found.features or ()), found.memory_bytes) == (name, features, 2**21)
    assert {"lorgnette", "numpy", "executorch", "torch"} <= set(found.packages)


def test_a_machine_without_any_of_it_has_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr(os, "getloadavg", lambda: (_ for _ in ()).throw(OSError()))
    monkeypatch.setattr(os, "sysconf_names", {})
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    found = machine.describe_machine("onnxruntime", 1, tmp_path)
    state = machine.conditions(tmp_path)
    energy = machine.EnergyMeter(tmp_path).energy()
    seen = {**plain_nulls(found), **plain_nulls(state), **plain_nulls(energy)}
    wanted = {"cpu", "features", "memory_bytes", "cores", "load_average", "cpu_mhz"}
    wanted |= {"thermal_c", "batteries", "joules_per_run"}
    assert {name.removeprefix("$.") for name in seen} == wanted
    assert all(seen.values())


def test_sensors_are_read_in_their_units(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1800000\n",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "45500\n",
            "sys/class/thermal/thermal_zone1/temp": "broken\n",
            "sys/class/power_supply/AC/type": "Mains\n",
            "sys/class/power_supply/BAT0/type": "Battery\n",
            "sys/class/power_supply/BAT0/capacity": "87\n",
            "sys/class/power_supply/BAT0/status": "Discharging\n",
            "sys/class/power_supply/BAT0/power_now": "-6500000\n",
            "sys/class/power_supply/BAT1/type": "Battery\n",
        },
    )
    found = machine.conditions(tmp_path)
    assert found.cpu_mhz == (1800.0, 2400.0)
    assert found.thermal_c == {"thermal_zone0 cpu-thermal": 45.5}
    assert found.batteries is not None
    first, second = found.batteries
    assert (first.name, first.percent, first.watts) == ("BAT0", 87, 6.5)
    assert first.status == "Discharging"
    assert set(second.reasons) == {"percent", "watts", "status"}


def test_the_frequency_may_stand_in_cpuinfo(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": X86})
    assert machine.conditions(tmp_path).cpu_mhz == (2445.5,)


def test_energy_is_what_the_counters_of_all_packages_moved_by(tmp_path: Path) -> None:
    first, second = (f"sys/class/powercap/intel-rapl:{n}" for n in (0, 1))
    write(
        tmp_path,
        {
            f"{first}/energy_uj": "1000000",
            f"{first}/max_energy_range_uj": "9000000",
            f"{first}:0/energy_uj": "5",  # part of the first package
            f"{second}/energy_uj": "8500000",
            f"{second}/max_energy_range_uj": "9000000",
        },
    )
    meter = machine.EnergyMeter(tmp_path)
    with meter.of("decode", lambda: 4):
        write(tmp_path, {f"{first}/energy_uj": "3000000", f"{second}/energy_uj": "500000"})
    # 2 J and, over the counter's end, 1 J, in four runs.
    assert meter.energy().joules_per_run == {"decode": pytest.approx(0.75)}


def test_counters_that_may_not_be_read_are_told(tmp_path: Path) -> None:
    write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj/none": ""})
    found = machine.EnergyMeter(tmp_path).energy()
    assert found.joules_per_run is None
    assert "may be read by root only" in found.reason


def stat(busy: int, steal: int) -> str:
    return f"cpu  {busy} 0 0 0 0 0 0 {steal} 0 0\ncpu0 1 2 3\n"


@pytest.mark.parametrize(
    ("load", "steal", "wide"), [(0.2, 0, 1.0), (3.0, 0, 1.0), (0.2, 9, 1.0), (0.2, 0, 3.0)]
)
def test_a_noisy_machine_is_told_with_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, steal: int, wide: float
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("lorgnette.runtime.profile.noise.timed", lambda run: 2.0)
    write(tmp_path, {"proc/stat": stat(100, 0)})
    watch = NoiseWatch(tmp_path)
    for _ in range(6):
        watch.calibrate()
    write(tmp_path, {"proc/stat": stat(191, steal)})
    figures = {
        "a.steady_ms": figure([5.0] * 8),
        "a.tokens_per_s": figure([10.0] * 4 + [10.0 * wide] * 4),
        "a.few_ms": figure([1.0, 900.0]),
        "a.tiny_ms": figure([0.001, 0.9] * 5),
    }
    found = watch.finish(figures, 4)
    noisy = load > 1 or steal > 0 or wide > 1
    assert found.noisy == noisy
    assert len(found.notes) == int(noisy)
    assert found.steal_share == pytest.approx(steal / (91 + steal))
    assert found.widest_spread == pytest.approx(wide)
    assert found.calibration_spread == 1.0
    if load > 1:
        assert found.notes == ("load average 3.00 on 4 cores before the first run",)
    if steal:
        assert "9.0%" in found.notes[0]
    if wide > 1:
        assert found.notes == ("p90 of a.tokens_per_s is 3.00 times its p10",)


def test_without_proc_the_noise_is_told_from_what_is_left(tmp_path: Path) -> None:
    found = NoiseWatch(tmp_path).finish({}, 10_000)
    assert not found.noisy
    assert found.steal_share is None
    assert all(plain_nulls(found).values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_memory_of_a_phase_is_its_peak_and_what_it_leaves() -> None:
    size = 64 * 2**20

    def passing() -> None:
        np.ones(size, np.uint8)

    kept: list[object] = []
    before = memory.of_phase(lambda: None)
    passed = memory.of_phase(passing)
    left = memory.of_phase(lambda: kept.append(np.ones(size, np.uint8)))
    assert None not in (before.peak_bytes, before.steady_bytes, before.steady_private_bytes)
    almost = 0.9 * size
    assert (passed.peak_bytes or 0) - (before.steady_bytes or 0) > almost
    assert (passed.peak_bytes or 0) - (passed.steady_bytes or 0) > almost
    assert (left.steady_private_bytes or 0) - (before.steady_private_bytes or 0) > almost


def test_memory_that_the_system_does_not_tell_is_null_with_the_reason(tmp_path: Path) -> None:
    found = memory.of_phase(lambda: None, tmp_path / "none")
    assert found.peak_bytes is found.steady_bytes is None
    assert "the peak cannot be reset" in found.reasons["peak_bytes"]
    assert all(plain_nulls(found).values())
    write(tmp_path, {"clear_refs": "", "status": "VmHWM:\t 12 kB\nVmRSS:\t 8 kB\nRssAnon: 1 kB\n"})
    told = memory.of_phase(lambda: None, tmp_path)
    assert (told.peak_bytes, told.steady_bytes, told.steady_private_bytes) == (12288, 8192, 1024)
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_files_leave_the_cache_and_come_back_by_reading(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(os.urandom(1 << 20))
    (tmp_path / "empty").touch()
    files = [file, tmp_path / "empty"]
    if pagecache.cached_share(files) is None or pagecache.evict(files):
        pytest.skip("this system neither tells nor forgets what is in its file cache")
    if pagecache.cached_share(files) == 1.0:
        pytest.skip("this file system lies in memory")
    assert pagecache.cached_share(files) == 0.0
    assert pagecache.cached_share(files) == 0.0  # asking brings nothing in
    file.read_bytes()
    assert pagecache.cached_share(files) == 1.0


def test_a_file_that_cannot_be_forgotten_is_told(tmp_path: Path) -> None:
    assert "No such file" in pagecache.evict([tmp_path / "none"])
