"""What a model's configuration says about positions: how many there are, and which windows layers see."""

from __future__ import annotations

from typing import Any


def usable_positions(config: Any) -> int | None:
    """Positions at which a pass may place tokens; None when there is no such limit.

    A learned table ends. "dynamic" and "longrope" rotary scaling recompute their frequencies from the longest
    position *in the pass*: beyond the original length a drafted node would change the law of the nodes before it.
    Other rotary models may outgrow their configured maximum.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return getattr(config, "max_position_embeddings", None)
    for scaling in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if scaling.get("rope_type") in ("dynamic", "longrope"):
            return int(scaling.get("original_max_position_embeddings") or config.max_position_embeddings)
    return None


def windows_of(config: Any) -> dict[str, int | None]:
    """Attention window per layer type; empty when every layer sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {} if window is None else {"sliding_attention": window}
    found = {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}
    return found if any(size is not None for size in found.values()) else {}
