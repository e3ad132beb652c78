"""The target's passes in strict mode where the native pass serves it: no padding, all rows in one pass."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.base import PassCache
from specdec.kv.support import text_config
from specdec.verify.direct import direct_pass
from specdec.verify.forward import TreeForward, Way
from specdec.verify.native import NativePass, native_pass
from specdec.verify.positions import windows_of
from specdec.verify.strict_forward import refuse_wider
from specdec.verify.tree import DraftTree


def serves(model: PreTrainedModel) -> bool:
    """Whether `model`, as it is now, has a native pass, and no windows, which differ by layer."""
    direct = None if windows_of(text_config(model)) else direct_pass(model)
    return direct is not None and native_pass(direct) is not None


class NativeStrictForward(TreeForward):
    """A `TreeForward` whose logits and K/V of a node do not depend, to the bit, on the draft or the rows around it:
    natively a token's bits depend on its text alone (see `NativePass`).

    Args:
        width: most nodes of a tree.
    """

    def __init__(self, model: PreTrainedModel, name: str, width: int):
        super().__init__(model, name)
        self.width = width

    def tree(self, cache: PassCache, tree: DraftTree, unread: Tensor | None = None) -> Tensor:
        refuse_wider(tree, self.width)
        return super().tree(cache, tree, unread)

    def _shortcut(self) -> Way:
        way = super()._shortcut()
        if not isinstance(way, NativePass):
            raise RuntimeError(
                f"exactness='strict': {type(self.model).__name__} was changed in the middle of a call (a hook?), and "
                "passes through its modules would not have the same bits: change it between calls"
            )
        return way
