"""The plan of a pass over tree nodes: attention over its layout by whichever backend was chosen, without a mask."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from specdec.verify.attention.choose import attend
from specdec.verify.attention.layout import TreeLayout
from specdec.verify.topology import indices


class TreePlan(TreeLayout):
    """A `Plan` (see `register.py`) that says which slots to read instead of masking all of them."""

    computes: ClassVar[tuple[str, ...]] = ()
    refuses: ClassVar[str] = "tree attention does not compute; load the model with attn_implementation='eager'"

    def mask_for(self, window: int | None) -> Tensor:
        """A placeholder whose width says which window is meant (identity would not survive a copy): 1 for none."""
        return torch.empty(1, 1, 1, 1, device=self.lengths.device).expand(1, 1, 1, (window or 0) + 1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        assert softcap is None
        return attend(query, key, value, self.on(query.device), scale, mask.shape[-1] - 1 or None)


def chain(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`(depths, ancestors)` of `rows` chains: int64 `[rows, width]`, bool `[rows, width, width]`. Never written to."""
    return indices(width, device).expand(rows, -1), _below(width, device).expand(rows, -1, -1)


@lru_cache(maxsize=256)
def _below(width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used outside inference mode later
        return torch.ones(width, width, dtype=torch.bool, device=device).tril()
