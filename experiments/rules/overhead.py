"""What a rule's decision costs at a real vocabulary, models left out."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec.experiments.clock import timed
from specdec.experiments.intervals import Spread
from specdec.verify import DraftTree, Noise, Topology
from specdec.verify.race import RaceStream
from specdec.verify.rules import RULES, make_rule

WIDTHS = (7, 2, 1, 1, 1)
"""63 drafted tokens and the root: 64 nodes."""
DRAFTS = {
    "chain": ("greedy", "rejection", "block", "naive", "coupled"),
    "fixed": ("greedy", "naive", "recursive_rejection", "traversal", "budget_flow", "coupled", "typical"),
    "mixed": ("naive", "recursive_rejection", "traversal", "budget_flow"),
    "sampled": ("naive", "recursive_rejection", "traversal"),
}


def table(vocab: int = 128_000, repeats: int = 15, seed: int = 0) -> list[dict[str, Any]]:
    """Milliseconds of a decision, per kind of draft and rule, at `vocab` tokens and 64 nodes: medians over `repeats`.

    `cpu_ms` is processor time of all threads, `ms` the clock's: on an idle machine with one thread they are the same,
    on a shared one only the first says something about the rule.

    Laws are softmax of random logits; the draft's are the target's with noise, so that rules find something to accept.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for kind, rules in DRAFTS.items():
        tree, p = make_draft(kind, vocab, generator)
        nodes = p.shape[1]
        race = RaceStream([seed], [0], vocab, p.device)([0], [0], tree.max_depth + 1)
        for rule in rules:
            decide = make_rule(rule)
            spent = []
            for _ in range(repeats + 2):
                uniforms = torch.rand(1, nodes + 1, dtype=torch.float64, generator=generator)
                noise = Noise(uniforms[:, :-1], uniforms[:, -1], race if RULES[rule].uses_race else None)
                spent.append(timed(partial(decide, tree_again(tree), p, noise))[1])
            cpu = Spread.of(1e3 * one.cpu for one in spent[2:])
            ms = statistics.median(one.ms for one in spent[2:])
            found.append({"draft": kind, "rule": rule, "vocab": vocab, "nodes": nodes, "cpu_ms": cpu.median,
                          "quartiles": [cpu.low, cpu.high], "ms": ms, "repeats": repeats})  # fmt: skip
    return found


def tree_again(tree: DraftTree) -> DraftTree:
    """The same draft without what a tree remembers of earlier questions: every step has a tree of its own."""
    return DraftTree(
        tree.tokens, tree.parents, tree.num_nodes, tree.sampled, tree.q, tree.q_row, tree.topology, tree.replacement
    )


def make_draft(kind: str, vocab: int, generator: torch.Generator) -> tuple[DraftTree, Tensor]:
    """A draft of one row and p after its nodes, float32 `[1, 64, vocab]`."""
    topology = Topology.chain(63) if kind == "chain" else Topology.widths(WIDTHS)
    nodes = topology.num_nodes
    logits = 3 * torch.randn(1, nodes, vocab, generator=generator)
    p = logits.softmax(-1)
    tokens = torch.zeros(1, nodes, dtype=torch.int64)
    sampled = torch.zeros(1, nodes, dtype=torch.bool)
    parents = topology.parents
    inner = sorted(set(parents) - {-1})
    q = (logits[:, inner] + torch.randn(1, len(inner), vocab, generator=generator)).softmax(-1)
    for row, node in enumerate(inner):
        children = [i for i, parent in enumerate(parents) if parent == node]
        law = q[0, row]
        fixed = {"fixed": len(children), "mixed": len(children) - 1}.get(kind, 0)
        best = law.topk(fixed).indices
        if kind == "mixed":
            law[best] = 0.0
            law /= law.sum()
        drawn = law.multinomial(len(children) - fixed, generator=generator) if fixed < len(children) else best[:0]
        tokens[0, children] = torch.cat([best, drawn])
        sampled[0, children[fixed:]] = True
    if kind == "fixed":
        return DraftTree.build(topology, tokens), p
    place = {node: row for row, node in enumerate(inner)}
    q_row = torch.tensor([[place.get(node, -1) for node in range(nodes)]])
    counts = torch.tensor([nodes])
    return DraftTree(tokens, topology.parents_on(p.device)[None], counts, sampled, q, q_row, topology), p
