"""The printed comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.rounds import DECODE_STEPS

OURS = "ours"
Samples = Mapping[str, Mapping[str, Sequence[float | None]]]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, p10 and p90."""
    low, middle, high = np.quantile(np.array(values, float), (0.1, 0.5, 0.9))
    return {"median": float(middle), "p10": float(low), "p90": float(high)}


def summarise(samples: Samples) -> dict[str, dict[str, dict[str, Any]]]:
    """Medians of every figure, and of its ratio to ours in the same round.

    A row that has no sample of a figure is left out of it.
    """
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for figure, rows in samples.items():
        ours = rows.get(OURS, ())
        for row, values in rows.items():
            present = [value for value in values if value is not None]
            if not present:
                continue
            entry: dict[str, Any] = {"ms": quantiles(present), "rounds": len(present)}
            pairs = zip(values, ours, strict=False)
            ratios = [
                theirs / own for theirs, own in pairs if theirs is not None and own is not None
            ]
            if ratios:
                entry["ratio"] = quantiles(ratios)
            summary.setdefault(figure, {})[row] = entry
    return summary


def per_second(figure: str) -> int:
    """What a figure in tokens a second counts, 0 for one in milliseconds."""
    if not figure.endswith("tok/s"):
        return 0
    return int(figure.split()[1].rstrip(",")) if figure.startswith("prefill") else DECODE_STEPS


def shown(figure: str, ms: float) -> float:
    """A duration in the unit of its figure."""
    count = per_second(figure)
    return count / ms * 1e3 if count else ms


def render(document: Mapping[str, Any]) -> str:
    """Everything that is printed."""
    lines = [
        f"{document['shape']}, {document['threads']} threads, {document['rounds']} rounds in turns",
        f"prompts of {_prompts(document)} ids; load average "
        + " to ".join(f"{load:.1f}" for load in document["load_average"]),
        "",
        *_limits(document["limits"]),
        "",
        "x: peer time / our time in the same round, median (p10 to p90); above 1, ours is ahead",
    ]
    for figure, rows in document["summary"].items():
        others = document["others"].get(figure)
        note = f"   (other processes kept {np.median(others):.1f} cores busy)" if others else ""
        lines += ["", figure + note]
        limit = limit_ms(figure, document)
        order = sorted(rows, key=lambda row: (row != OURS, rows[row]["ms"]["median"]))
        for row in order:
            lines.append(_line(figure, row, rows[row], limit, document["cores"]))
    lines += ["", *_sizes(document), "", *_failures(document)]
    return "\n".join(lines)


def _prompts(document: Mapping[str, Any]) -> str:
    return ", ".join(f"{ids} ({tiles} tiles)" for tiles, ids in document["prompts"].items())


def _limits(limits: Mapping[str, float]) -> list[str]:
    return ["measured limits: " + ", ".join(f"{name} {v:.0f}" for name, v in limits.items())]


def _line(
    figure: str, row: str, entry: Mapping[str, Any], limit: float | None, cores: Mapping[str, Any]
) -> str:
    ms = entry["ms"]
    values = [shown(figure, ms[key]) for key in ("median", "p10", "p90")]
    low, high = sorted(values[1:])
    text = f"  {row:22}{values[0]:10.1f}  ({low:.1f} to {high:.1f})".ljust(60)
    ratio = entry.get("ratio")
    if ratio is not None and row != OURS:
        text += f"{ratio['median']:6.2f}x ({ratio['p10']:.2f} to {ratio['p90']:.2f})"
    text = text.ljust(84)
    if limit is not None:
        text += f"{limit / ms['median'] * 100:5.0f} % of the limit"
    busy = [value for value in cores.get(figure, {}).get(row, ()) if value is not None]
    return text.ljust(104) + (f"{np.median(busy):5.1f} cores" if busy else "")


def limit_ms(figure: str, document: Mapping[str, Any]) -> float | None:
    """The least time that the machine's measured limits allow, None where it says nothing.

    Multiplications at the int8 peak; a decoded token at the DRAM bandwidth over the weights of 4
    bits and the cache of 16 bits that it reads.
    """
    limits, work = document["limits"], document["work"]
    int8, dram = limits.get("int8 GEMM GOP/s"), limits.get("DRAM GB/s")
    if not int8 or not dram:
        return None
    if figure.startswith("vision"):
        return float(work["vision_flop"] / int8 / 1e6)
    count = per_second(figure)
    if figure.startswith("prefill"):
        return float(work["prefill_flop"][str(count)] / int8 / 1e6)
    if figure.startswith("decode"):
        context = figure.split()[2].rstrip(",")
        return float(work["decode_bytes"][context] * count / dram / 1e6)
    if figure.startswith("TTFT"):
        tiles = figure.split()[1]
        return float(work["answer_flop"][tiles] / int8 / 1e6)
    return None


def _sizes(document: Mapping[str, Any]) -> list[str]:
    lines = ["cold peak RSS, peak RSS after everything, files on disk: MB"]
    for row, disk in document["disk_bytes"].items():
        memory = document["memory"].get(row, {})
        cells = [memory.get("cold_peak_rss_bytes"), memory.get("peak_rss_bytes"), disk]
        texts = [f"{cell / 1e6:8.0f}" if cell else "       -" for cell in cells]
        lines.append(f"  {row:22}" + "".join(texts) + f"   {document['rows'][row]}")
    return lines


def _failures(document: Mapping[str, Any]) -> list[str]:
    return [f"not measured: {row}: {why}" for row, why in document["failures"].items()]
