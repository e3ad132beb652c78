"""Have models changed since something was computed with them? Found by a look that costs next to nothing."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from specdec.verify.numbers_seen import INTEGERS
from specdec.verify.packed import PackedLinear
from specdec.verify.passes.linear import is_dense
from specdec.verify.quantised import inner_tensors, is_quantised

SAMPLES = 16
"""Numbers of each weight that are compared themselves: what is written past torch's counts shows in them."""
SHARE = 0.01
"""Part of the time that looks may take where no request is about to be given K/V of earlier ones."""
PATIENCE = 8
"""Looks in a row that may find a change; then the models are taken to change in every pass, and nothing is shared."""

_VALUES = 32
"""Values of each weight that its fingerprint looks at."""
_MODULE = frozenset(vars(nn.Module()))
"""What every module has, whatever it computes."""
_STOCK = ("torch.", "transformers.")
_PLAIN = (str, int, float, complex, bool, bytes, type(None))
_VERSION = attrgetter("_version")


class Weights:
    """Watches everything that decides what some models compute.

    A look compares which modules, parameters, buffers and hooks there are (by identity), where their numbers lie,
    torch's count of writes to them, some of the numbers of each (an adapter merged through `.data` and an
    optimiser's fused kernels write without counting), and the plain attributes of modules that are neither torch's nor
    `transformers`' own (an adapter's name and scale, whether it is merged or off). Not seen is a write through `.data`,
    or a view of it, that leaves all those numbers as they were, and one to a weight that is not there between passes
    (offloading); nor another `forward` set on a module, nor another number in an attribute of torch's or
    `transformers`' own (an attention's scale, a norm's epsilon).

    Attributes:
        next_look: when looking again will have taken no more than `SHARE` of the time (`perf_counter`).
        steady: False after `PATIENCE` changes in a row: no K/V can be relied on, `changed` says no from then on.
    """

    def __init__(self, models: Iterable[nn.Module]):
        self._models = list(models)
        self._streak = 0
        self.steady = True
        self.next_look = 0.0
        self._look()

    def changed(self) -> bool:
        """Has anything changed since the last call (or since this was made)?"""
        if not self.steady:
            return False
        start = perf_counter()
        same = self.same()
        now = perf_counter()
        self.next_look = now + (now - start) / SHARE
        if same:
            self._streak = 0
            return False
        self._streak += 1
        self.steady = self._streak < PATIENCE
        self._look()
        return True

    def _look(self) -> None:
        modules = list({id(part): part for model in self._models for part in model.modules()}.values())
        here = [part for part in modules if not _comes_and_goes(part)]
        tables: list[dict[Any, Any]] = [part._modules for part in modules]
        tables += [table for part in modules for table in (part._forward_hooks, part._forward_pre_hooks)]
        tables += [table for part in here for table in (part._parameters, part._buffers)]
        self._empty = [table for table in tables if not table]
        self._tables = [table for table in tables if table]
        self._count = sum(map(len, self._tables))
        self._members = list(self._entries())
        tensors = [tensor for part in here for tensor in _tensors((part._parameters, part._buffers))]
        self._counted = [tensor for tensor in tensors if not tensor.is_inference() and _works(_VERSION, tensor)]
        self._writes = sum(map(_VERSION, self._counted))
        self._addressed = [tensor for tensor in tensors if _works(Tensor.data_ptr, tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._addressed))
        self._samples = _samples(tensor for part in here for tensor in _tensors((part._parameters, part._buffers)))
        self._numbers = list(map(torch.cat, self._samples))
        own = [vars(part) for part in modules if not type(part).__module__.startswith(_STOCK)]
        names = [[name for name, value in state.items() if name not in _MODULE and _is_plain(value)] for state in own]
        self._getters = [itemgetter("training", *mine) for mine in names]
        self._states = own
        self._values = [(len(state), copy.deepcopy(get(state))) for state, get in zip(own, self._getters, strict=True)]

    def same(self) -> bool:
        """Is all as it was at the last look of `changed`? Takes no notice of what it finds."""
        if any(self._empty) or sum(map(len, self._tables)) != self._count:
            return False
        if not all(map(is_, self._entries(), self._members)):
            return False
        if sum(map(_VERSION, self._counted)) != self._writes:
            return False
        if list(map(Tensor.data_ptr, self._addressed)) != self._addresses:
            return False
        if not all(map(torch.equal, map(torch.cat, self._samples), self._numbers)):
            return False
        try:
            now = [(len(state), get(state)) for state, get in zip(self._states, self._getters, strict=True)]
            return now == self._values
        except (KeyError, RuntimeError):  # an attribute was deleted, or holds something now that has no plain equality
            return False

    def _entries(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._tables))


def fingerprint(model: nn.Module, whole: bool = False) -> str:
    """A few values of every weight, hashed: for what is kept of a model beyond this process.

    Args:
        whole: all numbers count, by the sum of their bits: weights are read once.
    """
    digest = hashlib.sha256()
    for name, weight in _weights(model):
        digest.update(name.encode())
        for part in _numbers(weight.detach()):
            some = part.flatten()[:: max(1, part.numel() // _VALUES)][:_VALUES]
            digest.update(some.double().cpu().numpy().tobytes())
            if whole:
                digest.update(str(_sum_of_bits(part)).encode())
    return digest.hexdigest()[:24]


def _sum_of_bits(numbers: Tensor) -> int:
    """The sum of all numbers' bits, taken as integers of their width, modulo 2^64."""
    kind = INTEGERS.get(numbers.element_size())
    return 0 if kind is None else int(numbers.contiguous().view(kind).sum(dtype=torch.int64))


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for name, part in model.named_modules():
        if isinstance(part, PackedLinear) or is_quantised(part):
            yield from part.named_buffers(name)


def _numbers(weight: Tensor) -> Iterator[Tensor]:
    """The dense tensors a weight consists of: itself, or those within a quantised one."""
    if weight.is_meta:
        return
    if is_dense(weight):
        yield weight
    elif hasattr(weight, "__tensor_flatten__"):
        for part in inner_tensors(weight):
            yield from _numbers(part)
    elif is_dense(weight.data):  # bitsandbytes: packed numbers
        yield weight.data


def _comes_and_goes(part: nn.Module) -> bool:
    """Are its weights brought in for every pass (offloading)?"""
    return any(tensor.device.type == "meta" for tensor in part.parameters(recurse=False))


def _tensors(tables: Sequence[Mapping[str, Tensor | None]]) -> Iterator[Tensor]:
    """The tensors of these tables; of those that are made of others (quantised weights), the others."""
    for tensor in chain.from_iterable(table.values() for table in tables):
        if tensor is not None:
            yield from inner_tensors(tensor)


def _works(question: Callable[[Tensor], int], tensor: Tensor) -> bool:
    try:
        question(tensor)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _samples(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Views of some numbers of each tensor, as integers of their width (NaN is not equal to itself): by place."""
    found: dict[tuple[torch.device, int], list[Tensor]] = {}
    for tensor in tensors:
        kind = INTEGERS.get(tensor.element_size())
        if tensor.numel() == 0 or kind is None or tensor.layout != torch.strided or not tensor.is_contiguous():
            continue
        flat = tensor.detach().view(-1)
        step = max(1, -(-len(flat) // SAMPLES))
        found.setdefault((tensor.device, tensor.element_size()), []).append(flat[step // 2 :: step].view(kind))
    return list(found.values())


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN) or (
        isinstance(value, (list, tuple, set, frozenset)) and all(map(_is_plain, value))
    )
