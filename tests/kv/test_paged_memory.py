"""Pages cost what the tokens in them cost: peak memory, shared prompts, nothing left behind after faults."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import models
import pytest
import torch
from pool_calls import LAYERS, keys_of, prefill, write

import specdec
from specdec.drafters import ModelDrafter
from specdec.drafters.guard import DrafterFaultWarning
from specdec.kv import KVPool, OutOfPagesError, PagedKVCache
from specdec.kv.write import Write
from specdec.loop import DecodeLoop


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, seen: list[KVPool], peak: dict[str, float]) -> Iterator[None]:
    """Notes, at the end of every pass, the bytes held and the tokens they are held for."""
    original = PagedKVCache.writing

    @contextmanager
    def writing(self: PagedKVCache, *args: Any, **kwargs: Any) -> Iterator[Write]:
        with original(self, *args, **kwargs) as write:
            yield write
        pool = self.pool
        if pool not in seen:
            seen.append(pool)
        tokens = sum(max(sequence.filled.values()) for sequence in pool.sequences.values())
        if pool.num_held_pages >= peak.get("pages", 0):
            peak.update(pages=pool.num_held_pages, tokens=tokens, rows=len(pool.sequences), page_bytes=pool.page_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(PagedKVCache, "writing", writing)
        yield


@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_peak_memory_is_that_of_the_tokens_held(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of very different lengths: a contiguous batch pays for its longest row, pages for what is there."""
    target, draft = models.target("llama-gqa", "fp64", 0), models.draft("near", "llama-gqa", "fp64", 0)
    ids, mask = models.prompts((150, 3, 5, 40, 2, 9), models.VOCAB, 3, 0)
    call: dict[str, Any] = dict(
        input_ids=ids, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=None
    )
    seen: list[KVPool] = []
    peak: dict[str, float] = {}
    spec = specdec.Speculator(target, draft, tree=(3, 2, 1), cache="paged", page_size=page_size)
    with watched(monkeypatch, seen, peak):
        spec.generate(**call, pad_token_id=models.PAD)
    (pool,) = seen
    per_token = peak["page_bytes"] / page_size
    assert pool.peak_bytes_held == peak["pages"] * peak["page_bytes"]
    assert pool.peak_bytes_held <= 1.1 * peak["tokens"] * per_token + peak["rows"] * peak["page_bytes"]
    assert spec.report is not None
    assert spec.report.kv_bytes == pool.num_bytes() <= 1.1 * (pool.peak_bytes_held + 2 * pool.page_bytes)
    contiguous = specdec.Speculator(target, draft, tree=(3, 2, 1))
    contiguous.generate(**call, pad_token_id=models.PAD)
    assert contiguous.report is not None
    assert spec.report.kv_bytes < 0.6 * contiguous.report.kv_bytes


def test_samples_of_one_prompt_share_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = models.target("llama-gqa", "fp64", 0), models.draft("near", "llama-gqa", "fp64", 0)
    ids, _ = models.prompts((100,), models.VOCAB, 3, 0)
    seen: list[KVPool] = []
    spec = specdec.Speculator(target, draft, k=3, cache="paged", page_size=4)
    with watched(monkeypatch, seen, {}):
        spec.generate(ids, num_return_sequences=16, max_new_tokens=6, do_sample=True, seed=1, eos_token_id=None)
    # 99 tokens of the prompt are cached: 24 full pages for all; behind them each row has up to 3 of its own.
    assert seen[0].peak_bytes_held <= (25 + 16 * 3) * seen[0].page_bytes
    assert seen[0].peak_bytes_held < 0.2 * 16 * 26 * seen[0].page_bytes


def _random_life(pool: KVPool, random_: random.Random, rounds: int) -> None:
    """Requests that come, draft, fail in the middle of passes, run out of pages and go; then all are closed."""
    live: dict[int, list[float]] = {}
    faults = {"pass": 0, "pages": 0}
    for _ in range(rounds):
        action = random_.choice(["open", "fork", "close", "prefill", "draft", "fail", "fail", "forget"])
        if action == "open" or not live:
            live[pool.open()] = []
            continue
        row = random_.choice(list(live))
        value = random_.random()
        try:
            if action == "fork":
                live[pool.fork(row)] = list(live[row])
            elif action == "close":
                pool.close(row, range(pool.length(row)) if random_.random() < 0.5 else ())
                del live[row]
            elif action == "prefill":
                count = random_.randint(1, 9)
                prefill(pool, row, pool.length(row) + count, value)
                live[row] += [value] * count
            elif action == "draft":
                write(pool, "target", [row], [pool.length(row)], value, 4)
                PagedKVCache(pool, [row]).commit([[0, 2]])
                live[row] += [value] * 2
            elif action == "forget":
                PagedKVCache(pool, [row]).forget("draft")
            else:
                with (
                    pytest.raises(ZeroDivisionError),
                    PagedKVCache(pool, [row]).writing("target", [pool.length(row)], 5),
                ):
                    raise ZeroDivisionError
                faults["pass"] += 1
                if random_.random() < 0.5:
                    pool.rollback([row])
        except OutOfPagesError:
            faults["pages"] += 1
        pool.check_integrity()
    for row, values in live.items():
        if values:
            assert keys_of(pool, row) == values
        pool.close(row)
    assert min(faults.values()) > 0


@pytest.mark.parametrize("seed", range(4))
def test_no_page_is_lost_to_faults(seed: int) -> None:
    pool = KVPool(LAYERS, num_pages=24, page_size=3)
    _random_life(pool, random.Random(seed), 300)
    assert (pool.num_held_pages, pool.num_free_pages) == (0, 24)
    assert not pool.sequences
    pool.check_integrity()


def test_a_lost_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.kv.pages.PageAllocator.release", lambda self, page: None)
    with pytest.raises(specdec.SpecdecError, match="pool integrity"):
        _random_life(KVPool(LAYERS, num_pages=24, page_size=3), random.Random(0), 300)


class _Moody(ModelDrafter):
    """Raises, or stores NaN, every third time."""

    calls = 0

    def propose(self, budget: Any, uniforms: Any) -> Any:
        type(self).calls += 1
        tree = super().propose(budget, uniforms)
        if self.calls % 3 == 1:
            assert self._session is not None
            storage = self._session.cache.pool.stores["draft"]  # type: ignore[attr-defined]
            for keys in storage.keys:
                keys[1:] = float("nan")
            raise RuntimeError("bad mood")
        return tree


def test_a_drafter_that_fails_costs_neither_text_nor_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    target: Any = models.target("llama-gqa", "fp64", 0)
    ids, mask = models.prompts((6, 2, 9), models.VOCAB, 3, 0)
    call: dict[str, Any] = dict(
        input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=models.PAD
    )
    plain = target.generate(**call)
    drafter = _Moody(models.draft("near", "llama-gqa", "fp64", 0), k=3)
    spec = specdec.Speculator(target, drafter, cache="paged", page_size=4)
    pools: list[KVPool] = []
    original = DecodeLoop.step

    def step(self: DecodeLoop) -> Any:
        traced = original(self)
        assert isinstance(self.cache, PagedKVCache)
        pools[:] = [self.cache.pool]
        self.cache.pool.check_integrity()
        return traced

    monkeypatch.setattr(DecodeLoop, "step", step)
    with pytest.warns(DrafterFaultWarning):
        out: Any = spec.generate(**call)
    assert torch.equal(out, plain)
    assert spec.report is not None
    assert spec.report.num_drafter_faults > 1
    for sequence in list(pools[0].sequences):
        pools[0].close(sequence)
    assert pools[0].num_held_pages == 0
