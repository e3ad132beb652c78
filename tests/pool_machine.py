"""A KV pool and dicts of lists, driven through random histories by the same calls."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_model import DIM, HEADS, LAYERS, PROMPTS, Row, Text, Values, on_rows

from specdec.kv import KVPool, OutOfPagesError, PagedKVCache


class PoolMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([3, 2, 1, 7]),
        room=st.integers(12, 90),
        first=st.lists(PROMPTS, min_size=1, max_size=3),
    )
    def start(self, page_size: int, room: int, first: list[Text]) -> None:
        self.pool = KVPool(LAYERS, num_pages=-(-room // page_size), page_size=page_size)
        self.rows: dict[int, Row] = {}
        self.values = Values()
        self.published: set[Text] = set()
        for prompt in first:
            self.open(prompt)

    @precondition(lambda self: len(self.rows) < 6)
    @rule(prompt=PROMPTS)
    def open(self, prompt: Text) -> None:
        found = self.pool.match_prefix(prompt)
        number = self.pool.open(prompt)
        assert (self.pool.length(number), found % self.pool.page_size) == (found, 0)
        assert found == 0 or prompt[:found] in self.published
        row = Row(prompt, found)
        for name in LAYERS:
            held = self.pool.filled(number, name)
            assert held <= found
            row.slots[name] = [prompt[: i + 1] for i in range(held)]
        self.rows[number] = row

    @precondition(lambda self: 0 < len(self.rows) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        number, row = self._pick(data)
        copy = self.pool.fork(number)
        slots = {name: list(held) for name, held in row.slots.items()}
        self.rows[copy] = Row(row.wanted, row.length, slots, list(row.nodes), row.places)
        assert self.pool.sequence(copy).pages == self.pool.sequence(number).pages

    @on_rows(publish=st.booleans())
    def close(self, data: st.DataObject, publish: bool) -> None:
        number, row = self._pick(data)
        if publish:
            self._publish(number, row)
        self.pool.close(number, row.text if publish else ())
        del self.rows[number]

    @on_rows()
    def publish(self, data: st.DataObject) -> None:
        self._publish(*self._pick(data))

    def _publish(self, number: int, row: Row) -> None:
        count = self.pool.publish(number, row.text)
        assert count <= row.length
        self.published |= {row.text[:end] for end in range(1, count + 1)}

    @on_rows(name=st.sampled_from(list(LAYERS)), width=st.integers(1, 6))
    def prefill(self, data: st.DataObject, name: str, width: int) -> None:
        self._prefill(name, self._pick_some(data), width)

    def _prefill(self, name: str, numbers: list[int], width: int) -> bool:
        """A chunk of what a model has not seen: of its prompt (target), or of committed text (a lagging drafter)."""
        rows = [self.rows[number] for number in numbers]
        starts = [len(row.slots[name]) for row in rows]  # a tail stays as it is
        stops = [len(row.wanted) if name == "target" and not row.nodes else row.length for row in rows]
        texts = [
            [row.wanted[: i + 1] for i in range(start, min(stop, start + width))]
            for row, start, stop in zip(rows, starts, stops, strict=True)
        ]
        if not self._write(name, numbers, starts, width, texts):
            return False
        for number, row in zip(numbers, rows, strict=True):
            if name == "target" and not row.nodes:
                row.length = max(row.length, len(row.slots[name]))
                self.pool.set_length(number, row.length)
        return True

    @on_rows()
    def draft(self, data: st.DataObject) -> None:
        """A tree in the tail of some rows: the target runs all nodes, the drafter some, perhaps in another order."""
        self._draft(
            data, [n for n in self._pick_some(data) if len(self.rows[n].slots["target"]) == self.rows[n].length]
        )

    def _draft(self, data: st.DataObject, numbers: list[int]) -> None:
        if not numbers:
            return
        width = data.draw(st.integers(1, 5))
        parents = [-1] + [data.draw(st.integers(0, node - 1)) for node in range(1, width)]
        trees = []
        for number in numbers:
            texts: list[Text] = []
            for parent in parents:
                before = self.rows[number].text if parent < 0 else texts[parent]
                texts.append((*before, data.draw(st.integers(0, 2))))
            trees.append(texts)
        if not self._write("target", numbers, [self.rows[n].length for n in numbers], width, trees):
            return
        for number, tree in zip(numbers, trees, strict=True):
            row = self.rows[number]
            row.wanted = row.text
            row.nodes = tree
        ready = [n for n in numbers if len(self.rows[n].slots["draft"]) == self.rows[n].length]
        if not ready:
            return
        order = data.draw(st.permutations(range(width)))[: data.draw(st.integers(1, width))]
        mine = [[self.rows[n].nodes[node] for node in order] for n in ready]
        if not self._write("draft", ready, [self.rows[n].length for n in ready], len(order), mine):
            return
        places = [order.index(node) if node in order else -1 for node in range(width)]
        PagedKVCache(self.pool, ready).place("draft", [places] * len(ready))
        for number in ready:
            self.rows[number].places = places

    @on_rows()
    def step_and_publish(self, data: st.DataObject) -> None:
        self._step(data)
        for number, row in self.rows.items():
            self._publish(number, row)

    @on_rows()
    def step(self, data: st.DataObject) -> None:
        self._step(data)

    def _step(self, data: st.DataObject) -> None:
        """What a scheduler does most of the time: the rest of a prompt, a draft, a commit."""
        numbers = self._pick_some(data)
        PagedKVCache(self.pool, numbers).rollback()
        for number in numbers:
            self.rows[number].drop_tail()
        at_once = data.draw(st.sampled_from([99, 2, 1]))  # tokens that a lagging drafter reads
        if not self._prefill("target", numbers, 99) or not self._prefill("draft", numbers, at_once):
            return
        self._draft(data, numbers)
        self._commit(data, numbers)

    @on_rows()
    def commit(self, data: st.DataObject) -> None:
        self._commit(data, self._pick_some(data))

    def _commit(self, data: st.DataObject, numbers: list[int]) -> None:
        paths = []
        for number in numbers:
            row, path = self.rows[number], []
            if row.nodes:
                end = data.draw(st.sampled_from([(), *row.nodes]))
                path = [row.nodes.index(end[:stop]) for stop in range(row.length + 1, len(end) + 1)]
            paths.append(path)
        try:
            PagedKVCache(self.pool, numbers).commit(paths)
        except OutOfPagesError:  # only a fork of a tail can need a page here
            return
        for number, path in zip(numbers, paths, strict=True):
            self.rows[number].commit(path)

    @on_rows()
    def rollback(self, data: st.DataObject) -> None:
        numbers = self._pick_some(data)
        PagedKVCache(self.pool, numbers).rollback()
        for number in numbers:
            self.rows[number].drop_tail()

    @on_rows(declare=st.booleans())
    def truncate(self, data: st.DataObject, declare: bool) -> None:
        """A shorter text, by either call."""
        number, row = self._pick(data)
        length = data.draw(st.integers(0, row.length))
        (self.pool.set_length if declare and length < row.length else self.pool.truncate)(number, length)
        row.length = length
        row.wanted = (*row.text, *data.draw(st.lists(st.integers(0, 1), max_size=4)))
        row.drop_tail()

    @on_rows()
    def rewrite(self, data: st.DataObject) -> None:
        """Another end for a text that is published: nobody else holds its pages, and still they are not one's own."""
        number, row = self._pick(data)
        self._publish(number, row)
        row.length = data.draw(st.integers(0, row.length))
        self.pool.truncate(number, row.length)
        row.drop_tail()
        row.wanted = (*row.text, 2, *data.draw(st.lists(st.integers(0, 1), max_size=4)))
        self._prefill("target", [number], 99)

    @on_rows(count=st.integers(0, 9))
    def extend(self, data: st.DataObject, count: int) -> None:
        number, _ = self._pick(data)
        wanted, free = self.pool.pages_wanted(number, count), self.pool.num_free_pages
        if wanted > free:
            with pytest.raises(OutOfPagesError) as caught:
                self.pool.extend(number, count)
            assert (caught.value.needed, caught.value.free) == (wanted, free)
            return
        self.pool.extend(number, count)
        assert self.pool.pages_wanted(number, count) == 0

    @precondition(lambda self: self.pool.num_resting_pages)
    @rule(count=st.one_of(st.none(), st.integers(0, 3)))
    def evict(self, count: int | None) -> None:
        resting, free = self.pool.num_resting_pages, self.pool.num_free_pages
        gone = self.pool.evict(count)
        assert gone == (resting if count is None else min(count, resting))
        assert self.pool.num_free_pages == free

    @on_rows()
    def forget(self, data: st.DataObject) -> None:
        """The drafter's K/V of some rows is lost, and of every text that lies in the same pages."""
        numbers = self._pick_some(data)
        pages = {page for number in numbers for page in self.pool.sequence(number).pages}
        PagedKVCache(self.pool, numbers).forget("draft")
        for number, row in self.rows.items():
            table = self.pool.sequence(number).pages
            first = next((i for i, page in enumerate(table) if page in pages), len(table))
            del row.slots["draft"][0 if number in numbers else first * self.pool.page_size :]
            row.places = None if number in numbers else row.places

    @on_rows(name=st.sampled_from(list(LAYERS)))
    def scrub(self, data: st.DataObject, name: str) -> None:
        numbers = self._pick_some(data)
        with suppress(OutOfPagesError):  # a fork of a tail; rows before the one that failed are scrubbed
            PagedKVCache(self.pool, numbers).scrub(name)
        for number in numbers:
            if self.pool.filled(number, name) <= self.rows[number].length:
                del self.rows[number].slots[name][self.rows[number].length :]

    @invariant()
    def all_counts_agree(self) -> None:
        pool = self.pool
        pool.check_integrity()
        tables = {number: pool.sequence(number).pages for number in self.rows}
        assert set(pool.sequences) == set(self.rows)
        holders = Counter(page for table in tables.values() for page in table)
        assert pool.num_pages is not None
        assert (pool.num_held_pages, pool.num_free_pages) == (len(holders), pool.num_pages - len(holders))
        assert pool.num_resting_pages <= pool.num_free_pages
        for number, row in self.rows.items():
            assert pool.length(number) == row.length
            assert pool.match_prefix(row.text) >= pool.sequence(number).published * pool.page_size
            for name in LAYERS:
                self._check_contents(number, row, name)

    def _check_contents(self, number: int, row: Row, name: str) -> None:
        held = row.slots[name]
        assert self.pool.filled(number, name) == len(held)
        found = self.pool.stores[name].read(self.pool.sequence(number).pages, len(held))
        for layer, (keys, values) in enumerate(found):
            wanted = self.values.of(held, name, layer)
            assert keys.shape == (HEADS, len(held), DIM)
            assert keys[0, :, 0].tolist() == wanted
            assert values[-1, :, -1].tolist() == [-value for value in wanted]

    def _pick(self, data: st.DataObject) -> tuple[int, Row]:
        number = data.draw(st.sampled_from(sorted(self.rows)))
        return number, self.rows[number]

    def _pick_some(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.rows)), min_size=1, max_size=4, unique=True))

    def _write(self, name: str, numbers: list[int], starts: list[int], width: int, texts: list[list[Text]]) -> bool:
        """One pass through the model's view; False if there were no pages for it, and nothing had changed."""
        cache = PagedKVCache(self.pool, numbers)
        before = [(list(self.pool.sequence(n).pages), self.pool.filled(n, name)) for n in numbers]
        valid = [len(row) for row in texts]
        try:
            with cache.writing(name, starts, width, valid) as write:
                for layer in range(LAYERS[name]):
                    states = torch.full((len(numbers), HEADS, width, DIM), float("nan"), dtype=torch.float64)
                    for i, row in enumerate(texts):
                        states[i, :, : len(row)] = torch.tensor(self.values.of(row, name, layer)).double()[:, None]
                    keys, values = write.update(layer, states, -states)
                    assert keys.shape == (len(numbers), HEADS, write.read, DIM)
                    assert not bool(keys.isnan().any() | values.isnan().any())  # hidden slots are multiplied by zero
                    for i, number in enumerate(numbers):
                        wanted = self.values.of(self.rows[number].slots[name][: starts[i]] + texts[i], name, layer)
                        assert keys[i, 0, : len(wanted), 0].tolist() == wanted
        except OutOfPagesError:
            assert before == [(self.pool.sequence(n).pages, self.pool.filled(n, name)) for n in numbers]
            return False
        for number, start, row in zip(numbers, starts, texts, strict=True):
            self.rows[number].slots[name][start:] = row
        return True
