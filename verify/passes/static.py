"""One pass of a model over static buffers: the same operations on the same addresses, whatever the buffers hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.layout import Layout
from specdec.kv.store import ModelStore
from specdec.kv.write import Write
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
        features: Sequence[int] | None = (),
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


class IndexedWrite(Write):
    """A pass whose places are a tensor, so that nothing of it is known to the host: what a CUDA graph records.

    It reads the whole storage of its rows.

    Args:
        slots: int64 `[rows, width]`.
    """

    def __init__(self, store: ModelStore, slots: Tensor):
        self._store, self._slots = store, slots
        self._rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        self.starts, self.width, self.valid = [0] * slots.shape[0], slots.shape[1], None
        self.read, self.num_layers = store.capacity, store.num_layers

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._store.layer(layer, key, value)
        keys[self._rows, :, self._slots] = key.transpose(1, 2)
        values[self._rows, :, self._slots] = value.transpose(1, 2)
        return keys[: self.num_rows], values[: self.num_rows]

    put = update

    def layout(self, like: Tensor) -> Layout:
        raise NotImplementedError("a pass over static buffers runs the model's modules")

    def row(self, row: int, width: int) -> Write:
        raise NotImplementedError("a pass over static buffers is of one shape")
