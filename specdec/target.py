"""The target's passes over a shared cache, and what is left of a tree when one fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv import KVCache, TargetFaultError
from specdec.kv.support import text_config
from specdec.verify import DraftTree, Rows
from specdec.verify.passes.base import Output, Text
from specdec.verify.passes.forward import Forward, Reader
from specdec.verify.strict_mode import StrictMode

TARGET = "target"
"""The target's name in the shared cache."""


class TargetModel:
    """The model whose law is kept. What its passes say of a tree comes out of `tree` and nowhere else.

    Attributes:
        forward: its passes. vocab: its vocabulary size; logits are cut to it.
    """

    def __init__(self, model: PreTrainedModel, strict: StrictMode | None = None):
        self.forward = Forward(model, TARGET) if strict is None else strict.forward(TARGET)
        self.vocab = int(text_config(model).vocab_size)
        embeddings: torch.nn.Embedding = model.get_input_embeddings()  # type: ignore[assignment]
        self.device = embeddings.weight.device

    def prepared(self) -> AbstractContextManager[None]:
        """See `Forward.prepared`."""
        return self.forward.prepared()

    def tree(self, cache: KVCache, tree: DraftTree, unread: Tensor | None = None, texts: Sequence[Text] = ()) -> Output:
        """Logits `[rows, nodes, vocab]` of every node, from one pass where the model allows it; and what features the
        forward was told to give, of the unread tokens too.

        Args:
            unread: int64 `[rows, U]`, committed tokens before a chain whose K/V this pass writes as well.
            texts: of other rows, read besides.

        Raises:
            whatever the model raises.
        """
        forward = self.forward
        output = forward.together(cache, tree, texts)[0] if texts else forward.tree(cache, tree, unread)
        logits = output.logits
        return output if logits.shape[-1] == self.vocab else Output(logits[..., : self.vocab], output.features)


class TargetPasses:
    """The target's passes over one cache: every failure becomes a `TargetFaultError`, with the cache consistent.

    Args:
        rows: the text of the cache's rows; None where all K/V below the roots is there.
        fault: the error to raise, given what failed. note: told what a user should know.
        chunk: tokens of a prompt per pass; None for what serves best.

    Attributes:
        features: of the nodes whose logits `tree` returned last (see `Forward.features`).
        reader: told of those of the text that is read.
        alone: whether this process may repeat a pass by itself; False where others take part in every pass.
        announce: told of every tree that is run again, before that.
    """

    features: Sequence[Tensor] = ()
    reader: Reader | None = None
    alone: bool = True
    announce: Callable[[DraftTree], None] | None = None

    def __init__(
        self,
        target: TargetModel,
        cache: KVCache,
        rows: Rows | None,
        fault: Callable[[str], TargetFaultError],
        note: Callable[[str], None] | None = None,
        chunk: int | None = None,
    ) -> None:
        self.target, self.cache, self.rows = target, cache, rows
        self._fault, self._note, self._chunk = fault, note, chunk
        self._read_along = False

    def fault(self, what: str) -> TargetFaultError:
        """The error to raise; the cache is rolled back to the last step."""
        self.cache.rollback()
        return self._fault(what)

    def note(self, what: str) -> None:
        if self._note is not None:
            self._note(what)

    def missing(self, lengths: Sequence[int]) -> list[int]:
        """Tokens per active row, below `lengths`, whose K/V the target still has to write."""
        return [length - have for length, have in zip(lengths, self.cache.filled(TARGET), strict=True)]

    def read(self, text: Tensor, lengths: Sequence[int]) -> None:
        """Write what K/V is missing below `lengths`. `text`: int64 `[rows, >= max(lengths)]`."""
        try:
            self.target.forward.prefill(self.cache, text, self.cache.filled(TARGET), lengths, self._chunk, self.reader)
        except Exception as fault:
            raise self.fault(f"{type(fault).__name__} in the prefill: {fault}") from fault

    def tree(self, tree: DraftTree) -> tuple[DraftTree, Tensor]:
        """Logits `[rows, nodes, vocab]` of every node. Out of memory: once more without the draft, then an error.

        To drop a draft because of its size is lossless for sampled drafts, too, as long as the size does not depend on
        the drawn tokens; where it may (no common shape) the error stands.
        """
        unread = None if self.rows is None else self._unread(self.rows, tree)
        self._read_along = unread is not None
        try:
            try:
                return tree, self._nodes_of(self.target.tree(self.cache, tree, unread), unread)
            except torch.OutOfMemoryError:
                if not self.alone or tree.tokens.shape[1] == 1 or (tree.topology is None and tree.any_sampled):
                    raise
                self.note("out of memory on the tree, decoded plainly")
                tree = DraftTree.root_only(tree.tokens[:, 0])
                return tree, self._nodes_of(self.target.tree(self.cache, tree, unread), unread)
        except Exception as fault:
            raise self.fault(f"{type(fault).__name__}: {fault}") from fault

    def _nodes_of(self, output: Output, unread: Tensor | None) -> Tensor:
        """The logits of a pass; its features go to `features` and, of unread text, to the reader."""
        self.features = output.features
        if output.features and unread is not None:
            rows, count = unread.shape
            starts = [length - count for length in self.cache.lengths[:rows]]
            if self.reader is not None:
                self.reader(starts, [count] * rows, output)
            self.features = [layer[:, count:] for layer in output.features]
        return output.logits

    def _unread(self, rows: Rows, tree: DraftTree) -> Tensor | None:
        """The tokens that the pass over `tree` has to read first; written here where they do not fit into it."""
        filled = self.cache.filled(TARGET)
        missing = self.cache.lengths[0] - filled[0]  # all rows wait for equally many, see `read_prompts`
        if missing == 0:
            return None
        wanted = missing + tree.tokens.shape[1]
        most = wanted if self._chunk is None else self._chunk
        if tree.is_shared_chain and wanted <= self.target.forward.stride(max(filled), most):
            return rows.window(filled, missing)
        self._read_all(rows)
        return None

    def _read_all(self, rows: Rows) -> None:
        lengths = self.cache.lengths[: self.cache.num_rows]
        self.read(rows.window([0] * len(lengths), max(lengths)), lengths)

    def again(self, tree: DraftTree) -> tuple[DraftTree, Tensor]:
        """The tree once more, on a clean tail: whole where that works without NaN, else its healthy part."""
        kept, logits = self.afresh(tree)
        return self.healthy_part(tree) if _has_nan(logits) else (kept, logits)

    def healthy_part(self, tree: DraftTree) -> tuple[DraftTree, Tensor]:
        """The tree again, level by level, down to the first level with NaN: drafts may lead where plain decoding
        never goes, and one such node spoils all others of its row (hidden slots enter attention as 0 * NaN).

        In a tree with sampled nodes that level stays, as leaves: to withdraw nodes because of what they turned out to
        be would bias the output, to draft no further does not (algorithms B.5). A deterministic tree loses the level.

        All rows are cut at that level. So a healthy row beside a sick one keeps its law, but it may get fewer tokens in
        this step, and its later noise then belongs to other positions: with a seed its sampled text may be another one.
        Greedy and coupled texts stay. After NaN in a pass that read prompts as well, all K/V is computed anew from
        the text, also what was adopted from a caller's cache.
        """
        self.note("NaN in the logits of the tree, decoded by levels")
        self.reread()
        kept, logits = DraftTree.root_only(tree.tokens[:, 0]), None
        for depth in range(tree.max_depth + 1):
            part = tree.up_to(depth)
            if part is None:  # nodes in no level order
                if tree.any_sampled:
                    raise self.fault("NaN in its logits")
                return self.afresh(kept)
            part, here = self.afresh(part)
            if logits is not None and _has_nan(here):
                known = self.features
                _, logits = self.afresh(kept)  # this pass wrote NaN into the K/V of every node
                if part.any_sampled:
                    first = logits.shape[1]
                    kept, logits = part, torch.cat([logits, here[:, first:]], dim=1)
                    both = zip(self.features, known, strict=True)
                    self.features = [torch.cat([own, more[:, first:]], dim=1) for own, more in both]
                break
            kept, logits = part, here
        assert logits is not None
        return kept, logits

    def reread(self) -> None:
        """After NaN in a pass that read prompts as well: it may have spread to their K/V, which is computed anew."""
        if self._read_along:
            assert self.rows is not None
            self.cache.forget(TARGET)
            self._read_all(self.rows)

    def afresh(self, tree: DraftTree) -> tuple[DraftTree, Tensor]:
        """The tree on a clean tail."""
        if self.announce is not None:
            self.announce(tree)
        self.cache.scrub(TARGET)
        return self.tree(tree)


def _has_nan(logits: Tensor) -> bool:
    return bool(logits.amax(-1).isnan().any())
