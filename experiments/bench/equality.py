"""Are greedy outputs equal to plain generation's, and if not, was it a tie?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.experiments.ways import Output

TIE_ULPS = {torch.float64: 4096, torch.float32: 256, torch.float16: 8, torch.bfloat16: 8}
"""Two logits closer than this many ulps of the largest logit are a tie: passes of different widths add up in
different orders, and the deeper the model the more of it reaches the logits."""


@dataclass(frozen=True)
class Difference:
    """A row whose greedy output left plain generation's.

    position: first new token that differs (0 = the first one). gap: by how much the target's logit of plain
    generation's token exceeds that of the peer's, in one pass over the common text. near_tie: the gap is within
    the rounding of the dtype, so that either token is the argmax of some evaluation order.
    """

    peer: str
    prompt: int
    row: int
    position: int
    plain_token: int
    peer_token: int
    gap: float
    near_tie: bool


def differences(
    target: PreTrainedModel, outputs: Mapping[str, Output], plain: str, prompt: int, prompt_tokens: int
) -> list[Difference]:
    """Rows of `outputs` that differ from `outputs[plain]`, with the logit gap at the first differing token."""
    wanted = outputs[plain].ids
    found = []
    for name, output in outputs.items():
        for row in range(wanted.shape[0]):
            unequal = (output.ids[row] != wanted[row]).nonzero()
            if not len(unequal):
                continue
            column = int(unequal[0])
            theirs, ours = int(wanted[row, column]), int(output.ids[row, column])
            gap, tie = _gap(target, wanted[row : row + 1, :column], theirs, ours)
            found.append(Difference(name, prompt, row, column - prompt_tokens, theirs, ours, gap, tie))
    return found


@torch.no_grad()
def _gap(target: PreTrainedModel, text: Tensor, plain_token: int, peer_token: int) -> tuple[float, bool]:
    logits = target(text, use_cache=False).logits[0, -1]
    gap = float(logits[plain_token] - logits[peer_token])
    tolerance = TIE_ULPS[logits.dtype] * torch.finfo(logits.dtype).eps * float(logits.abs().max())
    return gap, abs(gap) <= tolerance
