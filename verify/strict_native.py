"""The target's passes in strict mode where the native pass serves it: no padding, all rows in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.base import PassCache
from specdec.kv.errors import InvalidTreeError
from specdec.kv.support import text_config
from specdec.verify.direct import direct_pass
from specdec.verify.forward import TreeForward, Way
from specdec.verify.native import NativePass, native_pass
from specdec.verify.positions import windows_of
from specdec.verify.tree import DraftTree


def serves(model: PreTrainedModel) -> bool:
    """Whether `model`, as it is now, has a native pass, and no windows, which differ by layer."""
    direct = None if windows_of(text_config(model)) else direct_pass(model)
    return direct is not None and native_pass(direct) is not None


class NativeStrictForward(TreeForward):
    """A `TreeForward` whose logits and K/V of a node do not depend, to the bit, on the draft or the rows around it.

    Natively a token's bits depend on its text alone (see `NativePass`), so after the prompts every pass is native,
    whatever its width. A row's prompt is a pass of its own and depends on nothing else, however it is computed.

    Args:
        width: most nodes of a tree.
    """

    reads_prompts = False

    def __init__(self, model: PreTrainedModel, name: str, width: int):
        super().__init__(model, name)
        self.width = width
        self._way: NativePass | None = None
        self._verifying = False

    @contextmanager
    def prepared(self) -> Iterator[None]:
        direct = direct_pass(self.model)
        self._way = None if direct is None else native_pass(direct)
        try:
            yield
        finally:
            self._way = None

    def prefill(self, cache: PassCache, text: Tensor, starts: Sequence[int], stops: Sequence[int], chunk: int) -> None:
        for row in range(cache.num_rows):
            super().prefill(cache.row(row), text[row : row + 1], [starts[row]], [stops[row]], chunk)

    def tree(self, cache: PassCache, tree: DraftTree, unread: Tensor | None = None) -> Tensor:
        assert unread is None, "a strict pass reads its tree alone"
        if tree.tokens.shape[1] > self.width:
            raise InvalidTreeError(
                f"expected a tree of at most {self.width} nodes (strict_width), got {tree.tokens.shape[1]}"
            )
        self._verifying = True
        try:
            return super().tree(cache, tree)
        finally:
            self._verifying = False

    def _shortcut(self) -> Way:
        if self._way is None or self._way.hooked:
            raise RuntimeError(
                f"exactness='strict': {type(self.model).__name__} was changed in the middle of a call (a hook?), and "
                "passes through its modules would not have the same bits: change it between calls"
            )
        return self._way.at_any_width if self._verifying else self._way
