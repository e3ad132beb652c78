"""Drafting with a small causal LM on the shared cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.base import CACHE_NAME, Budget, Drafter, Session
from specdec.drafters.children import NAN, refuse_nan
from specdec.drafters.growth import Run, grow
from specdec.drafters.reading import Context, DraftPasses
from specdec.drafters.shapes import Start, Static, shape_of
from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.limits import MOST_NODES, checked_count, checked_number
from specdec.kv.support import check_model, num_cache_layers, text_config
from specdec.verify.draft_kind import DraftKind
from specdec.verify.host_integers import table
from specdec.verify.passes.forward import Forward
from specdec.verify.race import gumbel
from specdec.verify.rules.base import sample_from
from specdec.verify.topology import Topology, indices
from specdec.verify.tree import DraftTree

DEFAULT_K = 4
"""Chain length when neither `k` nor `tree` is given."""

_TREES = {
    "top": DraftKind("tree", "deterministic"),
    "mixed": DraftKind("tree", "mixed"),
    "sampled": DraftKind("tree", "sampled"),
}


class ModelDrafter(Drafter):
    """Any HF causal LM that shares the target's tokenizer, one forward pass per tree level.

    A chain samples from the drafter's own law when the call samples (q is that very law), and takes the argmax in
    greedy decoding. Trees get their children by `children`; in greedy decoding always the best tokens.

    Args:
        model: the drafter. Its vocabulary may be padded differently from the target's (152064 / 151936).
        k: chain length (default DEFAULT_K). Exclusive with `tree`.
        tree: children per level, e.g. `(3, 2, 1)`: 3 children of the root, 2 of each of those, 1 of each of those;
            a `Topology`; a list of paths such as `[[0], [0, 0], [1]]`; or a growth policy, `BestFirst(...)` or
            `DySpec(...)`.
        temperature: extra temperature on the drafter's processed scores when sampling (1.0: the caller's own).
        children: of nodes in sampled calls. "top": the best tokens, deterministic (rule naive). "mixed": the best
            tokens but one, and one sampled off them (rule budget_flow). "sampled": drawn without replacement (rules
            traversal, recursive_rejection). Default: what the shape does best.

    Where the call runs a race (rule coupled), children are the ones that arrive first under the drafter's law, all
    deterministic, whatever `children` says.

    Raises:
        UnsupportedModelError: no model that can be rolled back. UnsupportedArgumentError: k or a tree of none or more
            than `MOST_NODES` nodes, and what does not fit together.
    """

    name = "model"

    def __init__(
        self,
        model: PreTrainedModel,
        k: int | None = None,
        tree: Any = None,
        temperature: float = 1.0,
        children: str | None = None,
    ):
        self.model = model = check_model(model, "draft")
        self.temperature = checked_number("temperature of the draft", temperature, 0.0, above=True)
        self._vocab = int(text_config(model).vocab_size)
        self._forward = Forward(model, CACHE_NAME)
        self._context = Context(type(model).__name__, self._forward.num_positions)
        self._session: Session | None = None
        self._passes: DraftPasses | None = None
        self._gumbel: Tensor | None = None
        self._heat = 1.0
        self._take_shape(k, tree, children)

    def shaped(self, k: int | None = None, tree: Any = None) -> Self:
        """The same model and settings, for drafts of another shape."""
        other = copy.copy(self)
        other._take_shape(k, tree, None)
        return other

    def _take_shape(self, k: int | None, tree: Any, children: str | None) -> None:
        if k is not None and tree is not None:
            raise UnsupportedArgumentError(f"expected k or tree, got both k={k} and tree={tree}; k=3 is tree=(1, 1, 1)")
        length = checked_count("k", DEFAULT_K if k is None else k, 1, MOST_NODES)
        self.shape = shape_of((1,) * length if tree is None else tree)
        if children is not None and children not in self.shape.modes:
            raise UnsupportedArgumentError(f"children: expected one of {self.shape.modes} here, got {children!r}")
        self.children = self.shape.modes[0] if children is None else children
        if self.shape.max_children > self._vocab:
            raise UnsupportedArgumentError(
                f"tree: expected at most {self._vocab} children per node (the drafter's vocabulary), got "
                f"{self.shape.max_children}"
            )
        self.max_depth, self.max_nodes = self.shape.max_depth, self.shape.max_nodes
        self._chains = isinstance(self.shape, Static) and self.shape.topology.is_chain

    @property
    def kind(self) -> DraftKind:
        if self._chains:
            return DraftKind("chain", "deterministic" if self.children == "top" else "sampled")
        return _TREES[self.children]

    @property
    def num_positions(self) -> int | None:
        return self._context.num_positions

    @property
    def looks_ahead(self) -> bool:
        return self.shape.looks_ahead

    @property
    def num_uniforms(self) -> int:
        return self.shape.num_uniforms

    @property
    def tail_slots(self) -> int:
        return max(self.max_nodes + 1, self.shape.num_slots)

    def nodes_within(self, depth: int) -> int:
        return self.shape.nodes_within(depth)

    @property
    def num_cache_layers(self) -> int:
        return num_cache_layers(self.model)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._forward.prepared():
            yield

    def start(self, session: Session) -> None:
        self._session = session
        self._context = self._context.afresh()
        self._context.outgrown(session.rows.lengths())
        self.notes = self._context.notes
        self._heat = self.temperature if session.do_sample else 1.0

    def join(self, rows: Sequence[int]) -> None:
        assert self._session is not None, "join() before start()"
        self._context.outgrown([self._session.rows.num_tokens[row] for row in rows])

    def finish(self) -> None:
        self._session = self._passes = self._gumbel = None

    @torch.no_grad()
    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        assert self._session is not None, "propose() before start()"
        roots = self._session.rows.roots()
        idle, budget = self._readable(budget, self._session)
        depth, nodes = min(budget.max_depth, self.max_depth), min(budget.max_nodes, self.max_nodes)
        if min(depth, nodes) < 1:
            return DraftTree.root_only(roots)
        self._passes = DraftPasses(self._forward, self._vocab, self._session, idle)
        race = self._session.race
        mode = self.children if self._session.do_sample and race is None else "top"
        self._gumbel = None if race is None else gumbel(race(depth))
        if self._chains:  # by the full shape: how a row drafts must not depend on its companions' budgets
            chain = self._chain(roots, min(depth, nodes), mode, uniforms)
            return chain if min(budget.depths) >= min(depth, nodes) else _limited(chain, budget)
        start = Start(roots, tuple(min(limit, depth) for limit in budget.depths), nodes, mode, uniforms)
        grown = grow(self.shape.grower(start), roots, self._score)
        if grown.slots is not None:
            self._session.cache.place(CACHE_NAME, grown.slots)
        return grown.tree

    def _readable(self, budget: Budget, session: Session) -> tuple[list[bool], Budget]:
        """Which live rows it cannot read in this step, and the budget without drafts for them."""
        return self._context.fit(budget, session.rows.lengths())

    def _chain(self, roots: Tensor, length: int, mode: str, uniforms: Tensor) -> DraftTree:
        """One token per level: the argmax (mode "top"), else sampled from the drafter's law."""
        assert self._session is not None
        assert self._passes is not None
        law, rows = self._session.law, self._session.rows
        prefix_free = law.prefix_free  # then nobody looks at tokens and parents
        topology = Topology.chain(length)
        columns = [roots[:, None]]
        parents = columns[0] if prefix_free else DraftTree.build(topology, columns[0]).parents
        laws: list[Tensor] = []
        peaks: list[Tensor] = []
        logits = self._passes.roots()
        for depth in range(1, length + 1):
            tokens = columns[0] if prefix_free else torch.cat(columns, dim=1)
            scores = law(logits, rows, tokens, parents, range(depth - 1, depth))
            scores = scores if self._heat == 1 else scores / self._heat
            if mode != "top":
                laws.append(F.softmax(scores, dim=-1))
                columns.append(sample_from(laws[-1], uniforms[:, depth : depth + 1]))
            else:
                scores = scores if self._gumbel is None else scores + self._gumbel[:, depth - 1 : depth]
                columns.append(best_token(scores, peaks))
                if depth == 1 < length and law.raw and self._gumbel is None:
                    below = self._passes.best_chain(columns[1], length - 1)
                    if below is not None:
                        columns.append(below)
                        break
            if depth < length:
                logits = self._passes.chain(columns[-1], depth)
        if peaks:
            refuse_nan(peaks)
        return DraftTree.build(topology, torch.cat(columns, dim=1), torch.cat(laws, dim=1) if laws else None)

    def _score(self, run: Run, slots: range) -> Tensor:
        """Run one level of a tree; its scores `[live, len(slots), vocab]`."""
        assert self._session is not None
        assert self._passes is not None
        logits = self._passes.roots() if slots.start == 0 else self._passes.level(run, slots.start)
        law, rows = self._session.law, self._session.rows
        scores = law(logits, rows, run.tokens, run.parents, slots, run.impossible)
        scores = scores if self._heat == 1 else scores / self._heat
        if self._gumbel is None:
            return scores
        return scores + self._gumbel[indices(len(scores), scores.device)[:, None], run.depths[:, slots.start :]]


def _limited(chain: DraftTree, budget: Budget) -> DraftTree:
    """Cut each row's chain at its own depth."""
    counts = [1 + min(limit, chain.max_depth) for limit in budget.depths]
    return replace(chain, num_nodes=torch.tensor(counts, device=chain.tokens.device))


def best_token(scores: Tensor, peaks: list[Tensor]) -> Tensor:
    """The best token of every node, int64 `[rows, width]`.

    On a CPU NaN is refused at once. Elsewhere a look would wait for the device: `peaks` is given what `refuse_nan` is
    to look at later.
    """
    array = table(scores)
    if array is None:
        peak, token = scores.max(-1)
        peaks.append(peak)
        return token
    tokens = array.argmax(-1)
    for row, token in zip(array.reshape(-1, array.shape[-1]), tokens.ravel().tolist(), strict=True):
        if row[token] != row[token]:  # NaN counts as the largest score
            raise FloatingPointError(NAN)
    return torch.from_numpy(tokens)
