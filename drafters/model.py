"""Drafting with a small causal LM on the shared cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.base import CACHE_NAME, Budget, Drafter, Session
from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.support import check_model, num_cache_layers, text_config
from specdec.verify.forward import PREFILL_CHUNK, TreeForward, prepared
from specdec.verify.rules.base import sample_from
from specdec.verify.topology import Topology
from specdec.verify.tree import DraftTree

DEFAULT_K = 4
"""Chain length when neither `k` nor `tree` is given."""


class ModelDrafter(Drafter):
    """Any HF causal LM that shares the target's tokenizer, one forward pass per tree level.

    A chain samples from the drafter's own law when the call samples (q is that very law), and takes the argmax in
    greedy decoding. A static tree takes the top-k children of every node, which are deterministic nodes (no q).

    Args:
        model: the drafter. Its vocabulary may be padded differently from the target's (152064 / 151936).
        k: chain length (default DEFAULT_K). Exclusive with `tree`.
        tree: children per level, e.g. `(3, 2, 1)`: 3 children of the root, 2 of each of those, 1 of each of those.
        temperature: extra temperature on the drafter's processed scores when sampling (1.0: the caller's own).
    """

    name = "model"

    def __init__(
        self,
        model: PreTrainedModel,
        k: int | None = None,
        tree: tuple[int, ...] | None = None,
        temperature: float = 1.0,
    ):
        self.model = check_model(model, "draft")
        if k is not None and tree is not None:
            raise UnsupportedArgumentError(f"expected k or tree, got both k={k} and tree={tree}; k=3 is tree=(1, 1, 1)")
        if tree is None:
            tree = (1,) * (DEFAULT_K if k is None else k)
        if not tree or any(width < 1 for width in tree):
            raise UnsupportedArgumentError(
                f"expected a chain length k >= 1 or tree widths >= 1, got k={k}, tree={tree}"
            )
        if not temperature > 0:
            raise UnsupportedArgumentError(f"expected a draft temperature > 0, got {temperature}")
        self.widths = tuple(tree)
        self.temperature = temperature
        self.max_depth = len(self.widths)
        self.max_nodes = Topology.widths(self.widths).num_nodes - 1
        self._forward = TreeForward(model, CACHE_NAME)
        self._vocab = int(text_config(model).vocab_size)
        self._session: Session | None = None

    @property
    def num_cache_layers(self) -> int:
        return num_cache_layers(self.model)

    @contextmanager
    def running(self) -> Iterator[None]:
        with prepared(self.model):
            yield

    def start(self, session: Session) -> None:
        self._session = session

    @torch.no_grad()
    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        assert self._session is not None, "propose() before start()"
        widths = self._affordable(budget)
        if not widths:
            return DraftTree.root_only(self._session.rows.roots())
        # By the full shape, not this step's: how a row drafts must not depend on its companions' budgets.
        tree = self._chain(len(widths), uniforms) if self.max_nodes == self.max_depth else self._top_tree(widths)
        return self._limited(tree, budget)

    def _chain(self, length: int, uniforms: Tensor) -> DraftTree:
        """One token per level: sampled from the drafter's law when the call samples, else its argmax."""
        assert self._session is not None
        cache, law = self._session.cache, self._session.law
        topology = Topology.chain(length)
        columns = [self._session.rows.roots()[:, None]]
        parents = topology.parents_on(columns[0].device).expand(len(columns[0]), -1)
        laws: list[Tensor] = []
        peaks: list[Tensor] = []
        logits = self._root_logits()
        for depth in range(1, length + 1):
            tokens = columns[0] if law.prefix_free else torch.cat(columns, dim=1)
            scores = law(self._fit(logits), self._session.rows, tokens, parents, range(depth - 1, depth)).squeeze(1)
            if self._session.do_sample:
                laws.append(F.softmax(scores if self.temperature == 1 else scores / self.temperature, dim=-1))
                columns.append(sample_from(laws[-1], uniforms[:, depth])[:, None])
            else:
                peak, token = scores.max(-1, keepdim=True)
                peaks.append(peak)
                columns.append(token)
            if depth < length:
                starts = [count + depth for count in cache.lengths[: cache.num_rows]]
                logits = self._forward.causal(cache, self._known(columns[-1]), starts, None, keep=0)
        _refuse_nan(peaks)
        return DraftTree.build(topology, torch.cat(columns, dim=1), torch.stack(laws, dim=1) if laws else None)

    def _top_tree(self, widths: tuple[int, ...]) -> DraftTree:
        """The `widths[d]` best children of every node of level d."""
        assert self._session is not None
        rows, cache = self._session.rows, self._session.cache
        topology = Topology.widths(widths)
        roots = rows.roots()
        tokens = roots.new_zeros(len(rows.live), topology.num_nodes)
        tokens[:, 0] = roots
        parents = topology.parents_on(roots.device).expand(tokens.shape)
        depths = topology.depths_on(roots.device).expand(tokens.shape)
        impossible = torch.zeros_like(tokens, dtype=torch.bool)
        peaks: list[Tensor] = []
        logits = self._root_logits()
        for depth in range(1, len(topology.levels)):
            parent_level, level = topology.levels[depth - 1], topology.levels[depth]
            frontier = range(parent_level[0], parent_level[-1] + 1)
            scores = self._session.law(self._fit(logits), rows, tokens, parents, frontier, impossible)
            first, count = level[0], len(level)
            peak, best = scores.topk(widths[depth - 1], dim=-1)
            peaks.append(peak.flatten(1))
            tokens[:, first : first + count] = best.flatten(1)
            # More children than the law allows tokens: the rest can never be accepted, nor their descendants.
            ruled_out = impossible[:, parents[0, first : first + count]]
            impossible[:, first : first + count] = (peaks[-1] == float("-inf")) | ruled_out
            if depth + 1 < len(topology.levels):
                mask = topology.ancestor_mask[first : first + count, : first + count].to(roots.device)
                ancestors = mask.expand(len(rows.live), -1, -1)
                new = self._known(tokens[:, first : first + count])
                logits = self._forward.nodes(cache, new, depths[:, : first + count], ancestors, first)
        _refuse_nan(peaks)
        return DraftTree.build(topology, tokens)

    def _affordable(self, budget: Budget) -> tuple[int, ...]:
        """The leading levels of the shape that fit the budget. Depends on no drafted token."""
        widths = self.widths[: max(0, budget.max_depth)]
        while widths and Topology.widths(widths).num_nodes - 1 > budget.max_nodes:
            widths = widths[:-1]
        return widths

    def _limited(self, tree: DraftTree, budget: Budget) -> DraftTree:
        """Cut each row at its own depth; nodes are in level order, so that is a prefix of them."""
        if all(depth >= tree.max_depth for depth in budget.depths):
            return tree
        assert tree.topology is not None
        sizes = [sum(depth <= limit for depth in tree.topology.depths) for limit in budget.depths]
        return replace(tree, num_nodes=torch.tensor(sizes, device=tree.tokens.device))

    def _root_logits(self) -> Tensor:
        """Bring the drafter's K/V up to date and return the logits after each root, `[live, 1, vocab]`."""
        assert self._session is not None
        rows, cache = self._session.rows, self._session.cache
        lengths = cache.lengths[: cache.num_rows]
        filled = cache.filled(CACHE_NAME)
        if max(length - have for length, have in zip(lengths, filled, strict=True)) > 8:
            text = self._known(rows.window([0] * len(rows.live), max(lengths)))
            self._forward.prefill(cache, text, filled, lengths, PREFILL_CHUNK)
            filled = cache.filled(CACHE_NAME)
        lag = [length + 1 - have for length, have in zip(lengths, filled, strict=True)]
        width = max(lag)
        tokens = self._known(rows.window(filled, width))
        logits = self._forward.causal(cache, tokens, filled, lag, keep=0)
        if all(count == width for count in lag):
            return logits[:, -1:]
        last = torch.tensor(lag, device=logits.device) - 1
        return logits[torch.arange(len(lag), device=logits.device), last][:, None]

    def _known(self, tokens: Tensor) -> Tensor:
        """Ids the drafter has no embedding for become its last one: it may read anything, the target decides."""
        assert self._session is not None
        return tokens.clamp(max=self._vocab - 1) if self._vocab < self._session.vocab else tokens

    def _fit(self, logits: Tensor) -> Tensor:
        """Cut or pad the drafter's vocabulary to the target's; padding can never be drafted."""
        assert self._session is not None
        missing = self._session.vocab - logits.shape[-1]
        if missing == 0:
            return logits
        if missing <= 0:
            return logits[..., : self._session.vocab]
        return F.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min)


def _refuse_nan(peaks: list[Tensor]) -> None:
    """The best scores of every level carry any NaN of their rows. Sampled laws are checked with the tree."""
    if peaks and bool(torch.cat(peaks, dim=1).isnan().any()):
        raise FloatingPointError("NaN in the draft model's logits")
