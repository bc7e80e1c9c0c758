"""What quality came to, in words that the terminal and the HTML report share."""

from __future__ import annotations

from lorgnette.manifest import PromiseEntry, QualitySummary

PROMISE = "promise of the plan"
"""What the row is called that tells whether a promise was kept."""


def summary_rows(summary: QualitySummary) -> list[tuple[str, str]]:
    """What was measured, name and value, for people."""
    skipped = f", {summary.skipped} left out: too long" if summary.skipped else ""
    of = f"{summary.samples} of set {summary.sample_set}{skipped}"
    rows = [
        ("questions", f"{of}; {summary.positions} tokens compared"),
        (
            "KL divergence",
            f"mean {summary.kl_mean:.2e}, 95 % under {summary.kl_p95:.2e}, "
            f"largest {summary.kl_max:.2e} nats",
        ),
        ("same token likeliest", f"{summary.top1:.2%}"),
        ("same answer", f"{summary.same_answer:.2%}"),
        (
            "image tokens",
            f"cosine {summary.image_token_cosine_mean:.6f} on average, "
            f"{summary.image_token_cosine_min:.6f} at least",
        ),
    ]
    if summary.original_exact_match is not None:
        own = "unknown" if summary.exact_match is None else f"{summary.exact_match:.2%}"
        rows.append(("exact match", f"{own}, the original's {summary.original_exact_match:.2%}"))
    if summary.promise is not None:
        rows.append((PROMISE, promise_text(summary.promise)))
    return rows


def promise_text(promise: PromiseEntry) -> str:
    """What a plan promised and what came of it."""
    kl = "" if promise.max_kl is None else f"mean KL divergence <= {promise.max_kl:g}, "
    came = "kept" if promise.kept else "broken"
    accepted = " (accepted at export)" if promise.accepted_loss and not promise.kept else ""
    return f"{kl}same answer >= {promise.min_same_answer:.2%}: {came}{accepted}"
