"""Estimates as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from specdec.pairing.roofline import Estimate, Setting, implied_tokens_per_pass, published_estimate
from specdec.pairing.schema import Pair
from specdec.pairing.tables import one_line

LABEL = "ESTIMATE from bytes and operations (docs/pairs.md), not a measurement"

UNKNOWN_HITS = (
    "How often n-grams find anything depends on your texts: no estimate can know it. The table holds for steps in",
    "which they do; any other gives one token. Measure it: `specdec accept --pair NAME --prompt-file YOURS --out DIR`,",
    "anywhere the model runs; then `--measured DIR` here says what that gives on this device.",
    "",
)


def estimate_table(pair: Pair, setting: Setting, result: Estimate) -> dict[str, Any]:
    """Ready for JSON."""
    return {
        "label": LABEL,
        "hit_rate": "unknown: measure it on your texts (specdec accept, then --measured)"
        if pair.draft.kind == "ngram"
        else None,
        "pair": pair.name,
        "setting": asdict(setting),
        **asdict(result),
        "gains": [gain._asdict() for gain in result.gains],
        "total_gb": result.total_gb,
        "fits": result.fits,
        "published": [_published(pair, number) for number in range(len(pair.published))],
    }


def estimate_text(pair: Pair, setting: Setting, result: Estimate) -> str:
    """For people: memory, floors, speed-up by acceptance, and what others published."""
    fits = "fits" if result.fits else "DOES NOT FIT"
    lines = [
        LABEL,
        f"{pair.name} on {result.title}, {setting.context} tokens of context, batch {setting.batch}, "
        f"launch: {setting.launch}",
        "",
        f"memory                {result.total_gb:.2f} of {result.memory_gb:g} GB, {fits} (target "
        f"{result.target_gb:.2f}, draft {result.draft_gb:.2f}, K/V {result.kv_gb:.2f})",
        f"floor per plain token {result.plain_ms:.3f} ms, {1000 * setting.batch / result.plain_ms:.0f} tokens/s",
        f"one draft pass        {result.draft_ms:.3f} ms, {result.cost:.3f} of a plain token",
        "verifying n tokens    "
        + ", ".join(f"{n}: {ms / result.plain_ms:.2f}x" for n, ms in result.verify_ms.items())
        + " a plain token",
        f"pays above            {result.break_even:.2f} acceptance of the first drafted token",
        "",
        *(UNKNOWN_HITS if pair.draft.kind == "ngram" else ()),
        "acceptance  best k  tokens per pass  speed-up",
    ]
    for gain in result.gains:
        lines.append(f"{gain.alpha:10.2f}  {gain.k:6d}  {gain.tokens_per_pass:15.2f}  {gain.speedup:7.2f}x")
    if pair.published:
        lines += ["", "published by others, beside what this estimate expects for the same configuration:"]
        lines += [line for number in range(len(pair.published)) for line in _published_lines(pair, number)]
    for role, facts in (("target", pair.target.facts), ("draft", pair.draft.facts)):
        if facts is not None and facts.unchecked:
            lines.append(one_line(f"unchecked facts of the {role}: {facts.unchecked}"))
    return "\n".join(lines)


def _published(pair: Pair, number: int) -> dict[str, Any]:
    entry = pair.published[number]
    return {
        **asdict(entry),
        "estimate": published_estimate(pair, entry),
        "implied_tokens_per_pass": implied_tokens_per_pass(pair, entry),
    }


def _published_lines(pair: Pair, number: int) -> list[str]:
    entry = pair.published[number]
    expected = published_estimate(pair, entry)
    if expected is None:
        implied = implied_tokens_per_pass(pair, entry)
        verdict = f"no acceptance published; at these costs it takes {implied:.2f} tokens per pass"
    else:
        off = expected / entry.speedup - 1
        verdict = f"{entry.tokens_per_pass:.2f} tokens per pass, estimate {expected:.2f}x ({off:+.0%})"
    lines = [f"- {entry.speedup:.2f}x ({entry.what}); {verdict}", f"  {entry.source}"]
    lines += [f"  assumed: {entry.assumed}"] if entry.assumed else []
    return [one_line(line) for line in lines]
