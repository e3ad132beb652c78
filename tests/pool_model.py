"""What a KV pool must hold, said with texts: K/V of a token is a function of the text that ends with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

LAYERS = {"target": 2, "draft": 1}
HEADS, DIM = 2, 3
Text = tuple[int, ...]

_BEGINNING = (0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0)
PROMPTS = st.builds(
    lambda length, rest: _BEGINNING[:length] + rest, st.integers(0, 13), st.sampled_from([(), (), (2,), (2, 0, 2)])
)
"""Prompts of up to 16 tokens that begin alike."""


def on_rows(**arguments: Any) -> Callable[[Any], Any]:
    """A rule for pools with open sequences."""
    return lambda method: precondition(lambda self: self.rows)(rule(data=st.data(), **arguments)(method))


@dataclass
class Row:
    """What one sequence must hold. `wanted` is committed text plus a prompt's rest that is not run yet.

    slots: per model, for every filled slot the text that ends with its token (K/V is a function of it).
    nodes: the text of every node of the tail, in the target's slots.
    """

    wanted: Text
    length: int = 0
    slots: dict[str, list[Text]] = field(default_factory=lambda: {name: [] for name in LAYERS})
    nodes: list[Text] = field(default_factory=list)
    places: list[int] | None = None

    @property
    def text(self) -> Text:
        return self.wanted[: self.length]

    def commit(self, path: list[int]) -> None:
        base = self.length
        for name, held in self.slots.items():
            if len(held) < base:
                continue
            places = self.places if name == "draft" and self.places is not None else range(len(self.nodes))
            kept = []
            for node in path:
                if not 0 <= places[node] < len(held) - base:
                    break
                kept.append(held[base + places[node]])
            self.slots[name] = held[:base] + kept
        if path:
            self.wanted = self.nodes[path[-1]]
            self.length = len(self.wanted)
        self.nodes, self.places = [], None

    def drop_tail(self) -> None:
        self.nodes, self.places = [], None
        for held in self.slots.values():
            del held[self.length :]


class Values:
    """K/V of a token: one number for each text, told apart by model and layer."""

    def __init__(self) -> None:
        self._known: dict[Text, int] = {}

    def of(self, texts: list[Text], name: str, layer: int) -> list[float]:
        base = [self._known.setdefault(text, len(self._known) + 1) for text in texts]
        return [number + 0.25 * layer + (0.5 if name == "draft" else 0.0) for number in base]
