"""Planted bugs of rules and noise, each known from some engine: whatever judges sampling laws must refuse them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.monitor import Monitor, Watched
from specdec.verify import DraftTree, Noise, NoiseStream, Verdict
from specdec.verify.noise import Role, uniform
from specdec.verify.race import RaceStream
from specdec.verify.rules.base import row_at, sample_from
from specdec.verify.rules.block import Block
from specdec.verify.rules.budget_flow import BudgetFlow
from specdec.verify.rules.naive import Naive
from specdec.verify.rules.rejection import Rejection


class AcceptsAlways(Rejection):
    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        return super().__call__(tree, p, noise._replace(accept=torch.full_like(noise.accept, -1.0)))


class DropsResidual(Rejection):
    """Draws the recovered token from p instead of norm((p - q)+)."""

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        verdict = super().__call__(tree, p, noise)
        return verdict._replace(next_token=sample_from(row_at(p, verdict.num_accepted), noise.residual))


class StopsAtFirstReject(Block):
    """Block verification "fixed" by a reader who knows token-wise rejection."""

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        accept = noise.accept.clone()
        alive = torch.ones(accept.shape[0], dtype=torch.bool)
        for i in range(1, accept.shape[1]):
            only = torch.ones_like(accept)  # a coin of 1 is never below h
            only[:, i] = accept[:, i]
            alive &= super().__call__(tree, p, noise._replace(accept=only)).num_accepted == i
            accept[~alive, i] = 1.0
        return super().__call__(tree, p, noise._replace(accept=accept))


class TokenwiseResidualInBlock(Block):
    """Block acceptance with the residual of token-wise rejection, (p - q)+ instead of (P p - q)+."""

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        verdict = super().__call__(tree, p, noise)
        reject_all = noise._replace(accept=torch.ones_like(noise.accept))
        law = row_at(p, verdict.num_accepted)
        if tree.q is None:
            return verdict
        last = verdict.num_accepted >= tree.num_nodes - 1
        q = row_at(tree.q, verdict.num_accepted.clamp(max=tree.q.shape[1] - 1))
        residual = torch.where(last[:, None], law, (law - q).clamp(min=0) + 1e-30)
        return verdict._replace(next_token=sample_from(residual, reject_all.residual))


class OneCoin(Naive):
    """Every node of a row decides by the same coin."""

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        return super().__call__(tree, p, noise._replace(accept=noise.accept[:, :1].expand_as(noise.accept)))


class RealisedMass(BudgetFlow):
    """What is left to the second child is what the first child's subtree really left, not the nominal 1 - W.

    Shows where the first child has children of its own. Same as the rule with the second child's coin stretched.
    """

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        if tree.q is None or tree.q_row is None or tree.tokens.shape[1] < 4:
            return super().__call__(tree, p, noise)
        first, drawn = 1, 2
        ends = self.end_law(tree, p)
        left = 1.0 - (ends * tree.ancestor_mask[:, :, first]).sum(1)
        q = row_at(tree.q, tree.q_row[:, 0].clamp(min=0))
        token = tree.tokens[:, drawn : drawn + 1]
        share = (p[:, 0].gather(1, token) / q.gather(1, token))[:, 0].clamp(max=1.0)
        nominal, realised = ends[:, drawn] / left, (share / left).clamp(max=1.0)
        accept = noise.accept.clone()
        both = (tree.num_nodes > drawn) & tree.sampled[:, drawn] & (realised > 0)
        accept[:, drawn] = torch.where(both, accept[:, drawn] * nominal / realised, accept[:, drawn])
        return super().__call__(tree, p, noise._replace(accept=accept))


class AcceptReusesDraftNoise(NoiseStream):
    def accept(self, rows: Sequence[int], step: int | Sequence[int], nodes: int) -> Noise:
        return super().accept(rows, step, nodes)._replace(accept=self.draft(rows, step, nodes))


class ResidualReusesDraftNoise(NoiseStream):
    def accept(self, rows: Sequence[int], step: int | Sequence[int], nodes: int) -> Noise:
        return super().accept(rows, step, nodes)._replace(residual=self.draft(rows, step, 2)[:, 1])


class ResidualReusesAcceptNoise(NoiseStream):
    def accept(self, rows: Sequence[int], step: int | Sequence[int], nodes: int) -> Noise:
        noise = super().accept(rows, step, max(nodes, 2))
        return Noise(noise.accept[:, :nodes], noise.accept[:, 1])


class FrozenStep(NoiseStream):
    """The step is missing from the key."""

    def _get(self, role: Any, rows: Sequence[int], step: int | Sequence[int], count: int) -> Tensor:
        return super()._get(role, rows, 0, count)


class AcceptKeyedByPosition(NoiseStream):
    """Coins are keyed by the absolute position they judge: a later step meets those of positions given up before.

    Needs a `Positions` monitor in the Speculator.
    """

    def __init__(self, *given: Any):
        super().__init__(*given)
        Positions.of = {}

    def accept(self, rows: Sequence[int], step: int | Sequence[int], nodes: int) -> Noise:
        first = torch.tensor([Positions.of.get(row, 0) for row in rows])[:, None]
        place = torch.tensor(list(rows))
        seeds, requests = self._seeds[place, None], self._requests[place, None]
        coins = uniform(seeds, requests, 0, Role.ACCEPT, first + torch.arange(nodes))
        return super().accept(rows, step, nodes)._replace(accept=coins)


class Positions(Monitor):
    """Knows how many tokens each row of the running call has emitted."""

    of: dict[int, int] = {}  # noqa: RUF012 - shared with the noise, which nobody can hand anything

    def stepped(self, loop: Watched) -> None:
        real = loop.request.real
        prompt = [loop.rows.prompt_length] * loop.rows.batch_size if real is None else real.sum(1).tolist()
        live = loop.rows.live
        Positions.of = {row: loop.rows.num_tokens[row] - int(prompt[row]) for row in live}


class RaceWithoutPosition(RaceStream):
    """The position is missing from the key: one race decides every token of a text."""

    def __call__(self, rows: Sequence[int], positions: Sequence[int], depths: int) -> Tensor:
        return super().__call__(rows, [0] * len(rows), 1).expand(-1, depths, -1)
