"""Packed copies of those float weights of a model that lie on a grid of few bits: the same numbers in fewer bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify import quantised
from specdec.verify.grids import exactly
from specdec.verify.numbers_seen import Summed
from specdec.verify.packed import Packed
from specdec.verify.passes.layers import Linear, Product
from specdec.verify.passes.parameters import Parameters
from specdec.verify.weights import Weights

VARIABLE = "SPECDEC_PACKED"
"""Environment variable: "0" reads every weight as it is stored."""


class _Copies(NamedTuple):
    """by_address: the copies, by where the numbers lie that they are of. watch, numbers: over what they were made of;
    watch is None where there are none, whatever becomes of the weights."""

    by_address: Mapping[int, Packed]
    watch: Weights | None
    numbers: Sequence[Summed]

    @property
    def hold(self) -> bool:
        """Whether they are still those of the weights: every number is looked at."""
        return self.watch is None or (self.watch.same() and all(each.same() for each in self.numbers))


_known: WeakKeyDictionary[PreTrainedModel, _Copies] = WeakKeyDictionary()
"""Of models that are in use. No value holds its model."""


def packed_copies(model: PreTrainedModel, own: Parameters) -> Mapping[int, Packed]:
    """Exact packed copies of linear weights of `model`, by the addresses of their numbers.

    They are searched once, and again when the model has changed, in whatever way; not where there were none: who trains
    a model would have it searched for nothing at every step.

    Args:
        own: its parameters, as they are now.

    Raises:
        UnsupportedArgumentError: the environment asks for something else than "0" or "1".
    """
    asked = os.environ.get(VARIABLE, "1")
    if asked not in ("0", "1"):
        raise UnsupportedArgumentError(f"expected {VARIABLE} to be 0 or 1, got {asked!r}")
    if asked == "0":
        return {}
    known = _known.get(model)
    if known is None or not known.hold:
        watch = Weights(model.children())  # before the search: what is written during it is seen by the next look
        found = {weight.data_ptr(): (weight, packed) for weight, packed in _found(own)}
        by_address = {address: packed for address, (_, packed) in found.items()}
        numbers = [Summed(weight) for weight, _ in found.values()]
        known = _known[model] = _Copies(by_address, watch if found else None, numbers)
    return known.by_address


def forget(model: PreTrainedModel) -> None:
    """Read and search its weights again before the next pass: they were changed in a way that no look sees."""
    _known.pop(model, None)
    quantised.forget(model)


def _found(own: Parameters) -> Iterator[tuple[Tensor, Packed]]:
    """Some weights on a grid are in the first layer or the one in the middle; else there are none."""
    of_layers = [layer.products for layer in own.layers]
    first = [*of_layers[0], *of_layers[len(of_layers) // 2]]
    found = list(_on_grids(first))
    yield from found
    if found:
        yield from _on_grids([own.head, *(product for layer in of_layers for product in layer if product not in first)])


def _on_grids(products: Sequence[Product]) -> Iterator[tuple[Tensor, Packed]]:
    for product in products:
        if isinstance(product, Linear):
            packed = exactly(product.weight)
            if packed is not None:
                yield product.weight, packed
