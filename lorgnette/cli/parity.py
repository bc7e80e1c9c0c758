"""Parity ladders as lines and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from lorgnette.cli.output import table

if TYPE_CHECKING:
    from lorgnette.runtime.parity import Comparison
    from lorgnette.runtime.verify import Ladder, Rung


def rung_lines(ladder: Ladder) -> list[str]:
    """A line for each rung of the parity ladder."""
    return table(
        [
            (
                rung.name,
                "ok" if rung.passed else "FAILED",
                rung.detail + (f", bound {rung.bound:g}" if rung.bound is not None else ""),
            )
            for rung in ladder.rungs
        ]
    )


def parity_lines(
    names: Sequence[str], ladders: Sequence[Ladder], comparison: Comparison
) -> list[str]:
    """Rungs down and bundles across, then how far each two are from each other."""
    rungs = list(dict.fromkeys(rung.name for ladder in ladders for rung in ladder.rungs))
    rows = [("rung", *names)]
    for name in rungs:
        found = [{rung.name: rung for rung in ladder.rungs} for ladder in ladders]
        rows.append((name, *(_cell(rungs_of.get(name)) for rungs_of in found)))
    pairs = [
        (
            f"{pair.first} to {pair.second}",
            pair.rung,
            "ok" if pair.passed else "FAILED",
            pair.detail + (f", bound {pair.bound:.2g}" if pair.bound is not None else ""),
        )
        for pair in comparison.pairs
    ]
    return [*table(rows, indent=""), *table(pairs, indent="")]


def parity_document(comparison: Comparison) -> dict[str, Any]:
    """What is told of several bundles besides what is told of each.

    `agree` is null where no two bundles got far enough to be compared.
    """
    return {
        "agree": comparison.passed if comparison.pairs else None,
        "pairs": [msgspec.to_builtins(pair) for pair in comparison.pairs],
    }


def _cell(rung: Rung | None) -> str:
    if rung is None:
        return "not reached"
    state = "ok" if rung.passed else "FAILED"
    return state if rung.error is None else f"{state} {rung.error:.1e}"
