"""Watches a decode loop for what its report does not keep: which nodes are kept, and acceptance against its optimum."""

from __future__ import annotations

import math
from time import perf_counter

from torch import Tensor

from specdec.lab.optimal import optimum, root_of
from specdec.monitor import Monitor
from specdec.verify import AcceptanceRule, DraftTree, Verdict

SCAN_EVERY = 16
"""Drafts between two optima of several sampled siblings: a scan over the vocabulary takes tens of milliseconds."""


class Watch(Monitor):
    """Sums over one call. Its own time is kept in `seconds`, so that it can be taken off the call's.

    nodes: how often each node of a static tree was on the kept path, by node number (level order).
    first: how often a draft's first level was kept; star: sum of alpha*, the best any rule could do at that very root,
    over `scanned` roots, of which `scanned_first` were kept.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.nodes: list[int] = []
        self.drafts = self.first = self.scanned = self.scanned_first = 0
        self.star = 0.0

    def decided(self, rule: AcceptanceRule, tree: DraftTree, p: Tensor, verdict: Verdict) -> None:
        start = perf_counter()
        if tree.tokens.shape[1] > 1:
            for row in range(tree.tokens.shape[0]):
                self._see(tree, p, verdict, row, rule.uses_race)
        self.seconds += perf_counter() - start

    def _see(self, tree: DraftTree, p: Tensor, verdict: Verdict, row: int, races: bool) -> None:
        if int(tree.num_nodes[row]) < 2:
            return
        kept = int(verdict.num_accepted[row]) > 0
        self.drafts += 1
        self.first += kept
        if tree.topology is not None:
            self.nodes += [0] * (tree.tokens.shape[1] - len(self.nodes))
            for node in verdict.path[row].tolist():
                if node >= 0:
                    self.nodes[node] += 1
        if races:  # its drafter knows the target's coins: no bound on coins of one's own applies
            return
        root = root_of(tree, p, row)
        best = optimum(root) if root.num_sampled < 2 or self.drafts % SCAN_EVERY == 1 else math.nan
        if not math.isnan(best):
            self.star += best
            self.scanned += 1
            self.scanned_first += kept

    def to_dict(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "seconds"}
