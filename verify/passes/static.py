"""One pass of a model over static buffers: the same operations on the same addresses, whatever the buffers hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.shared_write import IndexedWrite
from specdec.kv.store import ModelStore
from specdec.verify.attention.plan import TreePlan
from specdec.verify.attention.register import attending
from specdec.verify.passes.inputs import Inputs
from specdec.verify.passes.modules import ModelCall


class StaticPass:
    """Buffers of one shape of pass, and `run`, which reads nothing else and brings nothing to the host.

    Args:
        rows, width: tokens of the pass; width includes padding nodes.
        first: nodes of the tree that are in the tail already.
        slots: slots read, at least the longest row's committed ones plus `first + width`, at most the capacity.
        features: see `Part.features`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Inputs,
        store: ModelStore,
        rows: int,
        width: int,
        first: int,
        slots: int,
        features: Sequence[int] = (),
    ) -> None:
        assert all(keys is not None for keys in store.keys), "storage is allocated by an eager pass"
        self._model, self._inputs, self._features = model, inputs, features
        self._call = ModelCall(model)
        self._longest = slots - first - width
        self._first = first
        embeddings: Any = model.get_input_embeddings()
        device: torch.device = embeddings.weight.device
        with torch.inference_mode(False):  # written to inside and outside of inference mode
            self.tokens = torch.zeros(rows, width, dtype=torch.int64, device=device)
            self.positions = torch.zeros(rows, width, dtype=torch.int64, device=device)
            self.slots = torch.zeros(rows, width, dtype=torch.int64, device=device)
            self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
            self.depths = torch.zeros(rows, first + width, dtype=torch.int32, device=device)
            self.ancestors = torch.zeros(rows, width, first + width, dtype=torch.bool, device=device)
            self._own = torch.eye(width, first + width, dtype=torch.bool, device=device).roll(first, 1)
            self._columns = torch.arange(first, first + width, device=device)
        self._view = IndexedWrite(store, self.slots).view()

    def load(self, tokens: Tensor, lengths: Sequence[int], depths: Tensor, ancestors: Tensor) -> None:
        """Fill the buffers; nodes beyond the given ones see themselves alone and stand where the root stands.

        Args:
            tokens: int64 `[rows, nodes]`, nodes <= width; lengths: committed slots per row.
            depths: int `[rows, first + nodes]`; ancestors: bool `[rows, nodes, first + nodes]`.
        """
        nodes, tail = tokens.shape[1], self._first + tokens.shape[1]
        self.lengths.copy_(torch.tensor(list(lengths), dtype=torch.int32))
        self.tokens.zero_()[:, :nodes] = tokens
        self.depths.zero_()[:, :tail] = depths
        self.ancestors.copy_(self._own.expand_as(self.ancestors))
        self.ancestors[:, :nodes, :tail] = ancestors
        committed = self.lengths[:, None].long()
        self.slots.copy_(committed + self._columns)
        self.positions.copy_(self._inputs.usable(committed + self.depths[:, self._first :]))

    def run(self) -> tuple[Tensor, ...]:
        """Logits `[rows, width, vocab]`, and the features that are wanted; K/V of all nodes is written."""
        # A plan of its own for every run: it remembers masks, which belong to the buffers' contents.
        plan = TreePlan(self.lengths, self.ancestors, self.depths, self._longest)
        with attending(self._model, plan, self._inputs.windows) as mask:
            logits, features = self._call.run(self.tokens, self.positions, mask, self._view, self._features)
        return logits, *features
