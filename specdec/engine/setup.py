"""What an engine is made of: its drafters by name, and the pool that holds everybody's K/V."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from specdec.arguments import Draft, make_drafter
from specdec.drafters import Drafter, FallbackGuard, ModelDrafter
from specdec.engine.params import PLAIN
from specdec.kv import UnsupportedArgumentError
from specdec.kv.pool import KVPool
from specdec.kv.pool_size import check_pages
from specdec.kv.quantised import Quantised
from specdec.kv.support import num_cache_layers
from specdec.ranks.fitting import refuse_several
from specdec.target import TARGET

DEFAULT_BYTES = 512 << 20
"""The pool's size when neither `num_bytes` nor `num_pages` is given."""


_DEEPEST = 8
"""Levels of lists and drafters in which a drafter's models are looked for."""


class Pooled(NamedTuple):
    """names: under which of the pool's models each drafter's K/V is kept, where it keeps any."""

    pool: KVPool
    names: dict[str, str]


def named_drafters(
    target: PreTrainedModel, draft: Draft, k: int | None, tree: Any, more: Mapping[str, Draft]
) -> dict[str, FallbackGuard | None]:
    """All drafters by name, the default first; plain decoding is always among them.

    Raises:
        UnsupportedArgumentError: a name twice, or a target that several ranks hold.
    """
    refuse_several(target, "Engine")
    named: dict[str, Drafter | None] = {}
    first = make_drafter(draft, target, k, tree)
    named[PLAIN if first is None else first.name] = first
    for name, other in more.items():
        if name in named or name == PLAIN:
            raise UnsupportedArgumentError(f"drafters: the name {name!r} is taken; give this one another")
        named[name] = make_drafter(other, target, None, None)
    named.setdefault(PLAIN, None)
    return {name: None if drafter is None else FallbackGuard(drafter) for name, drafter in named.items()}


def make_pool(
    target: PreTrainedModel,
    drafters: Mapping[str, FallbackGuard | None],
    num_bytes: int | None,
    num_pages: int | None,
    page_size: int,
    quantised: Quantised | None = None,
) -> Pooled:
    """One pool for the target and every drafter that keeps K/V. Drafters on one model share its K/V.

    Raises:
        UnsupportedArgumentError: two sizes, a size in bytes with a drafter whose K/V cannot be measured, or beyond the
            memory there is.
    """
    if num_bytes is not None and num_pages is not None:
        raise UnsupportedArgumentError("expected num_bytes or num_pages, got both")
    layers, models, names = {TARGET: num_cache_layers(target)}, {TARGET: target}, {}
    owner: dict[int, str] = {}
    borrows: dict[str, str] = {}
    for name, guard in drafters.items():
        if guard is None or not guard.num_cache_layers:
            continue
        if guard.shares_target_kv:
            names[name] = f"draft {name}"
            layers[names[name]] = guard.num_cache_layers
            borrows[names[name]] = TARGET
            continue
        model = guard.inner.model if isinstance(guard.inner, ModelDrafter) else None
        if model is None and num_pages is None:
            raise UnsupportedArgumentError(
                f"num_bytes: the K/V of drafter {name!r} ({type(guard.inner).__name__}) cannot be measured; give "
                "num_pages instead"
            )
        own = f"draft {name}" if model is None else owner.setdefault(id(model), f"draft {name}")
        names[name] = own
        layers[own] = guard.num_cache_layers
        if model is not None:
            models[own] = model
    if num_pages is not None:
        check_pages(models, num_pages, page_size, quantised)
        return Pooled(KVPool(layers, num_pages, page_size, borrows=borrows, quantised=quantised), names)
    num_bytes = DEFAULT_BYTES if num_bytes is None else num_bytes
    return Pooled(KVPool.sized(models, num_bytes, page_size, borrows, quantised), names)


def models_of(drafter: Drafter | None) -> list[nn.Module]:
    """The models a drafter holds K/V of, by whatever name."""
    inner = drafter.inner if isinstance(drafter, FallbackGuard) else drafter
    return [] if inner is None or inner.shares_target_kv else list(_modules(vars(inner), 0))


def _modules(thing: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(thing, nn.Module):
        yield thing
    elif depth > _DEEPEST:
        return
    elif isinstance(thing, Drafter):
        yield from _modules(vars(thing), depth + 1)
    elif isinstance(thing, Mapping):
        yield from _modules(list(thing.values()), depth + 1)
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from _modules(part, depth + 1)
