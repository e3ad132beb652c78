"""Forward passes of one model over the shared cache: trees, chains and texts become parts, and a runner runs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.base import PassCache
from specdec.kv.support import text_config
from specdec.verify.passes.account import PassesReport, account, bytes_by_form
from specdec.verify.passes.base import FIRST_CHUNK, PREFILL_CHUNK, Nodes, Output, Part, Runner, Text
from specdec.verify.passes.choose import runners_for
from specdec.verify.passes.linear import is_dense
from specdec.verify.positions import usable_positions
from specdec.verify.tree import DraftTree

T = TypeVar("T")

Reader = Callable[[Sequence[int], Sequence[int], Output], None]
"""Told of every pass of a prefill: slots of the first tokens, real tokens per row, output."""


Observer = Callable[[PreTrainedModel, float], None]
"""Told of every pass: the model, and the seconds spent in it."""

_observers: ContextVar[tuple[Observer, ...]] = ContextVar("specdec_pass_observers", default=())


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Inside the block `observer` hears of every pass; hooks on a model would force its passes through its modules."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def nodes_of(tree: DraftTree, lengths: Sequence[int]) -> Nodes | None:
    """Where the nodes of whole trees stand, behind `lengths` committed slots; None where all are one chain."""
    return None if tree.is_shared_chain else Nodes(lengths, tree.depths, tree.ancestor_mask, 0)


class Forward:
    """Runs `model` (a target or a drafter) on the cache named `name`; each part by the first runner that takes it.

    Writes the speculative tail, moves no committed length. Positions are slots plus depth, so siblings share one.

    Args:
        runners: the fastest first; by default those of `runners_for`.

    Attributes:
        features: hidden states that every pass is to give besides logits (see `Part.features`).
        num_positions: positions the model has, where that is limited.
        reads_prompts: whether `tree` takes unread tokens along.
    """

    def __init__(self, model: PreTrainedModel, name: str, runners: Sequence[Runner] | None = None):
        self.model, self.name = model, name
        self.runners = runners_for(model) if runners is None else runners
        self.features: Sequence[int] | None = ()
        self.num_positions = usable_positions(text_config(model))
        self._counts = Counter[Runner]()
        self.reads_prompts = all(runner.reads_prompts for runner in self.runners)
        # Offloading hooks create parameters during the pass, which must stay ordinary ones; so must the tensors that
        # make up a quantised weight.
        self._inference = not hasattr(model, "_hf_hook") and all(is_dense(weight) for weight in model.parameters())

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Inside the block passes take the fastest way there is to these weights; the model itself is as before."""
        with ExitStack() as stack:
            for runner in self.runners:
                stack.enter_context(runner.prepared())
            yield

    def account(self) -> PassesReport:
        """How the passes so far were computed; to be asked inside `prepared`."""
        if not self._counts:
            return PassesReport()
        most = self._counts.most_common(1)[0][0]
        counts = {runner.name: count for runner, count in self._counts.items()}
        weights = bytes_by_form(self.model) if most.weights is None else most.weights
        return account(most.name, counts, weights, most.sums, str(self.model.dtype).removeprefix("torch."))

    def prefill(
        self,
        cache: PassCache,
        text: Tensor,
        starts: Sequence[int],
        stops: Sequence[int],
        chunk: int | None = None,
        reader: Reader | None = None,
    ) -> None:
        """Write K/V of tokens `starts[b] .. stops[b] - 1` of each row, in chunks, without any logits.

        Args:
            text: int64 `[rows, >= max(stops)]`, real tokens of the cache's active rows.
            chunk: most tokens of a row per pass; None for what serves best.
            reader: told of the features of every pass.
        """
        done = list(starts)
        while any(start < stop for start, stop in zip(done, stops, strict=True)):
            left = max(stop - start for start, stop in zip(done, stops, strict=True))
            most = self.stride(max(done), left if chunk is None else min(chunk, left))
            valid = [max(0, min(most, stop - start)) for start, stop in zip(done, stops, strict=True)]
            width = max(valid)
            columns = torch.tensor(done, device=text.device)[:, None] + torch.arange(width, device=text.device)
            tokens = text.gather(1, columns.clamp(max=text.shape[1] - 1))
            output = self.causal(cache, tokens, done, valid, None)
            if reader is not None:
                reader(done, valid, output)
            done = [start + count for start, count in zip(done, valid, strict=True)]

    def stride(self, read: int, most: int) -> int:
        """Tokens of a row, at most `most`, to read in one pass behind `read` slots."""
        most = min(most, PREFILL_CHUNK if read else FIRST_CHUNK)
        strides = (runner.stride(read, most) for runner in self.runners)
        return next((stride for stride in strides if stride is not None), most)

    def causal(
        self, cache: PassCache, tokens: Tensor, starts: Sequence[int], valid: Sequence[int] | None, keep: int | None
    ) -> Output:
        """Plain causal continuation: row `b`'s tokens go to slots from `starts[b]` on.

        Returns:
            logits of the last `keep` columns (0 = all, None = none), and the features of all.
        """
        self._check_ends(starts, valid)
        with cache.writing(self.name, starts, tokens.shape[1], valid) as write:
            return self._run(Part(tokens, write, None, None, keep, self.features))[0]

    def best_chain(
        self, cache: PassCache, tokens: Tensor, starts: Sequence[int], levels: int, vocab: int
    ) -> Tensor | None:
        """Greedy decoding below `tokens`, int64 `[rows, 1]`, which go to slots `starts`: see `Runner.best_chain`. The
        last token that is found is not run. None where every level needs a pass of its own."""
        runner = self.runners[0]
        if not runner.decodes or (cache.quantised is not None and not runner.reads(cache.quantised)):
            return None
        with cache.writing(self.name, starts, levels) as write:
            return self._observed(partial(runner.best_chain, Part(tokens, write), levels, vocab))

    def nodes(self, cache: PassCache, tree_tokens: Tensor, depths: Tensor, ancestors: Tensor, first: int) -> Output:
        """Forward nodes `first .. first + M - 1` of a tree whose earlier nodes are already in the tail.

        Args:
            tree_tokens: int64 `[rows, M]`, the nodes' tokens.
            depths: int64 `[rows, first + M]`, of all nodes so far.
            ancestors: bool `[rows, M, first + M]`, self included.
        """
        lengths = cache.lengths[: cache.num_rows]
        with cache.writing(self.name, [length + first for length in lengths], tree_tokens.shape[1]) as write:
            nodes = Nodes(lengths, depths, ancestors, first)
            return self._run(Part(tree_tokens, write, nodes, None, 0, self.features))[0]

    def tree(self, cache: PassCache, tree: DraftTree, unread: Tensor | None = None) -> Output:
        """One pass over every node of every row; logits `[rows, nodes, vocab]`.

        Args:
            unread: int64 `[rows, U]`, committed tokens before a chain whose K/V this pass writes as well; features are
                theirs, too.
        """
        starts, tokens = cache.lengths[: cache.num_rows], tree.tokens
        if self.num_positions is not None:
            self._check_positions([start + 1 for start in starts])
        nodes, keep = nodes_of(tree, starts), 0
        if unread is not None:
            assert nodes is None, "only a chain can stand behind unread text"
            keep, starts = tokens.shape[1], [start - unread.shape[1] for start in starts]
            tokens = torch.cat([unread, tokens], dim=1)
        with cache.writing(self.name, starts, tokens.shape[1]) as write:
            return self._run(Part(tokens, write, nodes, tree, keep, self.features))[0]

    def together(self, cache: PassCache, tree: DraftTree, texts: Sequence[Text]) -> list[Output]:
        """What `tree`, and `causal` for each of `texts` (of other rows) without logits, do; in one pass where a runner
        allows it: the weights are read once, and no row is padded to the width of a longer text."""
        lengths = cache.lengths[: cache.num_rows]
        self._check_positions([length + 1 for length in lengths])
        with ExitStack() as stack:
            write = stack.enter_context(cache.writing(self.name, lengths, tree.tokens.shape[1]))
            parts = [Part(tree.tokens, write, nodes_of(tree, lengths), tree, 0, self.features)]
            for text in texts:
                self._check_ends(text.starts, text.valid)
                write = stack.enter_context(
                    text.cache.writing(self.name, text.starts, text.tokens.shape[1], text.valid)
                )
                parts.append(Part(text.tokens, write, None, None, None, self.features))
            return self._run(*parts)

    def _run(self, *parts: Part) -> list[Output]:
        """Every part by the first runner that takes it, those of one runner together."""
        if len(parts) == 1:
            runner = self._runner(parts[0])
            self._counts[runner] += 1
            return self._observed(partial(runner, parts))
        chosen = [self._runner(part) for part in parts]
        self._counts.update(set(chosen))
        given: dict[int, Output] = {}
        for runner in dict.fromkeys(chosen):
            mine = [i for i, own in enumerate(chosen) if own is runner]
            for group in [mine] if runner.joint else [[i] for i in mine]:
                given.update(zip(group, self._observed(partial(runner, [parts[i] for i in group])), strict=True))
        return [given[i] for i in range(len(parts))]

    def _observed(self, run: Callable[[], T]) -> T:
        start = perf_counter()
        # Spares every operation its autograd bookkeeping. (`inference_mode(False)` would turn gradients on.)
        with torch.inference_mode() if self._inference else torch.no_grad():
            given = run()
        seconds = perf_counter() - start
        for observer in _observers.get():
            observer(self.model, seconds)
        return given

    def _runner(self, part: Part) -> Runner:
        reasons = []
        for runner in self.runners:
            reason = runner.refusal(part)
            if reason is None:
                return runner
            reasons.append(f"{runner.name}: {reason}")
        raise RuntimeError(f"no pass of {type(self.model).__name__} has what is promised: {'; '.join(reasons)}")

    def _check_ends(self, starts: Sequence[int], valid: Sequence[int] | None) -> None:
        """As `_check_positions`, for text of which `valid` tokens per row are real; rows that add none place none."""
        if valid is not None and self.num_positions is not None:
            self._check_positions([start + count for start, count in zip(starts, valid, strict=True) if count])

    def _check_positions(self, counts: Sequence[int]) -> None:
        """Refuse real tokens beyond the last usable position (on a GPU a table look-up there kills the context)."""
        if self.num_positions is not None and max(counts, default=0) > self.num_positions:
            raise ValueError(
                f"{type(self.model).__name__} has {self.num_positions} positions (learned, or before its rotary "
                f"frequencies start to depend on the length of the pass), but a row holds {max(counts)} tokens: "
                "shorten the prompt or lower max_new_tokens"
            )
