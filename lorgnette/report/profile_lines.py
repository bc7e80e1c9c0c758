"""A profile in words and rows that the terminal and the HTML report share."""

from __future__ import annotations

from lorgnette.runtime.profile.compare import Comparison, title
from lorgnette.runtime.profile.document import Conditions, Figure, Memory, OperatorPhase, Profile
from lorgnette.runtime.profile.flat import peak_memory

Row = tuple[str, ...]
HEAD: Row = ("", "median", "p10 to p90", "runs")
COMPARED: Row = ("", "A", "B", "A / B", "by the spreads", "")
OPERATOR_HEAD: Row = ("share", "ms", "nodes", "operator", "module")
MEMORY_HEAD: Row = ("", "peak", "at the end", "private", "")
SWEEP_HEAD: Row = ("threads", "first token, 1 tile", "vision, 1 tile", "prefill 256", "decode 256")
NOTHING = "-"
"""What stands where a figure would."""


def heading(profile: Profile) -> str:
    """What was measured, and on what, in a line."""
    machine, threads = profile.machine, profile.settings.threads
    cores = f"{machine.usable_cores} core{'s' if machine.usable_cores != 1 else ''}"
    cpu = machine.cpu or machine.architecture
    return f"{title(profile)}, {threads} thread{'s' if threads != 1 else ''}, {cpu}, {cores}"


def headline_rows(profile: Profile) -> list[Row]:
    """What a person feels first."""
    one, full = profile.answers["one_tile"], profile.answers["full_tiling"]
    phases, last = profile.phases, max(profile.phases.decode, key=int)
    first = min(profile.phases.decode, key=int)
    rows = [
        row("cold start, to the first token", profile.start["cold"].first_token_ms),
        row("warm start, to the first token", profile.start["warm"].first_token_ms),
        row("first token, 1 tile", one.ttft_ms),
        row(f"first token, {full.tiles or 'all'} tiles", full.ttft_ms),
        row("first token, second turn", _known(full.second_turn_ms, one.second_turn_ms)),
        row(f"decode, context {first}", phases.decode[first].tokens_per_s, "tokens/s"),
        row(f"decode, context {last}", phases.decode[last].tokens_per_s, "tokens/s"),
    ]
    return [*rows, _peak_row(profile.memory)]


def phase_rows(profile: Profile) -> list[Row]:
    """Each phase alone."""
    phases, answer = profile.phases, profile.answers["full_tiling"]
    tiles = f"{answer.tiles or 'all'} tiles"
    rows = [
        row("preprocess, 1 tile", phases.preprocess_tile_ms),
        row(f"preprocess, {tiles}", phases.preprocess_full_ms),
        row("vision, 1 tile", phases.vision_tile_ms),
        row(f"vision, {tiles}", phases.vision_full_ms),
        row("projector", phases.projector_ms),
        row("embedding, 1 token", phases.embedding_token_ms),
        row("embedding, 256 tokens", phases.embedding_256_ms),
    ]
    for count, prefill in phases.prefill.items():
        rows.append(row(f"prefill, {count} positions", prefill.tokens_per_s, "tokens/s"))
    for context, decode in phases.decode.items():
        rows.append(row(f"a token, context {context}", decode.token_ms))
    return rows


def start_rows(profile: Profile) -> list[Row]:
    """What starting consists of."""
    rows = []
    for name, start in profile.start.items():
        rows += [
            row(f"{name}: Python", start.python_ms),
            row(f"{name}: imports", start.imports_ms),
            row(f"{name}: open the bundle", start.load_ms),
            row(f"{name}: ready", start.ready_ms),
            row(f"{name}: first token", start.first_token_ms),
        ]
    return rows


def memory_rows(profile: Profile) -> list[Row]:
    """Memory by phase: peak, what stays, and what of that is no file."""
    rows: list[Row] = []
    for phase, memory in profile.memory.items():
        values = (memory.peak_bytes, memory.steady_bytes, memory.steady_private_bytes)
        reasons = "; ".join(sorted(set(memory.reasons.values())))
        rows.append((phase.replace("_", " "), *map(megabytes, values), reasons))
    return rows


def operator_rows(phase: OperatorPhase, most: int) -> list[Row]:
    """The largest groups of an entry point."""
    return [
        (
            f"{group.share:.1%}",
            number(group.ms),
            str(group.nodes),
            group.operator,
            group.module or NOTHING,
        )
        for group in phase.groups[:most]
    ]


def operator_title(entry_point: str, phase: OperatorPhase) -> str:
    """What a table of operators is about."""
    return (
        f"{entry_point} ({phase.component}, {phase.what}): {number(phase.operators_ms)} ms in "
        f"operators of {number(phase.wall_ms)} ms"
    )


def operator_line(phase: OperatorPhase, most: int = 5) -> str:
    """Shares by operator alone, the largest first."""
    shares: dict[str, float] = {}
    for group in phase.groups:
        shares[group.operator] = shares.get(group.operator, 0.0) + group.share
    largest = sorted(shares.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {share:.1%}" for name, share in largest)


def sweep_rows(profile: Profile) -> list[Row]:
    """Medians by number of threads."""
    rows: list[Row] = []
    for count, found in profile.sweep.items():
        speeds = (found.prefill_256_tokens_per_s, found.decode_256_tokens_per_s)
        cells = [value(found.ttft_tile_ms), value(found.vision_tile_ms)]
        rows.append((count, *cells, *(value(speed, "tokens/s") for speed in speeds)))
    return rows


def condition_rows(profile: Profile) -> list[Row]:
    """The machine's state before and after, and the energy."""
    rows: list[Row] = [("", "before", "after")]
    pairs = [_conditions(state) for state in (profile.before, profile.after)]
    rows += [(name, pairs[0][name], pairs[1][name]) for name in pairs[0]]
    energy = profile.energy.joules_per_run
    if energy is None:
        rows.append(("energy", f"not measured: {profile.energy.reason}"))
    for name, joules in (energy or {}).items():
        rows.append((f"energy: {name}", f"{number(joules)} J a run"))
    return rows


def noise_lines(profile: Profile) -> list[str]:
    """Whether the machine was noisy, and why."""
    calibration, spread = profile.noise.calibration_ms, profile.noise.calibration_spread
    if profile.noise.noisy:
        return [f"noisy machine: {note}" for note in profile.noise.notes]
    width = "" if spread is None else f", p90 / p10 {spread:.2f}"
    return [f"quiet machine: a fixed piece of work took {value(calibration)}{width}"]


def measured(rows: list[Row]) -> list[Row]:
    """Rows that have a figure."""
    return [each for each in rows if each[1] != NOTHING]


def unmeasured(rows: list[Row]) -> list[str]:
    """A line for each row that has a reason in place of a figure."""
    return [f"{each[0]}: not measured: {each[2]}" for each in rows if each[1] == NOTHING]


def comparison_rows(comparison: Comparison) -> list[Row]:
    """Every figure of both documents."""
    rows: list[Row] = []
    for found in comparison.rows:
        unit = _unit(found.name)
        cells = (value(found.a, unit), value(found.b, unit))
        if found.ratio is None or found.low is None or found.high is None:
            rows.append((found.name, *cells, NOTHING, "", f"{found.verdict}: {found.reason}"))
        else:
            spread = f"{found.low:.2f} to {found.high:.2f}"
            rows.append((found.name, *cells, f"{found.ratio:.2f}", spread, found.verdict))
    return rows


def row(name: str, figure: Figure, unit: str = "ms") -> Row:
    """A figure as cells; where there is none, the reason stands in their place."""
    if figure.median is None or figure.p10 is None or figure.p90 is None:
        return (name, NOTHING, figure.reason)
    spread = f"{number(figure.p10)} to {number(figure.p90)}"
    return (name, value(figure, unit), spread, str(figure.runs))


def value(figure: Figure, unit: str = "ms") -> str:
    """The median with its unit."""
    if figure.median is None:
        return NOTHING
    return megabytes(figure.median) if unit == "MB" else f"{number(figure.median)} {unit}"


def number(amount: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}"


def megabytes(count: float | None) -> str:
    """Bytes for people."""
    return NOTHING if count is None else f"{number(count / 1e6)} MB"


def _unit(name: str) -> str:
    if name.endswith("_per_s"):
        return "tokens/s"
    return "MB" if name.endswith("bytes") else "ms"


def _known(figure: Figure, otherwise: Figure) -> Figure:
    return otherwise if figure.median is None else figure


def _peak_row(memory: dict[str, Memory]) -> Row:
    peak = peak_memory(memory)
    if peak is None:
        reasons = (reason for phase in memory.values() for reason in phase.reasons.values())
        return ("peak memory", NOTHING, next(reasons, "not measured"))
    name = next(name for name, phase in memory.items() if phase.peak_bytes == peak)
    return ("peak memory", megabytes(peak), f"in {name.replace('_', ' ')}", "1")


def _conditions(state: Conditions) -> dict[str, str]:
    reasons = state.reasons
    batteries = [
        f"{each.name} {'' if each.percent is None else f'{each.percent:.0f} % '}{each.status or ''}"
        for each in state.batteries or ()
    ]
    zones = [f"{name} {celsius:.0f} °C" for name, celsius in (state.thermal_c or {}).items()]
    mhz = state.cpu_mhz
    return {
        "load average": reasons.get("load_average", "")
        if state.load_average is None
        else f"{state.load_average:.2f}",
        "CPU, MHz": reasons.get("cpu_mhz", "")
        if mhz is None
        else " ".join(f"{x:.0f}" for x in mhz),
        "thermal zones": ", ".join(zones) or reasons.get("thermal_c", ""),
        "batteries": ", ".join(batteries) or reasons.get("batteries", ""),
    }
