"""A profile, or two side by side, as one HTML file that needs nothing else."""

from __future__ import annotations

from lorgnette.report import profile_lines as lines
from lorgnette.report import profile_plots as plots
from lorgnette.report.page import page, picture, table, text
from lorgnette.runtime.profile.compare import Comparison
from lorgnette.runtime.profile.document import Figure, Profile

MOST_GROUPS = 30
"""Groups of operators in a table; the JSON has all."""


def render_profile(profile: Profile) -> bytes:
    """The report of one profile; the same document gives the same bytes."""
    parts = [
        f"<p>{text(lines.heading(profile))}. Measured {text(profile.measured_at)}.</p>",
        *_noise(profile),
        *table(lines.HEAD, lines.headline_rows(profile)),
        "<h2>Until the first token</h2>",
        picture(plots.first_token(profile.answers), "parts of the first token's time"),
        "<h2>Start</h2>",
        *table(lines.HEAD, lines.start_rows(profile)),
        *_phases(profile),
        "<h2>Memory</h2>",
        picture(plots.memory_by_phase(profile.memory), "memory by phase"),
        *table(lines.MEMORY_HEAD, lines.memory_rows(profile)),
        *_operators(profile),
        *_sweep(profile),
        *_machine(profile),
    ]
    return page(f"Profile of {profile.bundle.name}", parts)


def render_comparison(comparison: Comparison) -> bytes:
    """The report of two profiles."""
    parts = [
        f"<p>A: {text(comparison.a)}</p><p>B: {text(comparison.b)}</p>",
        *(f'<p class="broken">{text(warning)}</p>' for warning in comparison.warnings),
        picture(plots.ratios(comparison.rows), "ratios of all figures"),
        *table(lines.COMPARED, lines.comparison_rows(comparison)),
    ]
    return page("Two profiles", parts)


def _noise(profile: Profile) -> list[str]:
    mark = "broken" if profile.noise.noisy else "kept"
    return [f'<p class="{mark}">{text(line)}</p>' for line in lines.noise_lines(profile)]


def _phases(profile: Profile) -> list[str]:
    phases = profile.phases
    speeds: dict[str, Figure] = {}
    for count, prefill in phases.prefill.items():
        speeds[f"prefill {count}"] = prefill.tokens_per_s
    steps = {f"decode {context}": each.tokens_per_s for context, each in phases.decode.items()}
    return [
        "<h2>Phases</h2>",
        *table(lines.HEAD, lines.phase_rows(profile)),
        picture(plots.bars(speeds, "tokens/s"), "speed of prefill"),
        picture(plots.bars(steps, "tokens/s"), "speed of decode"),
    ]


def _operators(profile: Profile) -> list[str]:
    found = profile.operators
    parts = ["<h2>Operators</h2>"]
    if found.entry_points is None:
        return [*parts, f"<p>Not measured: {text(found.reason)}.</p>"]
    for name, phase in found.entry_points.items():
        parts += [
            f"<h3>{text(lines.operator_title(name, phase))}</h3>",
            f"<p>{text(lines.operator_line(phase, MOST_GROUPS))}</p>",
            picture(plots.operators(phase), f"operators of {name}"),
            *table(lines.OPERATOR_HEAD, lines.operator_rows(phase, MOST_GROUPS)),
        ]
        if len(phase.groups) > MOST_GROUPS:
            parts.append(f"<p>And {len(phase.groups) - MOST_GROUPS} smaller ones.</p>")
    return parts


def _sweep(profile: Profile) -> list[str]:
    left_out = profile.settings.sweep_left_out
    if not profile.sweep:
        told = [f"<p>Not measured: {text(left_out)}.</p>"] if left_out else []
        return ["<h2>Threads</h2>", *told] if told else []
    return [
        "<h2>Threads</h2>",
        picture(plots.threads(profile.sweep), "speed by threads"),
        *table(lines.SWEEP_HEAD, lines.sweep_rows(profile)),
    ]


def _machine(profile: Profile) -> list[str]:
    bundle, machine = profile.bundle, profile.machine
    sizes = ", ".join(f"{kind} {lines.megabytes(n)}" for kind, n in bundle.bytes_by_kind.items())
    rows = [
        (
            "bundle",
            f"{bundle.family} {bundle.variant}, {bundle.engine}, manifest {bundle.manifest_sha256}",
        ),
        ("size", f"{lines.megabytes(bundle.bytes)}: {sizes}"),
        ("cpu", f"{machine.cpu or 'unknown'}, {' '.join(machine.features or ())}"),
        ("memory", lines.megabytes(machine.memory_bytes)),
        ("system", f"{machine.os}, Python {machine.python}"),
        ("packages", ", ".join(f"{name} {v}" for name, v in machine.packages.items())),
    ]
    head, *states = lines.condition_rows(profile)
    return ["<h2>Machine</h2>", *table(("", ""), rows), *table(head, states)]
