"""A run's results as a page of tables, each figure beside what the hardware allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specdec.experiments.display import table

Results = dict[str, list[dict[str, Any]]]


def page(results: Results, title: str) -> str:
    """Markdown; sections that did not run are left out."""
    parts = [f"# {title}", ""]
    for name, show in (("tests", _tests), ("bandwidth", _bandwidth), ("passes", _passes), ("attention", _attention),
                       ("generate", _generate)):  # fmt: skip
        entries = results.get(name)
        if entries:
            parts += [f"## {name}", "", *show(entries, results), ""]
    return "\n".join(parts)


def roofline_ms(entry: dict[str, Any], results: Results) -> float | None:
    """The least time of a pass on this device: its bytes at the measured copy bandwidth or its products, whichever is
    longer."""
    measured = (results.get("bandwidth") or [{}])[0]
    if "copy_gb_s" not in measured or "bytes" not in entry:
        return None
    reading = entry["bytes"] / measured["copy_gb_s"] / 1e6
    computing = entry["flops"] / measured["tflops"] / 1e9
    return float(max(reading, computing))


def _tests(entries: list[dict[str, Any]], results: Results) -> list[str]:
    keys = ("passed", "failed", "skipped", "error", "tests_collected")
    lines = [", ".join(f"{key}: {entry[key]}" for key in keys if key in entry) for entry in entries]
    return lines + _left_out(entries, lambda entry: "tests")


def _bandwidth(entries: list[dict[str, Any]], results: Results) -> list[str]:
    head = ["copy GB/s (read + written)", "read GB/s", "product TFLOP/s"]
    return table(head, [[entry.get(key) for key in ("copy_gb_s", "read_gb_s", "tflops")] for entry in entries])


def _passes(entries: list[dict[str, Any]], results: Results) -> list[str]:
    plain = {(e["model"], e["mode"], e["context"]): e["ms"] for e in entries if e.get("nodes") == 1 and "ms" in e}
    rows = []
    for entry in entries:
        if "ms" not in entry:
            continue
        floor, one = roofline_ms(entry, results), plain.get((entry["model"], entry["mode"], entry["context"]))
        share = None if floor is None else floor / entry["ms"]
        times = None if one is None else entry["ms"] / one
        rows.append(
            [*(entry[key] for key in ("model", "mode", "context", "nodes", "ms")), floor, share, times]
        )  # fmt: skip
    head = ["model", "mode", "context", "nodes", "ms", "roofline ms", "roofline / ms", "one-token passes"]
    return table(head, rows) + _left_out(entries, lambda entry: str(entry.get("model", "all")))


def _attention(entries: list[dict[str, Any]], results: Results) -> list[str]:
    keys = ("context", "rows", "nodes", "equal", "backend", "ms_wall", "ms_device", "gb_s", "error")
    head = ["context", "rows", "nodes", "equal lengths", "backend", "ms wall", "ms device", "K/V GB/s", "off fold by"]
    rows: list[list[Any]] = [[entry.get(key) for key in keys] for entry in entries if "ms_wall" in entry]
    lines = table(head, rows)
    return lines + _left_out(entries, lambda entry: str(entry.get("backend", "all")))


def _generate(entries: list[dict[str, Any]], results: Results) -> list[str]:
    plain = next((e.get("tokens_per_second") for e in entries if e.get("peer") == "hf-plain"), None)
    rows = []
    for entry in entries:
        if "tokens_per_second" not in entry:
            continue
        speed = entry["tokens_per_second"]
        keys = ("mean_acceptance_length", "ms_draft", "ms_verify", "ms_rest", "right")
        rows.append(
            [entry["peer"], entry.get("k"), entry.get("alpha"), speed, speed / plain if plain else None]
            + [entry.get(key) for key in keys]
        )
    head = ["peer", "k", "alpha", "tokens/s", "vs hf-plain", "tokens/pass", "ms draft", "ms verify", "ms rest", "right"]
    return table(head, rows) + _left_out(entries, lambda entry: str(entry.get("peer", "all")))


def _left_out(entries: list[dict[str, Any]], name: Callable[[dict[str, Any]], str]) -> list[str]:
    reasons = {f"{name(entry)}: {entry.get('skipped') or entry.get('failed')}" for entry in entries
               if "skipped" in entry or "failed" in entry}  # fmt: skip
    return ["", "Not measured:", "", *(f"- {reason}" for reason in sorted(reasons))] if reasons else []
