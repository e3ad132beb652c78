"""The target's passes over the shared cache, and what happens when one fails."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv import KVCache, TargetFaultError
from specdec.kv.exchange import adopt
from specdec.kv.support import text_config
from specdec.report import SpecReport
from specdec.request import Request
from specdec.verify import DraftTree, Rows
from specdec.verify.passes.forward import Forward
from specdec.verify.passes.strict_mode import StrictMode

TARGET = "target"
"""The target's name in the shared cache."""


class TargetPasses:
    """Runs the target for one decode loop; every failure becomes a `TargetFaultError` with the cache consistent.

    Attributes:
        vocab: the target's vocabulary size; logits are cut to it.
    """

    def __init__(
        self,
        request: Request,
        model: PreTrainedModel,
        rows: Rows,
        cache: KVCache,
        report: SpecReport,
        strict: StrictMode | None = None,
    ) -> None:
        self._request = request
        self._rows = rows
        self._cache = cache
        self._report = report
        self._forward = Forward(model, TARGET) if strict is None else strict.forward(TARGET)
        self._chunk: int | None = getattr(request.config, "prefill_chunk_size", None)
        self._read_along = False
        self.vocab = int(text_config(model).vocab_size)

    def prepared(self) -> AbstractContextManager[None]:
        """See `Forward.prepared`."""
        return self._forward.prepared()

    def prefill(self) -> None:
        """Everything but each row's last token goes into the target's K/V; equal prompts are run once.

        Rows that wait for equally many tokens are left to the first step, whose pass reads them along with its draft.
        """
        request, cache, rows = self._request, self._cache, self._rows
        if request.cache is not None and request.cached:
            real = request.real
            if real is None:
                real = torch.ones_like(request.input_ids, dtype=torch.bool)
            adopt(cache, TARGET, request.cache, real[:, : request.cached])
        leaders = slice(None, None, request.repeats)
        lengths = [count - 1 for count in rows.num_tokens[leaders]]
        if request.repeats > 1 or not self._forward.reads_prompts or len(set(self._missing(lengths))) > 1:
            self._fill(rows.text[leaders], lengths)
        for row, length in enumerate(lengths):
            cache.set_length(row, length)
        if request.repeats > 1:
            cache.fork(request.repeats)

    def _missing(self, lengths: Sequence[int]) -> list[int]:
        """Tokens per active row, below `lengths`, whose K/V the target still has to write."""
        return [length - have for length, have in zip(lengths, self._cache.filled(TARGET), strict=True)]

    def _fill(self, text: Tensor, lengths: Sequence[int]) -> None:
        try:
            self._forward.prefill(self._cache, text, self._cache.filled(TARGET), lengths, self._chunk)
        except Exception as fault:
            raise self.fault(f"{type(fault).__name__} in the prefill: {fault}") from fault

    def tree(self, tree: DraftTree) -> tuple[DraftTree, Tensor]:
        """Logits `[rows, nodes, vocab]` of every node. Out of memory: once more without the draft, then an error.

        To drop a draft because of its size is lossless for sampled drafts, too, as long as the size does not depend on
        the drawn tokens; where it may (no common shape) the error stands.
        """
        unread = self._unread(tree)
        self._read_along = unread is not None
        try:
            try:
                return tree, self._cut(self._forward.tree(self._cache, tree, unread).logits)
            except torch.OutOfMemoryError:
                if tree.tokens.shape[1] == 1 or (tree.topology is None and tree.any_sampled):
                    raise
                self._report.notes.append(f"step {self._report.num_steps}: out of memory on the tree, decoded plainly")
                tree = DraftTree.root_only(tree.tokens[:, 0])
                return tree, self._cut(self._forward.tree(self._cache, tree, unread).logits)
        except Exception as fault:
            raise self.fault(f"{type(fault).__name__}: {fault}") from fault

    def _cut(self, logits: Tensor) -> Tensor:
        return logits if logits.shape[-1] == self.vocab else logits[..., : self.vocab]

    def _unread(self, tree: DraftTree) -> Tensor | None:
        """The tokens that the pass over `tree` has to read first; written here where they do not fit into it."""
        lengths = self._cache.lengths[: self._cache.num_rows]
        missing = self._missing(lengths)[0]
        if missing == 0:
            return None
        wanted = missing + tree.tokens.shape[1]
        most = wanted if self._chunk is None else self._chunk
        if tree.is_shared_chain and wanted <= self._forward.stride(len(lengths), max(lengths) - missing, most):
            return self._rows.window(self._cache.filled(TARGET), missing)
        self._fill(self._rows.window([0] * len(lengths), max(lengths)), lengths)
        return None

    def again(self, tree: DraftTree) -> tuple[DraftTree, Tensor]:
        """The tree once more, on a clean tail: whole where that works without NaN, else its healthy part."""
        kept, logits = self._afresh(tree)
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
        self._report.notes.append(f"step {self._report.num_steps}: NaN in the logits of the tree, decoded by levels")
        if self._read_along:  # the prompt went through that pass as well, and NaN may have spread to its K/V
            lengths = self._cache.lengths[: self._cache.num_rows]
            self._cache.forget(TARGET)
            self._fill(self._rows.window([0] * len(lengths), max(lengths)), lengths)
        kept, logits = DraftTree.root_only(tree.tokens[:, 0]), None
        for depth in range(tree.max_depth + 1):
            part = tree.up_to(depth)
            if part is None:  # nodes in no level order
                if tree.any_sampled:
                    raise self.fault("NaN in its logits")
                return self._afresh(kept)
            part, here = self._afresh(part)
            if logits is not None and _has_nan(here):
                _, logits = self._afresh(kept)  # this pass wrote NaN into the K/V of every node
                if part.any_sampled:
                    kept, logits = part, torch.cat([logits, here[:, logits.shape[1] :]], dim=1)
                break
            kept, logits = part, here
        assert logits is not None
        return kept, logits

    def _afresh(self, tree: DraftTree) -> tuple[DraftTree, Tensor]:
        self._cache.scrub(TARGET)
        return self.tree(tree)

    def fault(self, what: str) -> TargetFaultError:
        """The error to raise; the cache is rolled back to the last step."""
        self._cache.rollback()
        rows, step = self._rows, self._report.num_steps
        emitted = [rows.ids[row, rows.prompt_length : end].tolist() for row, end in enumerate(rows.ends)]
        return TargetFaultError(
            f"the target failed at step {step} ({what}); {sum(map(len, emitted))} tokens emitted before are in "
            ".emitted, one list per row",
            step,
            emitted,
        )

    def fill_finished(self, storage: dict[int, int]) -> None:
        """K/V of what plain decoding feeds rows that ended early: their last token, then padding.

        Only a returned cache shows them; a caller who continues from it may attend to them.

        Args:
            storage: for each row of the batch, where its K/V lies in the cache.
        """
        rows = self._rows
        width = max(rows.ends)
        if min(rows.ends) == width:
            return
        padding = self._request.config._pad_token_tensor
        assert padding is not None, "rows end apart only where finished rows are padded"
        text = torch.full((rows.batch_size, width), int(padding), device=rows.device)
        stops = [0] * rows.batch_size
        for row, place in storage.items():
            count = rows.num_tokens[row]
            text[place, :count] = rows.text[row, :count]
            stops[place] = count + width - rows.ends[row] - 1
        self._cache.revive()
        self._forward.prefill(self._cache, text, self._cache.filled(TARGET), stops)
        for place, stop in enumerate(stops):
            self._cache.set_length(place, stop)


def _has_nan(logits: Tensor) -> bool:
    return bool(logits.amax(-1).isnan().any())
