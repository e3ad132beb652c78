"""Linear layers for a handful of rows on a CPU: a verify pass of a few nodes should cost what one token costs.

`F.linear` with few rows goes through a GEMM whose tiles are cut for many rows; with 2-8 rows it can cost 2-3 times
the one-row product although both read the same weights once, with 12-48 rows 1.3-1.5 times what it need.
`(W @ x.T).T` puts the long side first and keeps the rows together. Which form wins depends on shape, library, threads
and machine, so it is measured, once per process. The forms differ in the last bits, as any two kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.kv.overlap import overlapping

EXACT_ROWS = 8
"""Up to so many rows (batch x nodes) every count is measured by itself; above, the next of `_ROUNDED`."""
_ROUNDED = (12, 16, 24, 32, 48, 64)
MAX_ROWS = _ROUNDED[-1]
"""Most rows another form than F.linear is considered for."""

_MIN_WEIGHTS = 1 << 15
"""Smaller layers are all call overhead; they are left alone."""
_CLEAR_GAIN = 0.9
"""Another form must take at most this fraction of F.linear's time: ties go to the form everyone else uses."""
_TRIALS = 9
"""Timings of a form, at least; over the layers of one shape in turn, as a pass meets them."""
_CACHE_BYTES = 32 << 20
"""Before they begin so many bytes of the model's other weights are read: in a pass weights come from memory."""

Form = Callable[[Tensor, Tensor], Tensor]

_own_form: ContextVar[bool] = ContextVar("specdec_own_linears", default=False)


@contextmanager
def own_linears() -> Iterator[None]:
    """Inside the block every layer computes `F.linear`, also where a drafter shares the target's layers."""
    token = _own_form.set(True)
    try:
        yield
    finally:
        _own_form.reset(token)


def rows_last(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)` as `(weight @ x.T).T`; x `[..., in]`, weight `[out, in]`."""
    flat = x.reshape(-1, x.shape[-1])
    return torch.mm(weight, flat.t()).t().view(*x.shape[:-1], weight.shape[0])


def doubled(x: Tensor, weight: Tensor) -> Tensor:
    """`rows_last` of one row written twice: two rows use all threads where one does not."""
    flat = x.reshape(1, -1).expand(2, -1).contiguous()
    return torch.mm(weight, flat.t())[:, 0].view(*x.shape[:-1], weight.shape[0])


class FormTable:
    """The fastest form per (in, out, rows, threads), measured at most once per process, on the model's own weights."""

    def __init__(self) -> None:
        self._best: dict[tuple[int, int, int, int], Form] = {}

    def best(self, weight: Tensor, others: Sequence[Tensor], rows: int) -> Form:
        """The form to use for `rows` rows.

        Args:
            weight: `[out, in]`. others: the model's weights: those of its shape are timed with it, the rest is read
                to push them out of the caches.
        """
        rows = rows if rows <= EXACT_ROWS else next(size for size in _ROUNDED if size >= rows)
        key = (weight.shape[1], weight.shape[0], rows, torch.get_num_threads())
        if key not in self._best:
            self._best[key] = _measure(weight, others, rows)
        return self._best[key]

    def names(self) -> dict[str, str]:
        """What was chosen so far, for a file: "in,out,rows,threads" to the name of a form."""
        return {",".join(map(str, key)): form.__name__ for key, form in self._best.items()}

    def adopt(self, names: Mapping[str, str]) -> None:
        """Choose as an earlier process did (see `names`), instead of by a measurement of one's own: then every sum is
        taken in the same order. A form this version does not know is measured anew."""
        for key, name in names.items():
            if name in _NAMED:
                sizes = tuple(map(int, key.split(",")))
                assert len(sizes) == 4
                self._best[sizes] = _NAMED[name]


_NAMED: dict[str, Form] = {form.__name__: form for form in (F.linear, rows_last, doubled)}
FORMS = FormTable()


def _measure(weight: Tensor, others: Sequence[Tensor], rows: int) -> Form:
    x = torch.ones(rows, weight.shape[1], dtype=torch.float32, device="cpu")
    forms: list[Form] = [F.linear, rows_last]
    if rows == 1:
        forms.append(doubled)
    alike, evict = [weight], list[Tensor]()
    for other in others:
        if other.shape == weight.shape:
            if len(alike) < _TRIALS and other is not weight:
                alike.append(other)
        elif sum(kept.nbytes for kept in evict) < _CACHE_BYTES:
            evict.append(other)
    times: list[list[float]] = [[] for _ in forms]
    for _ in range(-(-_TRIALS // len(alike))):
        for i, form in enumerate(forms):
            for other in evict:
                other.sum()
            for own in alike:
                start = perf_counter()
                form(x, own)
                times[i].append(perf_counter() - start)
    typical = [sorted(measured)[len(measured) // 3] for measured in times]
    fastest = min(range(len(forms)), key=lambda i: typical[i])
    return forms[fastest] if typical[fastest] < _CLEAR_GAIN * typical[0] else F.linear


@contextmanager
def few_row_linears(model: nn.Module) -> Iterator[None]:
    """Inside the block, float32 CPU `nn.Linear` layers of `model` use their best form; afterwards their own again.

    Subclasses (quantised layers), layers with a bias or with a wrapped forward (offloading hooks) are left alone.
    """
    with overlapping(("linear layers", id(model)), lambda: _few_row_linears(model)):
        yield


@contextmanager
def _few_row_linears(model: nn.Module) -> Iterator[None]:
    layers = [layer for layer in model.modules() if _is_plain(layer)]
    weights = [layer.weight.detach() for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = _forward(layer, weights)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def is_dense(weight: Any) -> TypeGuard[Tensor]:
    """Whether a weight is the numbers it holds: torch's own strided tensor. A subclass (torchao, quanto, bitsandbytes,
    a distributed tensor) has products of its own, and only its module knows them."""
    return type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided and not weight.is_quantized


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    # nn.Linear declares `bias: Tensor` although it is None without one
    if type(layer) is not nn.Linear or cast("Tensor | None", layer.bias) is not None or "forward" in layer.__dict__:
        return False
    if (
        layer._forward_pre_hooks or layer._backward_hooks
    ):  # old weight_norm, spectral_norm and prune set the weight there
        return False
    return is_dense(layer.weight) and _has_forms(layer.weight)


def _has_forms(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= _MIN_WEIGHTS


def _forward(layer: nn.Linear, weights: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    weight, features_in = layer.weight, layer.weight.shape[1]
    forms: dict[int, Form] = {}

    def forward(x: Tensor) -> Tensor:
        if _own_form.get():
            return F.linear(x, weight)
        rows = x.numel() // features_in
        form = forms.get(rows)
        if form is None:
            form = forms[rows] = few_row_form(weight, weights, rows)
        return form(x, weight)

    return forward


def few_row_form(weight: Tensor, weights: Sequence[Tensor], rows: int) -> Form:
    """How to multiply `rows` rows with one of a model's `weights`: what `few_row_linears` would make its layer do."""
    return FORMS.best(weight, weights, rows) if 0 < rows <= MAX_ROWS and _has_forms(weight) else F.linear
