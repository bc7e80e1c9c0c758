"""What a machine is, and in which state: read from the system's files, null where it has none."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lorgnette
from lorgnette.runtime.profile.document import Battery, Conditions, Energy, Machine

ROOT = Path("/")
CPU_FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16"),
    *("amx_int8", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sme"),
)
"""Features that decide how fast an engine multiplies, as the kernel spells them."""
PACKAGES = {
    "onnxruntime": ("onnxruntime",),
    "coreai": ("coreai-core",),
    "coreml": ("coremltools", "torch"),
    "coreml-float32": ("coremltools", "torch"),
    "executorch": ("executorch", "torch"),
}
"""What an engine consists of, as it is called where it is installed from."""
UNREAD = (OSError, ValueError, IndexError)
"""What reading a number from a system's file may raise."""


def describe_machine(engine: str, usable_cores: int, root: Path = ROOT) -> Machine:
    """The machine, and what is installed of an engine.

    Args:
        engine: Its name in a manifest.
        usable_cores: Cores that this process may use.
        root: Where the system's files are.
    """
    cpu, features, total = cpu_model(root), cpu_features(root), memory(root)["total"]
    reasons = {
        "cpu": "the system does not tell its name" if cpu is None else "",
        "features": f"there is no {root / 'proc/cpuinfo'}" if features is None else "",
        "memory_bytes": "the system does not tell" if total is None else "",
        "cores": "the system does not tell" if os.cpu_count() is None else "",
    }
    return Machine(
        cpu=cpu,
        architecture=platform.machine(),
        cores=os.cpu_count(),
        usable_cores=usable_cores,
        features=None if features is None else tuple(features),
        memory_bytes=total,
        os=platform.platform(),
        python=platform.python_version(),
        packages=_packages(engine),
        reasons=_given(reasons),
    )


def cpu_model(root: Path = ROOT) -> str | None:
    """The processor's name; None where the system does not tell."""
    text = _text(root / "proc/cpuinfo") or ""
    match = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or None


def cpu_features(root: Path = ROOT) -> list[str] | None:
    """The features of `CPU_FEATURES` that the CPU has; None where the system does not tell."""
    text = _text(root / "proc/cpuinfo")
    if text is None:
        return None
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    present = set(match[1].split()) if match else set()
    return [feature for feature in CPU_FEATURES if feature in present]


def memory(root: Path = ROOT) -> dict[str, int | None]:
    """Memory of the machine, what of it is free to use, and a container's limit."""
    total = available = None
    try:
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
        values = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total, available = values.get("MemTotal"), values.get("MemAvailable")
    except UNREAD:
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = (_text(root / "sys/fs/cgroup/memory.max") or "max").strip()
    return {
        "total": total,
        "available": available,
        "container_limit": int(text) if text.isdigit() else None,
    }


def conditions(root: Path = ROOT) -> Conditions:
    """The machine's state now."""
    load = load_average()
    mhz, thermal, batteries = _cpu_mhz(root), _thermal(root), _batteries(root)
    power = root / "sys/class/power_supply"
    reasons = {
        "load_average": "the system does not tell" if load is None else "",
        "cpu_mhz": "neither cpufreq nor /proc/cpuinfo tells it" if mhz is None else "",
        "thermal_c": f"no zone under {root / 'sys/class/thermal'}" if thermal is None else "",
        "batteries": f"no battery under {power}" if batteries is None else "",
    }
    return Conditions(
        load_average=load,
        cpu_mhz=mhz,
        thermal_c=thermal,
        batteries=batteries,
        reasons=_given(reasons),
    )


def load_average() -> float | None:
    """Of the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


class EnergyMeter:
    """Energy between two moments, by the counters of the processor packages."""

    def __init__(self, root: Path = ROOT) -> None:
        """Looks for counters that may be read."""
        folder = root / "sys/class/powercap"
        zones = sorted(folder.glob("intel-rapl:*")) if folder.is_dir() else []
        self._zones = [zone for zone in zones if re.fullmatch(r"intel-rapl:\d+", zone.name)]
        self._joules: dict[str, float] = {}
        self._runs: dict[str, int] = {}
        self._reason = "" if self._zones else f"no counters of RAPL under {folder}"
        if self._zones and self._read() is None:
            self._reason = f"the counters of {self._zones[0]} may be read by root only"

    @contextmanager
    def of(self, name: str, runs: Callable[[], int]) -> Iterator[None]:
        """Counts for a phase while it runs; `runs` tells afterwards how often it did."""
        before = self._read()
        yield
        after = self._read()
        if before is not None and after is not None:
            pairs = zip(before, after, self._zones, strict=True)
            joules = sum(_difference(a, b, zone) for a, b, zone in pairs) / 1e6
            self._joules[name] = self._joules.get(name, 0.0) + joules
            self._runs[name] = self._runs.get(name, 0) + runs()

    def energy(self) -> Energy:
        """What was counted."""
        if self._reason:
            return Energy(joules_per_run=None, reason=self._reason)
        each = {name: total / max(self._runs[name], 1) for name, total in self._joules.items()}
        return Energy(joules_per_run=each)

    def _read(self) -> list[int] | None:
        """Microjoules of each package."""
        if self._reason:
            return None
        try:
            return [int((zone / "energy_uj").read_text("ascii")) for zone in self._zones]
        except UNREAD:
            return None


def both(one: Energy, other: Energy) -> Energy:
    """What two meters counted, of phases that are not the same."""
    if one.joules_per_run is None or other.joules_per_run is None:
        return one if one.joules_per_run is None else other
    return Energy(joules_per_run={**one.joules_per_run, **other.joules_per_run})


def _difference(before: int, after: int, zone: Path) -> int:
    """Microjoules, where the counter may have begun anew."""
    if after >= before:
        return after - before
    text = (_text(zone / "max_energy_range_uj") or "").strip()
    return after - before + int(text) if text.isdigit() else 0


def _packages(engine: str) -> dict[str, str]:
    found = {"lorgnette": lorgnette.__version__}
    for name in ("numpy", *PACKAGES.get(engine, ())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpu_mhz(root: Path) -> tuple[float, ...] | None:
    files = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
    values = [_number(file) for file in files]
    if values and None not in values:
        return tuple(value / 1e3 for value in values if value is not None)
    text = _text(root / "proc/cpuinfo") or ""
    found = re.findall(r"^cpu MHz\s*:\s*(\d+(?:\.\d+)?)\s*$", text, re.MULTILINE)
    return tuple(float(value) for value in found) or None


def _thermal(root: Path) -> dict[str, float] | None:
    found = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        value = _number(zone / "temp")
        if value is not None:
            kind = (_text(zone / "type") or "").strip()
            found[f"{zone.name} {kind}".strip()] = value / 1e3
    return found or None


def _batteries(root: Path) -> tuple[Battery, ...] | None:
    found = []
    for folder in sorted(root.glob("sys/class/power_supply/*")):
        if (_text(folder / "type") or "").strip() != "Battery":
            continue
        percent, power = _number(folder / "capacity"), _number(folder / "power_now")
        status = (_text(folder / "status") or "").strip() or None
        reasons = {
            "percent": "no capacity" if percent is None else "",
            "watts": "no power_now" if power is None else "",
            "status": "no status" if status is None else "",
        }
        found.append(
            Battery(
                name=folder.name,
                percent=percent,
                status=status,
                watts=None if power is None else abs(power) / 1e6,
                reasons=_given(reasons),
            )
        )
    return tuple(found) or None


def _number(file: Path) -> float | None:
    try:
        return float(int(file.read_text("ascii")))
    except UNREAD:
        return None


def _text(file: Path) -> str | None:
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return None


def _given(reasons: dict[str, str]) -> dict[str, str]:
    return {name: reason for name, reason in reasons.items() if reason}
