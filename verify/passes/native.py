"""The runner of native passes: one C call for a model of Llama's kind on a CPU, computing what the direct pass does."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.layout import Layout
from specdec.kv.quantised import Quantised
from specdec.verify.native import structures
from specdec.verify.native.library import library, usable_cores
from specdec.verify.packed import Packed
from specdec.verify.passes.base import Output, Part, Runner, joined, outputs, refuse_wider
from specdec.verify.passes.direct import Direct
from specdec.verify.passes.inputs import Inputs
from specdec.verify.passes.native_weights import NativeWeights, is_native
from specdec.verify.passes.pace import ALWAYS_NATIVE, CHUNK, native_is_slower
from specdec.verify.passes.packed_copies import packed_copies
from specdec.verify.passes.parameters import Parameters

_ROOM = 32
"""Floats behind every working array: the widest vector and columns handed out at once."""
_QUERIES = 24
"""Heads of tokens that attend together, at least those of one token (QUERIES of attention.h)."""
_UNIT = 64
"""Numbers of a token that are prepared for a product together, at most (tokens.h)."""


class Native(Runner):
    """Runs what the direct runner runs, in float32, bfloat16 or float16, where there is a compiled pass. Sums are taken
    in float32, states rounded where the modules round them.

    A token's bits depend on its text alone: neither on the draft nor on the rows around it.

    Args:
        direct: who knows the parameters.
        any_text: long texts, too, where they are read faster straight over the parameters (see `native_is_slower`).
        most_nodes: of a tree, where its size is part of a promise (see `Strict`).
    """

    name = "native"
    joint = True
    sums = "float32"

    def __init__(self, inputs: Inputs, direct: Direct, any_text: bool = False, most_nodes: int | None = None):
        self._inputs, self._direct, self._any_text, self._most_nodes = inputs, direct, any_text, most_nodes
        self._pass: NativePass | None = None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        outer = self._pass
        with self._direct.prepared():
            own = self._direct.parameters
            self._pass = None if own is None else native_pass(own, self._inputs, self._direct.model)
            try:
                yield
            finally:
                self._pass = outer

    @property
    def serves(self) -> bool:
        """Whether the model, as it is now, has a native pass."""
        with self._direct.prepared():
            own = self._direct.parameters
            return own is not None and native_pass(own, self._inputs) is not None

    def refusal(self, part: Part) -> str | None:
        if self._most_nodes is not None:
            refuse_wider(part, self._most_nodes)
        if self._pass is None:
            return "there is no native pass over these weights (docs/models.md)"
        own = self._pass.own
        if sum(map(len, own.hooks)) != own.num_hooks:  # `own.hooked`, which every pass of every level would call
            return self._direct.refusal(part)
        if part.write.quantised is not None:  # rounding makes much of a last bit: whatever can be read here is
            return None if self.reads(part.write.quantised) else "no native pass reads such K/V"
        width = part.tokens.shape[1]
        if width >= ALWAYS_NATIVE and part.nodes is None and not self._reads(width, part.write.read):
            return "so long a text is read faster by another pass"
        return None

    def stride(self, read: int, most: int) -> int | None:
        width = min(most, CHUNK)
        serves = self._pass is not None and not self._pass.own.hooked
        return width if serves and self._reads(most, read + most) else None

    def _reads(self, width: int, read: int) -> bool:
        assert self._pass is not None
        own = self._pass.own
        return self._any_text or own.score_cap > 0 or not native_is_slower(own, width, read, self._both)

    def _both(self, own: Parameters) -> list[Runner]:
        direct = Direct(self._direct.model, self._inputs)
        direct.parameters = own
        native = Native(self._inputs, direct, any_text=True)
        native._pass = native_pass(own, self._inputs, self._direct.model)
        return [native, direct]

    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        assert self._pass is not None
        return self._pass(parts)

    @property
    def weights(self) -> dict[str, int] | None:
        return None if self._pass is None else self._pass.weights.forms

    def reads(self, quantised: Quantised) -> bool:
        return self._pass is not None and self._pass.own.head_dim <= quantised.native

    @property
    def decodes(self) -> bool:
        own = None if self._pass is None else self._pass.own
        return own is not None and sum(map(len, own.hooks)) == own.num_hooks

    def best_chain(self, part: Part, levels: int, vocab: int) -> Tensor:
        assert self._pass is not None
        return self._pass.best_chain(part, levels, vocab)


def native_pass(own: Parameters, inputs: Inputs, model: PreTrainedModel | None = None) -> NativePass | None:
    """The native pass over these parameters, None where there is none (see `is_native`).

    Args:
        model: whose they are, where packed copies of them are to be read in their place (see `packed_copies`).
    """
    if not is_native(own):
        return None
    return NativePass(own, inputs, {} if model is None else packed_copies(model, own))


class _Given(NamedTuple):
    """What a pass was handed. held: what must outlive it, its addresses are all that the pass knows."""

    rows: ctypes.Array[structures.Row]
    ids: Tensor
    kept: Tensor
    held: tuple[Any, ...]


class NativePass:
    """A whole pass. A token's logits are the same bits whatever else is in it, given the keys and values before it.

    Args:
        copies: see `NativeWeights`.

    Attributes:
        own: whose pass it is. weights: what C is told of them.
    """

    def __init__(self, own: Parameters, inputs: Inputs, copies: Mapping[int, Packed]):
        assert own.shape is not None
        self.own, self._inputs, self._shape = own, inputs, own.shape
        self._dtype = own.embed.dtype
        self._call, self._chain = library().calls[self._dtype], library().chains[self._dtype]
        self._places = [layer.index for layer in own.layers]
        self.weights = NativeWeights(own, copies)
        self._kv = (structures.Pointer * (2 * own.shape.layers))()
        self._wanted = (structures.Pointer * (own.shape.layers + 1))()
        self._tickets = torch.zeros(11 * own.shape.layers + 3, dtype=torch.int64)
        self._like = own.embed.new_empty(1, own.shape.kv_heads, 0, own.shape.head_dim)
        self._angles = _floats(0)
        self._room, self._threads = (0, 0, 0), 0
        self._pass = structures.Pass()
        self._pass.keys = ctypes.addressof(self._kv)
        self._pass.values = ctypes.addressof(self._kv) + own.shape.layers * ctypes.sizeof(structures.Pointer)
        self._pass.features = ctypes.addressof(self._wanted)
        self._pass.tickets = self._tickets.data_ptr()

    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        """See `Runner.__call__`."""
        layouts = [part.write.layout(self._like) for part in parts]
        if not all(own.keys is layouts[0].keys for own in layouts):  # of several caches, one pass for each
            return [self([part])[0] for part in parts]
        run, shape = self._pass, self._shape
        given = self._given(parts, layouts)
        logits = _floats(len(given.kept), shape.vocab)
        wanted = parts[0].wanted(shape.layers)
        features = [_floats(run.tokens, shape.hidden) for _ in wanted]
        for layer, states in zip(wanted, features, strict=True):
            self._wanted[layer] = states.data_ptr()
        run.logits = logits.data_ptr()
        wrong = self._call(ctypes.byref(self.weights.model), ctypes.byref(run))
        for layer in wanted:
            self._wanted[layer] = None
        if wrong:
            raise self._unknown(given.ids, wrong)
        return outputs(logits.to(self._dtype), [states.to(self._dtype) for states in features], parts)

    def best_chain(self, part: Part, levels: int, vocab: int) -> Tensor:
        """See `Runner.best_chain`."""
        layout = part.write.layout(self._like)
        given = self._given([part._replace(tokens=part.tokens.clone())], [layout])  # the chain writes its tokens there
        count = len(given.ids)
        logits, best = _floats(count, self._shape.vocab), torch.empty(count, levels, dtype=torch.int64)
        self._pass.logits = logits.data_ptr()
        chain = structures.Chain(levels, vocab, given.rows, given.ids.data_ptr(), best.data_ptr())
        if layout.targets is not None:
            targets = layout.targets.view(count, levels).t().contiguous()
            chain.targets = targets.data_ptr()
        wrong = self._chain(ctypes.byref(self.weights.model), ctypes.byref(self._pass), ctypes.byref(chain))
        if wrong:
            raise FloatingPointError("NaN in the logits") if wrong < 0 else self._unknown(given.ids, wrong)
        return best

    def _unknown(self, ids: Tensor, wrong: int) -> IndexError:
        """Args: wrong: 1 + the index of a token that has no embedding."""
        token = int(ids[wrong - 1])
        return IndexError(f"token id {token} is out of range: the model's embedding has {len(self.own.embed)} rows")

    def _given(self, parts: Sequence[Part], layouts: Sequence[Layout]) -> _Given:
        """Writes into the pass where all it reads lies, of parts in one cache."""
        run, shape, first = self._pass, self._shape, layouts[0]
        run.threads = min(torch.get_num_threads(), usable_cores())
        rows, masks, kept, ids, read = self._rows(parts, layouts)
        if len(self._angles) < read:
            self._angles = self.own.angles.table(self._like, read).float()
        places = None  # the angles of a text's token are those of the number of its slot
        if masks:
            positions = joined([self._inputs.positions(part).expand(part.tokens.shape).reshape(-1) for part in parts])
            places = positions.contiguous()
        run.page_size, run.page_stride, run.slot_stride, run.head_stride = first.strides
        run.quantised = first.keys[0].dtype is torch.int8
        for i, place in enumerate(self._places):
            self._kv[i], self._kv[shape.layers + i] = first.keys[place].data_ptr(), first.values[place].data_ptr()
        targets = None if first.targets is None else joined([own.targets for own in layouts if own.targets is not None])
        run.rows, run.row, run.num_kept, run.kept = len(rows), ctypes.addressof(rows), len(kept), kept.data_ptr()
        run.tokens, run.ids, run.angles = len(ids), ids.data_ptr(), self._angles.data_ptr()
        run.places = None if places is None else places.data_ptr()
        run.targets = None if targets is None else targets.data_ptr()
        return _Given(rows, ids, kept, (masks, places, targets, layouts))

    def _rows(
        self, parts: Sequence[Part], layouts: Sequence[Layout]
    ) -> tuple[ctypes.Array[structures.Row], list[Tensor], Tensor, Tensor, int]:
        """All rows of all parts, the masks whose addresses they hold, which logits are wanted, the ids of all tokens,
        and how many slots there are."""
        rows = (structures.Row * sum([len(part.tokens) for part in parts]))()
        masks, kept, ids = list[Tensor](), list[Tensor](), list[Tensor]()
        index = first = lists = most = 0
        for part, layout in zip(parts, layouts, strict=True):
            (count, width), read, table, mask = part.tokens.shape, part.write.read, layout.table, None
            kept.append(_kept(part.tokens.shape, part.kept[1], first))
            ids.append(part.tokens.reshape(-1))
            if part.nodes is not None:
                mask = self._inputs.ancestors(part, part.nodes)
                masks.append(mask)
            at = 0 if mask is None else mask.data_ptr()
            step = 0 if mask is None or len(mask) == 1 else mask.stride(0) * mask.element_size()
            for i in range(count):
                row = rows[index]
                row.first, row.width, row.read, row.lists = first, width, read, lists
                row.table = table.data_ptr() + i * table.stride(0) * 8
                row.start = part.write.starts[i]
                if mask is not None:
                    row.mask, row.mask_stride = at + i * step, mask.stride(2)
                index, first = index + 1, first + width
                lists += read * (1 if mask is None else width)
            most = max(most, read)
        self._reserve(first, lists, most, self._pass.threads)
        return rows, masks, joined(kept), joined(ids).to(torch.int64).contiguous(), most

    def _reserve(self, tokens: int, lists: int, read: int, threads: int) -> None:
        """Working memory for such a pass, kept for the next one."""
        shape, run = self._shape, self._pass
        need = (max(tokens, self._room[0]), max(lists, self._room[1]), max(read, self._room[2]))
        if need == self._room and threads == self._threads:
            return
        tokens, lists, read = self._room = (need[0], need[1] * 5 // 4, need[2] * 5 // 4)
        self._threads = threads
        wide = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        own = max(max(_QUERIES, shape.heads // shape.kv_heads) * (read + _ROOM), tokens * _ROOM) + _ROOM
        sizes = (shape.hidden, shape.hidden, wide, shape.heads * shape.head_dim, shape.inner)
        self._states = [_floats(tokens * size + _ROOM) for size in sizes]
        run.room_size = tokens * -(-max(sizes) // _UNIT) * _UNIT if self.weights.prepares else 0
        self._states += [_floats(own * threads), _floats(run.room_size * threads)]
        self._words = [torch.empty(size, dtype=torch.int64) for size in (lists, tokens, tokens, tokens, 2 * tokens)]
        run.hidden, run.normed, run.mixed, run.attended, run.acted, run.own, run.room = map(
            Tensor.data_ptr, self._states
        )
        run.seen, run.counts, run.leads, run.row_of, run.groups = map(Tensor.data_ptr, self._words)
        run.own_size = own


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


@lru_cache(maxsize=256)
def _kept(shape: tuple[int, int], columns: int, first: int) -> Tensor:
    """The last `columns` of `[rows, width]` tokens, of which the first is number `first` of the pass."""
    rows, width = shape
    index = torch.arange(first, first + rows * width).view(rows, width)
    return index[:, width - columns :].flatten().contiguous()
