"""The lean copy of a target: made once, and again when the target's weights have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.drafters.self_draft.calibration import Fit, Inputs, fit_in_order, own_texts
from specdec.drafters.self_draft.forms import Form
from specdec.drafters.self_draft.gptq import gptq
from specdec.drafters.self_draft.mirror import (
    decoder_layers,
    device_of,
    keep_layers,
    mirrored,
    named_weighted,
    weight_of,
)
from specdec.drafters.self_draft.sparse import input_sizes, keep_neurons, prune
from specdec.drafters.self_draft.stored import store, stored, stored_path
from specdec.kv.errors import UnsupportedArgumentError, UnsupportedModelError
from specdec.kv.support import check_model, text_config
from specdec.verify.first_use import first_use
from specdec.verify.packed import Packed, PackedLinear
from specdec.verify.quantised import packed_of
from specdec.verify.weights import Weights, fingerprint

GROUP = 64
"""Neighbours in a row that share a scale."""
_KNOWN = ("torch.", "transformers.", "specdec.")
OUTER = (1 / 8, 1 / 10)
"""Shares of the decoder layers, the first and the last ones, that "int4" keeps in 8 bits."""


class LeanCopy:
    """A cheaper model over the target's parameters.

    Where the target's weights have changed, the copy is made again: packed anew (by plain rounding where a calibration
    would have to be repeated), with the same neurons or by the same sizes of inputs as before.

    Attributes:
        model: the copy; the same object for good, its modules are exchanged.
        num_made: how often it was made.
    """

    def __init__(self, target: PreTrainedModel, form: Form, calibration: Sequence[Tensor] | None = None):
        self.target = check_model(target, "target")
        self.form = form
        self._texts = None if calibration is None else _checked(calibration)
        self._sizes: dict[str, Tensor] = {}
        self.model = self._made(first=True)
        self._try()
        self.num_made = 1
        self._weights = Weights([self.target])

    @property
    def num_bytes(self) -> int:
        """Of the weights that are the copy's own."""
        shared = {tensor.data_ptr() for tensor in _tensors(self.target)}
        return sum(tensor.nbytes for tensor in _tensors(self.model) if tensor.data_ptr() not in shared)

    def refresh(self) -> None:
        """Make it again if the target's weights have changed since."""
        if self._weights.changed():
            vars(self.model).update(vars(self._made(first=False)))
            self.num_made += 1

    @torch.no_grad()
    def _try(self) -> None:
        """One pass, where modules are neither torch's nor transformers': they may ask a layer for what it has not."""
        if all(type(part).__module__.startswith(_KNOWN) for part in self.model.modules()):
            return
        device: Any = self.model.get_input_embeddings().weight.device
        try:
            self.model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
        except Exception as error:
            raise UnsupportedModelError(
                f"draft 'self:{self.form.name}': expected modules that work in a copy of {type(self.model).__name__}, "
                f"got some that do not ({type(error).__name__}: {error}). Merge adapters into the weights, or draft "
                "with another form, 'ngram' or a model"
            ) from error

    @torch.no_grad()
    def _made(self, first: bool) -> PreTrainedModel:
        model, form = mirrored(self.target), self.form
        if form.kind in ("exit", "skip"):
            keep_layers(model, form.kept_layers(int(text_config(model).num_hidden_layers)))
            return model
        if not named_weighted(model):
            raise UnsupportedModelError(
                f"draft 'self:{form.name}': {type(model).__name__} has no linear layers whose weights can be read"
            )
        if form.kind == "int8":
            put(model, {path: rounded(layer, 8) for path, layer in named_weighted(model).items()})
        elif form.kind == "int4":
            put(model, self._in_four_bits(model, first))
        else:
            if first:
                with first_use():
                    self._sizes = input_sizes(model, self._calibration())
            (keep_neurons if form.kind == "hot" else prune)(model, form.number, self._sizes)
        return model

    def _calibration(self) -> Sequence[Tensor]:
        return list(own_texts(self.target)) if self._texts is None else self._texts

    def _in_four_bits(self, model: PreTrainedModel, calibrate: bool) -> dict[str, Packed]:
        """All linear layers in 4 bits but the head and those of the outer decoder layers, which have 8."""
        layers, outer = named_weighted(model), _outer(model)
        kind = {"form": "int4", "group": GROUP, "outer": OUTER}
        key = {**kind, "weights": fingerprint(self.target, whole=True), "texts": _digest(self._texts)}
        path = stored_path(key)
        found = None if path is None else stored(path)
        if found is not None and {name: tuple(weight_of(layer).shape) for name, layer in layers.items()} == {
            name: packed.shape for name, packed in found.items()
        }:
            return found
        packed = {name: rounded(layer, 8 if layer in outer else 4) for name, layer in layers.items()}
        if not calibrate:
            return packed

        def fit(name: str, layer: Any, given: Inputs) -> Tensor:
            packed[name] = gptq(weight_of(layer), given, 4, GROUP)
            return packed[name].dequantized()

        fits: dict[nn.Module, Fit] = {
            layer: partial(fit, name, layer) for name, layer in layers.items() if layer not in outer
        }
        with first_use():
            fit_in_order(model, self._calibration(), fits)
        if path is not None:
            store(path, packed)
        return packed


def _outer(model: PreTrainedModel) -> set[nn.Module]:
    """The head and the linear layers of the first and last decoder layers: where few bits cost most acceptance."""
    layers = decoder_layers(model)
    first, last = (round(share * len(layers)) for share in OUTER)
    edges = [*layers[:first], *layers[len(layers) - last :]]
    return {model.get_output_embeddings(), *(part for layer in edges for part in layer.modules())}


def rounded(layer: Any, bits: int) -> Packed:
    """A linear layer's weight, every number rounded to its nearest code."""
    own = packed_of(layer)
    if own is not None and own.bits <= bits:  # the target's own codes: nothing is rounded, and 8 bits take no memory
        return own
    whole_rows = bits == 8 and device_of(layer).type == "cuda"  # torch's own product there takes no groups
    return Packed.rounded(weight_of(layer), bits, None if whole_rows else GROUP, symmetric=bits == 8)


def put(model: PreTrainedModel, weights: dict[str, Packed]) -> None:
    """Exchange linear layers, by their paths, for packed ones."""
    for path, packed in weights.items():
        parent, _, name = path.rpartition(".")
        table = model.get_submodule(parent)._modules
        layer: Any = table[name]
        packed = _moved(packed, device_of(layer))
        gpu = (
            device_of(layer).type == "cuda"
        )  # on a CPU activations are rounded, too: 8 bits draft a tenth faster, 4 bits a third
        table[name] = PackedLinear(packed, layer.bias, integer=not gpu, torch_products=gpu).eval()


def _moved(packed: Packed, device: torch.device) -> Packed:
    if packed.device == device:
        return packed
    offsets = None if packed.offsets is None else packed.offsets.to(device)
    return Packed(packed.bits, packed.shape, packed.group, packed.codes.to(device), packed.scales.to(device), offsets)


def _tensors(model: nn.Module) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())


def _checked(texts: Sequence[Tensor]) -> list[Tensor]:
    if not texts or not all(
        isinstance(text, Tensor) and text.dim() == 1 and text.dtype == torch.int64 and len(text) for text in texts
    ):
        raise UnsupportedArgumentError(
            "calibration: expected some texts, each int64 [tokens] with at least one token, got "
            f"{[tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__ for text in texts]}"
        )
    return list(texts)


def _digest(texts: Sequence[Tensor] | None) -> str | None:
    if texts is None:
        return None
    return hashlib.sha256(repr([text.tolist() for text in texts]).encode()).hexdigest()
