"""The runner of native passes: one C call for a stock Llama on a CPU, computing what the direct pass does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from specdec.verify.passes.base import Output, Part, Runner, refuse_wider
from specdec.verify.passes.direct import Direct
from specdec.verify.passes.inputs import Inputs
from specdec.verify.passes.native_pass import NativePass, native_pass
from specdec.verify.passes.pace import ALWAYS_NATIVE, CHUNK, native_is_slower
from specdec.verify.passes.parameters import Parameters


class Native(Runner):
    """Runs what the direct runner runs, in float32, bfloat16 or float16, where there is a compiled pass. Sums are taken
    in float32, states rounded where the modules round them.

    A token's bits depend on its text alone: neither on the draft nor on the rows around it.

    Args:
        direct: who knows the parameters.
        any_text: long texts, too, where they are read faster straight over the parameters (see `native_is_slower`).
        most_nodes: of a tree, where its size is part of a promise (see `Strict`).
    """

    name = "native"
    joint = True

    def __init__(self, inputs: Inputs, direct: Direct, any_text: bool = False, most_nodes: int | None = None):
        self._inputs, self._direct, self._any_text, self._most_nodes = inputs, direct, any_text, most_nodes
        self._pass: NativePass | None = None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        outer = self._pass
        with self._direct.prepared():
            own = self._direct.parameters
            self._pass = None if own is None else native_pass(own, self._inputs)
            try:
                yield
            finally:
                self._pass = outer

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
        own = self._pass.own
        if sum(map(len, own.hooks)) != own.num_hooks:  # `own.hooked`, which every pass of every level would call
            return self._direct.refusal(part)
        width = part.tokens.shape[1]
        if width >= ALWAYS_NATIVE and part.nodes is None and not self._reads(width, part.write.read):
            return "so long a text is read faster by another pass"
        return None

    def stride(self, read: int, most: int) -> int | None:
        width = min(most, CHUNK)
        serves = self._pass is not None and not self._pass.own.hooked
        return width if serves and self._reads(most, read + most) else None

    def _reads(self, width: int, read: int) -> bool:
        assert self._pass is not None
        return self._any_text or not native_is_slower(self._pass.own, width, read, self._both)

    def _both(self, own: Parameters) -> list[Runner]:
        direct = Direct(self._direct.model, self._inputs)
        direct.parameters = own
        native = Native(self._inputs, direct, any_text=True)
        native._pass = native_pass(own, self._inputs)
        return [native, direct]

    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        assert self._pass is not None
        return self._pass(parts)

    @property
    def decodes(self) -> bool:
        return self._pass is not None and self._pass.own.static_rope and not self._pass.own.hooked

    def best_chain(self, part: Part, levels: int, vocab: int) -> Tensor:
        assert self._pass is not None
        return self._pass.best_chain(part, levels, vocab)
