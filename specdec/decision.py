"""What a step decides, on the host: the kept path of every row, and what it emits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.verify import DraftTree, Noise
from specdec.verify.host_integers import argmax, on_host
from specdec.verify.rules import AcceptanceRule
from specdec.verify.rules.base import sample_from
from specdec.verify.tree import Verdict


class Decision:
    """A verdict on the host: plain lists, one entry per live row.

    sick, sick_path: per row, is there NaN in the law of any node, and of any node on the kept path.
    accepted, drafted: draft tokens kept and proposed; reached: depths of the tree that a decision was taken at.
    paths: kept nodes, root first; runs: emitted tokens; kinds: "accepted", "recovered" or "bonus" for each of them.
    """

    def __init__(
        self,
        accepted: list[int],
        next_tokens: list[int],
        paths: list[list[int]],
        trees: Iterable[tuple[int, list[int], list[int], list[bool]]],
        kept_end: Sequence[bool] | None = None,
    ):
        """Args:
        trees: per row, its number of nodes, and of all nodes token, parent and sickness.
        kept_end: per row, whether the next token is one more draft token that was kept (see `Walk`).
        """
        self.accepted = accepted
        self.sick, self.sick_path, self.drafted, self.reached = [], [], [], []
        self.paths, self.runs, self.kinds = [], [], []
        for kept, end, padded, (count, tokens, parents, sick) in zip(accepted, next_tokens, paths, trees, strict=True):
            path = padded[: kept + 1]
            refused = path[kept] in parents[1:count]  # it had children, none of which was kept
            self.sick.append(any(sick))
            self.sick_path.append(any(map(sick.__getitem__, path)))
            self.drafted.append(count - 1)
            self.reached.append(kept + refused)
            self.paths.append(path)
            self.runs.append([*map(tokens.__getitem__, path[1:]), end])
            self.kinds.append([*["accepted"] * kept, "recovered" if refused else "bonus"])
        for row, also in enumerate(kept_end or ()):
            if also:
                accepted[row] += 1
                self.reached[row] = accepted[row]
                self.kinds[row][-1] = "accepted"

    def to_dict(self) -> dict[str, list[Any]]:
        """Its lists by name, ready for JSON; later cuts of this object leave them alone."""
        return {name: list(values) for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, lists: Mapping[str, list[Any]]) -> Decision:
        """What `to_dict` was called on."""
        made = cls.__new__(cls)
        vars(made).update(lists)
        return made


def read_verdict(tree: DraftTree, sick: Tensor, verdict: Verdict, kept_end: Sequence[bool] | None = None) -> Decision:
    """Bring the verdict to the host: the one synchronisation of a step.

    Args:
        sick: bool `[rows, nodes]`, is there NaN in the law of a node. kept_end: see `Decision`.
    """
    accepted, tokens, paths, *trees = on_host(
        verdict.num_accepted, verdict.next_token, verdict.path, tree.num_nodes, tree.tokens, tree.parents, sick
    )
    return Decision(accepted, tokens, paths, zip(*trees, strict=True), kept_end)


def undrafted(law: Tensor, noise: Noise | None) -> Verdict:
    """Where nothing was drafted, every lossless rule draws from the target's law, with this very uniform; greedy
    decoding (no noise) takes its largest entry.

    Args:
        law: float `[rows, 1, vocab]`.
    """
    nothing = torch.zeros(len(law), dtype=torch.int64, device=law.device)
    token = argmax(law)[:, 0] if noise is None else sample_from(law[:, 0], noise.residual)
    return Verdict(nothing[:, None], nothing, token)


def verdict_of(paths: Sequence[Sequence[int]], ends: Sequence[int], tree: DraftTree) -> Verdict:
    """Of kept paths, root first, and the token after each of them."""
    width = tree.max_depth + 1
    device = tree.tokens.device
    padded = [[*path, *[-1] * (width - len(path))] for path in paths]
    kept = torch.tensor([len(path) - 1 for path in paths], device=device)
    return Verdict(torch.tensor(padded, device=device), kept, torch.tensor(list(ends), device=device))


class Decided(NamedTuple):
    """What one step decides for the live rows of a batch.

    tree, logits: what was judged, the target's logits float `[rows, nodes, vocab]`; scores, law: the same, processed.
    rule: the one that decided.
    in_order: decided in plain order: the stop rules have been asked, and the law is that of the visited nodes only.
    failed: by place, what a row's own processors or criteria raised; it gets nothing of this step.
    """

    tree: DraftTree
    logits: Tensor
    scores: Tensor
    law: Tensor
    verdict: Verdict
    rule: AcceptanceRule
    decision: Decision
    in_order: bool = False
    failed: Mapping[int, BaseException] = MappingProxyType({})

    @property
    def faulty(self) -> dict[int, bool]:
        """By place, the rows whose kept path has no law: is it the target (NaN in its logits), or their processors?"""
        lost = [i for i, sick in enumerate(self.decision.sick_path) if sick]
        return {i: bool(self.logits[i].isnan().any()) for i in lost}
