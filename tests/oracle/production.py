"""The production rules under the oracle: full draft trees as batch rows, and their step law over exact coin boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from oracle.enumerate import BranchingCoins, branches, full_trees
from oracle.instances import Instance, Law, Number, Prefix
from oracle.reference import Rule, Tree
from specdec.verify.noise import Noise
from specdec.verify.tree import DraftTree, Verdict

INSET = 2e-14
"""Coins are placed this far inside the exact breakpoints: a threshold that is off by more changes a verdict."""
CHUNK = 40_000


class Batch(NamedTuple):
    tree: DraftTree
    p: Tensor

    def take(self, index: Tensor) -> Batch:
        t = self.tree
        q = None if t.q is None else t.q[index]
        q_row = None if t.q_row is None else t.q_row[index]
        picked = (t.tokens[index], t.parents[index], t.num_nodes[index], t.sampled[index], q, q_row)
        return Batch(DraftTree(*picked, replacement=t.replacement), self.p[index])


def batch(trees: Sequence[Tree], vocab: int, extra: int = 1, dtype: torch.dtype = torch.float64) -> Batch:
    """Trees of any shapes as rows of one batch, with `extra` columns of width padding full of plausible rubbish.

    Vocabularies smaller than `vocab` are padded with tokens of probability zero in p and q.
    """
    rows, nodes = len(trees), max(len(tree.prefixes) for tree in trees) + extra
    tokens = torch.zeros(rows, nodes, dtype=torch.int64)
    parents = torch.arange(-1, nodes - 1).repeat(rows, 1)
    sampled = torch.zeros(rows, nodes, dtype=torch.bool)
    p = torch.full((rows, nodes, vocab), 1.0 / vocab, dtype=dtype)
    q = torch.full((rows, nodes, vocab), 1.0 / vocab, dtype=dtype)
    for row, tree in enumerate(trees):
        count = len(tree.prefixes)
        tokens[row, 1:count] = torch.tensor([prefix[-1] for prefix in tree.prefixes[1:]], dtype=torch.int64)
        parents[row, :count] = torch.tensor(tree.parents)
        sampled[row, :count] = torch.tensor(tree.sampled)
        for rows_of, target in ((tree.instance.p, p), (tree.instance.q, q)):
            table = torch.tensor([[float(x) for x in rows_of[prefix]] for prefix in tree.prefixes], dtype=dtype)
            target[row, :count] = 0.0
            target[row, :count, : table.shape[1]] = table
    num_nodes = torch.tensor([len(tree.prefixes) for tree in trees])
    any_sampled = bool(sampled.any())
    q_row = torch.arange(nodes).repeat(rows, 1)
    drafted = (tokens, parents, num_nodes, sampled, q if any_sampled else None, q_row if any_sampled else None)
    return Batch(DraftTree(*drafted, replacement=trees[0].instance.replacement), p)


class Probe(NamedTuple):
    """One set of coins for one tree, what it must lead to, and its share of the step's probability."""

    tree: int
    coins: dict[int, float]
    filler: float
    residual: float
    node: int
    token: int
    weight: float


def probes(tree: Tree, number: int, weight: float, rule: Rule) -> Iterator[Probe]:
    """Both extreme corners of every box of coins on which the rule's outcome is constant, for one full tree."""

    def run(chooser: object) -> tuple[int, Law, list[tuple[int, Number, Number]]]:
        coins = BranchingCoins(chooser)  # type: ignore[arg-type]
        node, residual = rule(tree, coins)
        return node, residual, coins.boxes

    for (node, residual, boxes), mass in branches(run, floor=4 * INSET):
        total, low = sum(residual), 0.0
        for token, part in enumerate(residual):
            share = float(part / total)
            if share > 4 * INSET:
                half = weight * float(mass) * share / 2
                bottom = {at: float(start) + INSET for at, start, _ in boxes}
                top = {at: float(stop) - INSET for at, _, stop in boxes}
                yield Probe(number, bottom, 0.25, low + INSET, node, token, half)
                yield Probe(number, top, 0.875, low + share - INSET, node, token, half)
            low += share


Verify = Callable[[DraftTree, Tensor, Noise], Verdict]


class Outcome(NamedTuple):
    """laws: per instance, the production rule's emitted law of one step; wrong: probes with another verdict than
    the reference; num_probes."""

    laws: list[dict[Prefix, float]]
    tau: list[float]
    wrong: int
    num_probes: int


class Drafted(NamedTuple):
    """Every draft tree of some instances as one batch, with each tree's probability and instance."""

    instances: Sequence[Instance]
    trees: list[tuple[Tree, float, int]]
    rows: Batch


def draft_everything(instances: Sequence[Instance], vocab: int = 4) -> Drafted:
    trees = [
        (tree, float(weight), at)
        for at, instance in enumerate(instances)
        for tree, weight in full_trees(instance.as_float())
    ]
    return Drafted(instances, trees, batch([tree for tree, _, _ in trees], vocab))


def production_law(drafted: Drafted, rule: Rule, verify: Verify) -> Outcome:
    """The step law of a production rule, integrated over its coins box by box.

    Thresholds of the production rule lie within 2 * INSET of the boxes' edges whenever no probe is wrong, so the law
    found here is its law up to that times the number of edges.
    """
    trees = drafted.trees
    found = [probe for at, (tree, weight, _) in enumerate(trees) for probe in probes(tree, at, weight, rule)]
    laws: list[dict[Prefix, float]] = [{} for _ in drafted.instances]
    tau = [0.0] * len(drafted.instances)
    wrong = 0
    for start in range(0, len(found), CHUNK):
        part = found[start : start + CHUNK]
        rows = drafted.rows.take(torch.tensor([probe.tree for probe in part]))
        verdict = verify(rows.tree, rows.p, noise_of(part, rows.tree.tokens.shape[1]))
        ends = verdict.path.gather(1, verdict.num_accepted[:, None])[:, 0].tolist()
        for probe, node, token in zip(part, ends, verdict.next_token.tolist(), strict=True):
            wrong += (node, token) != (probe.node, probe.token)
            tree, _, owner = trees[probe.tree]
            prefix = (*tree.prefixes[node], token)
            law = laws[owner]
            law[prefix] = law.get(prefix, 0.0) + probe.weight
            tau[owner] += probe.weight * (len(prefix) - 1)
    return Outcome(laws, tau, wrong, len(found))


def noise_of(found: Sequence[Probe], nodes: int) -> Noise:
    accept = torch.tensor([probe.filler for probe in found], dtype=torch.float64)[:, None].repeat(1, nodes)
    entries = [(row, node, coin) for row, probe in enumerate(found) for node, coin in probe.coins.items()]
    if entries:
        row, node, coin = zip(*entries, strict=True)
        accept[torch.tensor(row), torch.tensor(node)] = torch.tensor(coin, dtype=torch.float64)
    return Noise(accept, torch.tensor([probe.residual for probe in found], dtype=torch.float64))


class GivenCoins:
    """The scalar reference's view of the very uniforms a production rule is given."""

    def __init__(self, uniforms: Sequence[float]):
        self.uniforms = uniforms

    def choose(self, node: int, masses: Sequence[Number]) -> int | None:
        low: Number = 0
        for index, mass in enumerate(masses):
            if low <= self.uniforms[node] < low + mass:
                return index
            low += mass
        return None

    def accept(self, node: int, probability: Number) -> bool:
        return self.choose(node, [probability]) == 0


def invert(weights: Law, u: float) -> int:
    """The token that the uniform `u` falls on."""
    total, low = sum(weights), 0 * weights[0]
    for token, weight in enumerate(weights):
        low += weight
        if u * total < low:
            return token
    raise AssertionError("a uniform beyond the law")
