"""The runner that takes every part: it calls the model's own modules, which attend by our function where that fits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from specdec.kv.support import text_config
from specdec.kv.versions import CACHE_KEYWORD, cache_argument
from specdec.kv.wrappers import uncompiled
from specdec.verify.attention.plan import TreePlan, chain
from specdec.verify.attention.register import NAME, attending, attention_of
from specdec.verify.passes.base import Nodes, Output, Part, Runner
from specdec.verify.passes.inputs import Inputs
from specdec.verify.passes.linear import few_row_linears

MAX_NODES = 256
"""Wider passes (prefills) are better served by masked or causal SDPA than by a plan."""


class Modules(Runner):
    """Runs an unmodified causal LM.

    Args:
        by_plan: parts of up to 256 tokens attend by a `TreePlan`: no mask is built, no page gathered. Meant for GPUs;
            prefills, and models that compute their attention eagerly, run as ever.
    """

    name = "modules"

    def __init__(self, model: PreTrainedModel, inputs: Inputs, by_plan: bool = False):
        self._model, self._inputs, self._by_plan = model, inputs, by_plan
        self._call = ModelCall(model)
        self._block: ExitStack | None = None
        self._fitted = True

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Inside the block, from the first pass on (it may never come), the model attends by our function where that
        fits, and its linear layers are quick with few rows. Afterwards it is as before."""
        outer = self._block, self._fitted
        with ExitStack() as self._block:
            self._fitted = False
            try:
                yield
            finally:
                self._block, self._fitted = outer

    def fit(self) -> None:
        """See `prepared`."""
        if self._fitted:
            return
        assert self._block is not None
        self._fitted = True
        for change in (attention_of, few_row_linears, uncompiled):
            self._block.enter_context(change(self._model))

    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        (part,) = parts
        self.fit()
        if self._takes_plan(part):
            return [self._planned(part)]
        positions, mask = self._inputs.of(part)
        return [self._call(part, positions, mask)]

    def _takes_plan(self, part: Part) -> bool:
        fits = self._by_plan and part.tokens.shape[1] <= MAX_NODES
        return fits and text_config(self._model)._attn_implementation == NAME and any(part.write.starts)

    def _planned(self, part: Part) -> Output:
        device, table, (lengths, depths, ancestors, _) = part.tokens.device, part.write.table, as_nodes(part)
        committed = torch.tensor(lengths, dtype=torch.int32).to(device, non_blocking=True)
        table = None if table is None else table.to(device, torch.int32)
        equal = min(lengths) == max(lengths)
        plan = TreePlan(committed, ancestors, depths.to(torch.int32), max(lengths), equal, table)
        with attending(self._model, plan, self._inputs.windows) as mask:
            return self._call(part, self._inputs.positions(part), mask, follows_pages=True)


def as_nodes(part: Part) -> Nodes:
    """The place of a part's tokens in trees; plain text is a chain."""
    if part.nodes is not None:
        return part.nodes
    rows, width = part.tokens.shape
    depths, ancestors = chain(rows, width, part.tokens.device)
    return Nodes(part.write.starts, depths, ancestors, 0)


class ModelCall:
    """Calls a model on one part with given positions and masks."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache_argument = cache_argument(model) or CACHE_KEYWORD

    def __call__(self, part: Part, positions: Tensor, mask: Any, follows_pages: bool = False) -> Output:
        """See `attention_of` and `Plan.mask_for` for the masks."""
        view = part.write.view(follows_pages)
        logits, features = self.run(
            part.tokens, positions, mask, view, part.features, 1 if part.keep is None else part.keep
        )
        return Output(logits[:, :0] if part.keep is None else logits, features)

    def run(
        self, tokens: Tensor, positions: Tensor, mask: Any, view: Cache, features: Sequence[int] | None, keep: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits of the last `keep` columns (0: of all), and the hidden states that are wanted."""
        extra: dict[str, Any] = {self._cache_argument: view}
        if keep and self._keeps:
            extra["logits_to_keep"] = keep
        if features is None or features:
            extra["output_hidden_states"] = True
        out = self._model(
            input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=True, return_dict=True, **extra
        )
        logits: Tensor = out.logits
        states = list(out.hidden_states) if features is None else [out.hidden_states[i] for i in features]
        return logits[:, -keep:] if keep else logits, states
