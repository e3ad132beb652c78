"""What may watch a decode loop from inside, and the monitor that holds measured acceptance against theory."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters import FallbackGuard
from specdec.kv import KVCache
from specdec.request import Request
from specdec.verify import AcceptanceRule, DraftTree, Rows, Verdict


class Watched(Protocol):
    """What a monitor may look at of a decode loop."""

    request: Request
    target: PreTrainedModel
    drafter: FallbackGuard | None
    rows: Rows
    cache: KVCache


class Monitor:
    """Called by the decode loop. It may look at everything and must change nothing."""

    def decided(self, rule: AcceptanceRule, tree: DraftTree, p: Tensor, verdict: Verdict) -> None:
        """A sampling step's decision. `p`: float `[rows, nodes, vocab]`, the law the rule was given."""

    def stepped(self, loop: Watched) -> None:
        """A step is over: tokens emitted, cache committed, drafter informed."""


class AcceptanceMonitor(Monitor):
    """Accepted tokens minus what theory expects of the very drafts, in standard errors (see `AcceptanceRule.excess`).

    Sums stay on the device; nothing is synchronised before `z` is asked for.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def decided(self, rule: AcceptanceRule, tree: DraftTree, p: Tensor, verdict: Verdict) -> None:
        if tree.tokens.shape[1] == 1:
            return
        excess = rule.excess(tree, p, verdict)
        if excess is not None:
            step = torch.stack([excess.mean.sum(), excess.variance.sum()])
            self._total = step if self._total is None else self._total + step

    @property
    def z(self) -> float | None:
        """Standard errors between measured and expected acceptance, signed; None before anything was decided."""
        if self._total is None:
            return None
        total, variance = self._total.tolist()
        if variance <= 0:
            return 0.0 if abs(total) < 1e-9 else math.copysign(math.inf, total)
        return float(total / math.sqrt(variance))
