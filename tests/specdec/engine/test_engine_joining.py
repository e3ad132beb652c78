"""Rows join and leave a running batch: texts, noise and drafts are those of each row alone."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch

from specdec.drafters import BestFirst, Budget, Drafter, DySpec, FallbackGuard, ModelDrafter, NgramDrafter, Session
from specdec.kv import SharedKVCache, UnsupportedArgumentError
from specdec.verify import NoiseStream, Rows, SamplingLaw
from specdec.verify.race import RaceStream

CPU = torch.device("cpu")


def test_texts_of_rows_that_come_and_go() -> None:
    """A list per row is the model: whatever joins, grows and leaves, every row holds its own text."""
    generator = torch.Generator().manual_seed(0)
    rows = Rows.empty(CPU, capacity=4)
    known: dict[int, list[int]] = {}
    for _ in range(300):
        coin = float(torch.rand((), generator=generator))
        if coin < 0.3 or not known:
            text = torch.randint(0, 50, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
            row = rows.join(text.tolist())
            assert row not in known
            known[row] = text.tolist()
        elif coin < 0.5:
            place = int(torch.randint(0, len(rows.live), (), generator=generator))
            del known[rows.live[place]]
            rows.leave(place)
        else:
            runs = [torch.randint(0, 50, (1 + place % 3,), generator=generator).tolist() for place in
                    range(len(rows.live))]  # fmt: skip
            for row, run in zip(rows.live, runs, strict=True):
                known[row] += run
            rows.extend(runs)
        assert sorted(rows.live) == sorted(known)
        assert {row: rows.prefix(row).tolist() for row in rows.live} == known
        assert rows.lengths() == [len(known[row]) for row in rows.live]
        if rows.live:
            assert rows.roots().tolist() == [known[row][-1] for row in rows.live]


def test_no_row_joins_padded_prompts() -> None:
    rows = Rows(torch.tensor([[0, 5], [4, 5]]), torch.tensor([[False, True], [True, True]]), 8)
    with pytest.raises(UnsupportedArgumentError, match="padded prompts"):
        rows.join([1, 2])


def test_noise_of_a_joined_row_is_its_own_whatever_the_steps_of_the_others() -> None:
    stream, race = NoiseStream([], [], CPU), RaceStream([], [], 7, CPU)
    for row, seed in enumerate([5, 2**63 + 1, 9]):
        stream.join(row, seed)
        race.join(row, seed)
    for turn in range(40):
        if turn == 20:  # row 1 is somebody else's now
            stream.join(1, 77)
            race.join(1, 77)
        seeds = [5, 2**63 + 1 if turn < 20 else 77, 9]
        rows, steps = [[0, 1, 2], [2, 0], [1]][turn % 3], [turn * 7 % 300, turn, 128 + turn]
        got = stream.accept(rows, [steps[row] for row in rows], 1 + turn % 12)
        ran = race(rows, [steps[row] for row in rows], 2)
        for i, row in enumerate(rows):
            alone = NoiseStream([seeds[row]], [0], CPU).accept([0], steps[row], 1 + turn % 12)
            assert torch.equal(got.accept[i], alone.accept[0])
            assert torch.equal(got.residual[i], alone.residual[0])
            assert torch.equal(ran[i], RaceStream([seeds[row]], [0], 7, CPU)([0], [steps[row]], 2)[0])


DRAFTERS: dict[str, Any] = {
    "chain": lambda draft: ModelDrafter(draft, k=4),
    "tree": lambda draft: ModelDrafter(draft, tree=(3, 2, 1)),
    "sampled tree": lambda draft: ModelDrafter(draft, tree=(2, 2), children="sampled"),
    "best first": lambda draft: ModelDrafter(draft, tree=BestFirst(depth=3, top_k=3, num_nodes=7)),
    "dyspec": lambda draft: ModelDrafter(draft, tree=DySpec(depth=4, num_nodes=7)),
    "ngram": lambda draft: NgramDrafter(k=5, branches=2),
    "guarded chain": lambda draft: FallbackGuard(ModelDrafter(draft, k=3)),
}


def proposals(drafter: Drafter, session: Session, seeds: list[int]) -> list[tuple[list[int], list[int]]]:
    """Tokens and parents drafted for each live row; row `i`'s uniforms come from `seeds[i]`."""
    noise = NoiseStream(seeds, [0] * len(seeds), CPU).draft(range(len(seeds)), 0, drafter.num_uniforms)
    tree = drafter.propose(Budget((drafter.max_depth,) * len(seeds), drafter.max_nodes), noise)
    session.cache.rollback()
    return [
        (tree.tokens[i, :count].tolist(), tree.parents[i, :count].tolist())
        for i, count in enumerate(tree.num_nodes.tolist())
    ]


@pytest.mark.parametrize("kind", DRAFTERS)
def test_drafts_of_a_row_that_joined_are_those_of_the_row_alone(kind: str) -> None:
    """The contract of `join` and `clone`, for every drafter."""
    draft: Any = models.draft("near", "llama-gqa")
    layers = {"draft": int(draft.config.num_hidden_layers)}
    generator = torch.Generator().manual_seed(1)
    texts = [(torch.randint(3, 41, (n,), generator=generator).tolist() * 2)[: n + 5] for n in (9, 14, 4, 21)]
    original = DRAFTERS[kind](draft)

    def session(rows: Rows, cache: SharedKVCache) -> Session:
        return Session(rows, cache, SamplingLaw([]), True, models.VOCAB)

    alone = []
    for seed, text in enumerate(texts):
        one = original.clone()
        own = session(Rows(torch.tensor([text]), None, 64), SharedKVCache(layers, 1))
        own.cache.set_length(0, len(text) - 1)
        one.start(own)
        alone.append(proposals(one, own, [seed])[0])
        one.finish()

    rows, cache = Rows.empty(CPU), SharedKVCache(layers, len(texts))
    cache.num_rows = 0
    together = session(rows, cache)
    drafter = original.clone()
    drafter.start(together)
    for count, text in enumerate(texts, 1):
        drafter.join([rows.join(text)])
        cache.num_rows = count
        cache.set_length(count - 1, len(text) - 1)
        assert proposals(drafter, together, list(range(count))) == alone[:count]
    drafter.stop([rows.live[1]])  # the last row takes its place
    rows.leave(1)
    cache.retire(1)
    assert proposals(drafter, together, [0, 3, 2]) == [alone[0], alone[3], alone[2]]
    drafter.finish()
