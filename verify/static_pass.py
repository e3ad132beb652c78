"""One pass of a model over static buffers: the same operations on the same addresses, whatever the buffers hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.store import ModelStore, StoreView
from specdec.kv.versions import cached
from specdec.verify.attention.plan import TreePlan
from specdec.verify.attention.register import attending


class StaticPass:
    """Buffers of one shape of pass, and `run`, which reads nothing else and brings nothing to the host.

    Args:
        rows, width: tokens of the pass; width includes padding nodes.
        first: nodes of the tree that are in the tail already.
        slots: slots read, at least the longest row's committed ones plus `first + width`, at most the capacity.
        windows: attention window per layer type (see `TreeForward`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: ModelStore,
        rows: int,
        width: int,
        first: int,
        slots: int,
        windows: Mapping[str, int | None],
    ) -> None:
        assert all(keys is not None for keys in store.keys), "storage is allocated by an eager pass"
        self._model, self._windows = model, windows
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
        self._view = _IndexedView(store, self.slots)

    def load(
        self,
        tokens: Tensor,
        lengths: Sequence[int],
        depths: Tensor,
        ancestors: Tensor,
        num_positions: int | None = None,
    ) -> None:
        """Fill the buffers; nodes beyond the given ones see themselves alone and stand where the root stands.

        Args:
            tokens: int64 `[rows, nodes]`, nodes <= width; lengths: committed slots per row.
            depths: int `[rows, first + nodes]`; ancestors: bool `[rows, nodes, first + nodes]`.
            num_positions: positions the model has, where that is limited.
        """
        nodes, tail = tokens.shape[1], self._first + tokens.shape[1]
        self.lengths.copy_(torch.tensor(list(lengths), dtype=torch.int32))
        self.tokens.zero_()[:, :nodes] = tokens
        self.depths.zero_()[:, :tail] = depths
        self.ancestors.copy_(self._own.expand_as(self.ancestors))
        self.ancestors[:, :nodes, :tail] = ancestors
        committed = self.lengths[:, None].long()
        self.slots.copy_(committed + self._columns)
        self.positions.copy_(committed + self.depths[:, self._first :])
        if num_positions is not None:
            self.positions.clamp_(max=num_positions - 1)

    def run(self) -> Tensor:
        """Logits `[rows, width, vocab]`; K/V of all nodes is written."""
        # A plan of its own for every run: it remembers masks, which belong to the buffers' contents.
        plan = TreePlan(self.lengths, self.ancestors, self.depths, self._longest)
        with attending(self._model, plan, self._windows) as mask:
            out = self._model(
                input_ids=self.tokens,
                position_ids=self.positions,
                attention_mask=mask,
                return_dict=True,
                **cached(self._model, self._view),
            )
        logits: Tensor = out.logits
        return logits


class _IndexedView(StoreView):
    """The cache a static pass sees: writes go where a tensor says, reads return the whole storage of the rows."""

    def __init__(self, store: ModelStore, slots: Tensor):
        super().__init__(store)
        self._states = store
        self._slots = slots
        self._rows = torch.arange(slots.shape[0], device=slots.device)[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._states.keys[layer_idx], self._states.values[layer_idx]
        assert keys is not None
        assert values is not None
        keys[self._rows, :, self._slots] = key_states.transpose(1, 2)
        values[self._rows, :, self._slots] = value_states.transpose(1, 2)
        rows = key_states.shape[0]
        return keys[:rows], values[:rows]
