"""The runner of native passes: one C call for a stock float32 Llama on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from specdec.verify.native.run import NativePass, native_pass
from specdec.verify.passes.base import Output, Part, Runner, refuse_wider
from specdec.verify.passes.direct import Direct
from specdec.verify.passes.inputs import Inputs

CHUNK = 512
"""Prompt tokens of a row per pass: it cannot be interrupted, so it should not last."""


class Native(Runner):
    """Runs what the direct runner runs, in float32, where there is a compiled pass.

    A token's bits depend on its text alone: neither on the draft nor on the rows around it.

    Args:
        direct: who knows the parameters.
        most_nodes: of a tree, where its size is part of a promise (see `Strict`).
    """

    name = "native"
    joint = True

    def __init__(self, inputs: Inputs, direct: Direct, most_nodes: int | None = None):
        self._inputs, self._direct, self._most_nodes = inputs, direct, most_nodes
        self._pass: NativePass | None = None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        with self._direct.prepared():
            own = self._direct.parameters
            self._pass = None if own is None else native_pass(own, self._inputs)
            try:
                yield
            finally:
                self._pass = None

    @property
    def serves(self) -> bool:
        """Whether the model, as it is now, has a native pass."""
        with self.prepared():
            return self._pass is not None

    def refusal(self, part: Part) -> str | None:
        if self._most_nodes is not None:
            refuse_wider(part, self._most_nodes)
        if self._pass is None:
            return "there is no native pass over these weights (docs/models.md)"
        return self._direct.refusal(part)

    def stride(self, rows: int, read: int, most: int) -> int | None:
        return None if self._pass is None else min(most, CHUNK)

    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        assert self._pass is not None
        return self._pass(parts)
