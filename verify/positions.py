"""What a model's configuration says about positions: how many there are, and which windows layers see."""

from __future__ import annotations

from typing import Any


def usable_positions(config: Any) -> int | None:
    """Positions at which a pass may place tokens; None when there is no such limit.

    A learned table ends, and some rotary frequencies depend on the pass (`length_dependent_positions`). Other rotary
    models may outgrow their configured maximum.
    """
    if not getattr(config, "rope_parameters", None):
        return getattr(config, "max_position_embeddings", None)
    return length_dependent_positions(config)


def length_dependent_positions(config: Any) -> int | None:
    """Positions below which rotary frequencies depend on nothing else; None where they never do.

    "dynamic" and "longrope" scaling compute their frequencies from the longest position *in the pass*: beyond the
    original length a drafted node would change the law of the nodes before it, and some models compute their whole
    cache anew on the way. A dynamic module whose frequencies have grown keeps them in a pass of exactly the original
    length, so there it is one position less.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    limits: list[int] = []
    for scaling in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = str(scaling.get("rope_type"))
        if kind == "longrope":
            limits.append(int(scaling.get("original_max_position_embeddings") or config.max_position_embeddings))
        elif "dynamic" in kind:
            limits.append(int(config.max_position_embeddings) - 1)
    return min(limits, default=None)


def windows_of(config: Any) -> dict[str, int | None]:
    """Attention window per layer type; empty when every layer sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {} if window is None else {"sliding_attention": window}
    found = {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}
    return found if any(size is not None for size in found.values()) else {}
