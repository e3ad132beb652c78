"""Every way a drafter can go wrong, and what the fault tests share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from exact_law import noisy_copy, tiny_llama
from torch import Tensor

from specdec import ModelDrafter, Speculator
from specdec.drafters import Budget, DrafterFaultWarning, Session
from specdec.verify import DraftTree, Topology

MODEL = tiny_llama(0, layers=2)
DRAFT = noisy_copy(MODEL, 1)
VOCAB = MODEL.config.vocab_size
PROMPT = torch.tensor([[3, 5, 2, 6, 3, 5], [0, 0, 7, 4, 4, 2]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
NEW = 14
GREEDY: dict[str, Any] = {"attention_mask": REAL, "do_sample": False, "max_new_tokens": NEW}
SAMPLED: dict[str, Any] = {
    "attention_mask": REAL, "do_sample": True, "max_new_tokens": NEW, "top_k": 0, "seed": 5,
}  # fmt: skip
Spoil = Callable[[DraftTree], Any]


def raising(error: Exception) -> Spoil:
    def spoil(tree: DraftTree) -> Any:
        raise error

    return spoil


def with_q(change: Callable[[Tensor], Tensor]) -> Spoil:
    """Change the recorded laws; where the drafter recorded none (greedy decoding), claim some."""

    def spoil(tree: DraftTree) -> DraftTree:
        rows, nodes = tree.tokens.shape
        q = tree.q if tree.q is not None else torch.full((rows, nodes, VOCAB), 1 / VOCAB)
        q_row = tree.q_row if tree.q_row is not None else torch.arange(nodes).expand(rows, nodes)
        sampled = torch.ones(rows, nodes, dtype=torch.bool)
        sampled[:, 0] = False
        return replace(tree, q=change(q), q_row=q_row, sampled=sampled)

    return spoil


def without_own_token(tree: DraftTree) -> DraftTree:
    def change(q: Tensor) -> Tensor:
        q = q.clone()
        q[:, : tree.tokens.shape[1] - 1].scatter_(2, tree.tokens[:, 1:, None], 0.0)
        return q / q.sum(-1, keepdim=True)

    return with_q(change)(tree)


def chain_of(tree: DraftTree, length: int) -> DraftTree:
    return DraftTree.build(Topology.chain(length), tree.tokens[:, :1].repeat(1, length + 1))


SPOILS: dict[str, Spoil] = {
    "exception": raising(RuntimeError("boom")),
    "out of memory": raising(torch.OutOfMemoryError("CUDA out of memory")),
    "q is NaN": with_q(lambda q: q * float("nan")),
    "q has one infinity": with_q(lambda q: q.index_fill(2, torch.tensor([0]), float("inf"))),
    "q does not sum to 1": with_q(lambda q: q * 1.1),
    "q has negative entries": with_q(lambda q: torch.cat([q[..., :1] - 2, q[..., 1:-1], q[..., -1:] + 2], -1)),
    "q is 0 for its own token": without_own_token,
    "q of another vocabulary": with_q(lambda q: torch.cat([q, q[..., :1] * 0], dim=-1)),
    "q of fewer rows": with_q(lambda q: q[:, :0]),
    "sampled without q": lambda tree: replace(tree, q=None, sampled=torch.ones_like(tree.sampled)),
    "ids too large": lambda tree: replace(tree, tokens=tree.tokens.index_fill(1, torch.tensor([1]), VOCAB)),
    "ids negative": lambda tree: replace(tree, tokens=tree.tokens.index_fill(1, torch.tensor([1]), -1)),
    "ids are floats": lambda tree: replace(tree, tokens=tree.tokens.double()),
    "wrong root": lambda tree: replace(
        tree, tokens=torch.cat([(tree.tokens[:, :1] + 1) % VOCAB, tree.tokens[:, 1:]], dim=1)
    ),
    "tokens are one row": lambda tree: replace(tree, tokens=tree.tokens[0]),
    "a row too many": lambda tree: replace(tree, tokens=tree.tokens[:1].repeat(tree.tokens.shape[0] + 1, 1)),
    "parents of another shape": lambda tree: replace(tree, parents=tree.parents[:, :-1]),
    "parents after children": lambda tree: replace(tree, parents=tree.parents.flip(1), topology=None),
    "parents contradict topology": lambda tree: replace(tree, parents=tree.parents + 40),
    "topology of another size": lambda tree: replace(tree, topology=Topology.chain(tree.tokens.shape[1] + 1)),
    "num_nodes too large": lambda tree: replace(tree, num_nodes=tree.num_nodes + 9),
    "num_nodes zero": lambda tree: replace(tree, num_nodes=tree.num_nodes * 0),
    "num_nodes of another shape": lambda tree: replace(tree, num_nodes=tree.num_nodes.repeat(2)),
    "num_nodes for one row only": lambda tree: replace(tree, num_nodes=tree.num_nodes[:1]),
    "too many nodes": lambda tree: chain_of(tree, 9),
    "nothing": lambda tree: None,
    "a tuple": lambda tree: (tree.tokens, tree.parents),
}


class Faulty(ModelDrafter):
    """A model drafter whose proposals are spoilt at chosen calls (None: at all of them)."""

    def __init__(self, spoil: Spoil, calls: set[int] | None, draft: Any = DRAFT, **shape: Any):
        super().__init__(draft, **(shape or {"k": 3}))
        self.spoil, self.calls, self.num_calls = spoil, calls, 0

    def start(self, session: Session) -> None:
        super().start(session)
        self.num_calls = 0

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        tree = super().propose(budget, uniforms)
        call, self.num_calls = self.num_calls, self.num_calls + 1
        spoilt: DraftTree = self.spoil(tree) if self.calls is None or call in self.calls else tree
        return spoilt


@contextmanager
def one_warning() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [entry.category for entry in caught] == [DrafterFaultWarning], [str(entry.message) for entry in caught]


def plain_greedy(prompt: Tensor = PROMPT, **arguments: Any) -> Any:
    model: Any = MODEL
    return model.generate(prompt, **{**GREEDY, **arguments})


def plain(arguments: dict[str, Any]) -> Any:
    """The library's own decoding without a drafter, same arguments, same noise."""
    return Speculator(MODEL).generate(PROMPT, **arguments)


def assert_same_cache(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        for mine, wanted in ((a.keys, b.keys), (a.values, b.values)):
            torch.testing.assert_close(mine, wanted[:, :, : mine.shape[2]], rtol=0, atol=1e-10)
