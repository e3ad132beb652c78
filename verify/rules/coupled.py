"""The coupled rule: the text is a function of the target and the seed; the drafter decides only how fast it comes."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.noise import Noise
from specdec.verify.race import arrivals
from specdec.verify.rules.base import AcceptanceRule, row_at, verdict_at
from specdec.verify.tree import DraftTree, Verdict


class Coupled(AcceptanceRule):
    """y = argmin_x E(x) / p(x), E keyed by position; if y is a child go there, else emit y (algorithms A.9b).

    Gumbel coupling (Daliri et al., "Coupling without communication and drafter-invariant speculative decoding"): y is
    a draw from p that never looks at the draft, so any drafter, any tree and none at all give the same text. q is
    ignored. A drafter that runs the same race under its own law meets y with probability
    sum_x 1 / sum_y max(p(y)/p(x), q(y)/q(x)), which is at least (1 - TV)/(1 + TV).

    What the draft does see is the noise of positions that are not decided yet. A drafter that withdraws nodes after
    seeing deeper ones (`BestFirst`) makes the place where a step ends say something about the token after it. The text
    is the same all the same; whoever cuts it exactly where steps end must not take the cut for chance.

    Needs `noise.race` and no other noise. Of equal siblings the first is the child.

    Example: p=(.5, .3, .2), race=(.9, .3, .4): arrivals (1.8, 1, 2), so token 1 is kept if it is a child, else emitted.
    """

    name = "coupled"
    top_down = True
    uses_race = True

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        race, depths = noise.race, tree.max_depth + 1
        if race is None or race.shape[1] < depths:
            raise UnsupportedArgumentError(
                f"rule 'coupled': expected noise.race with {depths} depths, got "
                f"{None if race is None else tuple(race.shape)}; take it from a RaceStream"
            )
        if tree.is_chain:  # node == depth: all nodes of all rows at once
            choice = arrivals(p[:, :depths], race[:, :depths]).argmin(-1)
            kept = (tree.tokens[:, 1:depths] == choice[:, :-1]) & tree.valid[:, 1:depths]
            node = kept.long().cumprod(1).sum(1)
            return verdict_at(tree, node, choice.gather(1, node[:, None])[:, 0])
        return self._walk(tree, p, race, depths)

    def _walk(self, tree: DraftTree, p: Tensor, race: Tensor, depths: int) -> Verdict:
        """Level by level with one vocabulary row per request, however many nodes a level has."""
        node = torch.zeros_like(tree.num_nodes)
        token = torch.zeros_like(node)
        moving = torch.ones_like(node, dtype=torch.bool)
        for depth in range(depths):
            winner = arrivals(row_at(p, node), race[:, depth]).argmin(-1)
            token = torch.where(moving, winner, token)
            match = (tree.parents == node[:, None]) & (tree.tokens == token[:, None]) & tree.valid & moving[:, None]
            found, first = match.to(torch.int8).max(1)
            moving = found > 0
            node = torch.where(moving, first, node)
        return verdict_at(tree, node, token)
