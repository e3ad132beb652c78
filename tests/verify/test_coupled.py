"""rule="coupled": sampled text is a function of target, seed and request alone, and it follows the target's law."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from exact_law import next_laws, noisy_copy, tiny_llama
from law_checks import check_joint_law, check_second_step
from stats import judge_mean
from test_race import meeting, scalar_race
from torch import Tensor

from specdec import ModelDrafter, NgramDrafter, Speculator
from specdec.drafters import BestFirst, Budget, Drafter, DrafterFaultWarning, DySpec, Session
from specdec.verify import DraftTree, Topology
from specdec.verify.race import RaceStream

GENERATIONS = 10_000
ROWS = 50
EOS = 7
SAMPLING: tuple[dict[str, Any], ...] = (
    {"top_k": 0},
    {"top_k": 0, "temperature": 0.7},
    {"top_k": 3},
    {"top_k": 0, "top_p": 0.8, "temperature": 1.4},
    {"top_k": 0, "min_p": 0.1, "eos_token_id": EOS},
    {"top_k": 0, "eos_token_id": [EOS, 3]},
)
"""Laws that do not see the padding, which differs between batches."""


class Unaware(ModelDrafter):
    """Knows nothing of the race: samples with uniforms of its own and hands in q."""

    def start(self, session: Session) -> None:
        super().start(replace(session, race=None))


class Junk(Drafter):
    """Trees of random tokens; now and then a fault."""

    max_depth, max_nodes = 3, 7

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)

    def start(self, session: Session) -> None:
        self.session = session

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        if float(torch.rand((), generator=self.rng)) < 0.1:
            raise RuntimeError("junk")
        topology = Topology((-1, 0, 0, 1, 1, 2, 3, 3)[: 2 + int(torch.randint(7, (), generator=self.rng))])
        roots = self.session.rows.roots()
        tokens = torch.randint(self.session.vocab, (len(roots), topology.num_nodes), generator=self.rng)
        tokens[:, 0] = roots
        return DraftTree.build(topology, tokens)


@cache
def target(number: int) -> Any:
    return tiny_llama(number, vocab=(8, 13, 24)[number % 3], layers=1 + number % 2)


@cache
def draft(number: int, far: bool) -> Any:
    return noisy_copy(target(number), number + 50, 0.4 if far else 0.1)


def drafter(rng: random.Random, number: int) -> Any:
    model = draft(number, rng.random() < 0.5)
    widths = rng.choice([(2,), (2, 2), (3, 1, 1), (1, 2)])
    return rng.choice(
        [
            lambda: None,
            lambda: ModelDrafter(model, k=rng.randint(1, 6), temperature=rng.choice([1.0, 0.7])),
            lambda: ModelDrafter(model, tree=widths),
            lambda: ModelDrafter(model, tree=BestFirst(3, 2, 5)),
            lambda: ModelDrafter(model, tree=DySpec(3, 6, 2, 0.1)),
            lambda: Unaware(model, k=rng.randint(1, 4)),
            lambda: Unaware(model, tree=widths, children=rng.choice(["mixed", "sampled", "top"])),
            lambda: NgramDrafter(k=rng.randint(1, 4), branches=rng.randint(1, 3)),
            lambda: Junk(rng.randrange(10**6)),
        ]
    )()


def texts(spec: Speculator, prompts: list[list[int]], seeds: Sequence[int], **sampling: Any) -> list[list[int]]:
    """What each prompt, left-padded into one batch, is continued with, its end token included."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DrafterFaultWarning)
        out: Any = spec.generate(ids, attention_mask=mask, do_sample=True, seed=list(seeds), **sampling)
    ends = sampling.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    found = []
    for row in out[:, width:].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        found.append(row[:stop])
    return found


def compare(calls: int, seed: int) -> tuple[int, float]:
    """Every call: random target, law, drafter and batch against plain coupled decoding of the same rows in two other
    batches. Returns the generations compared and the accepted tokens per drafted one."""
    rng = random.Random(seed)
    compared = drafted = accepted = 0
    for _ in range(calls):
        number = rng.randrange(6)
        vocab = target(number).config.vocab_size
        prompts = [[rng.randrange(1, vocab) for _ in range(rng.randint(1, 9))] for _ in range(ROWS)]
        seeds = [rng.randrange(2**40) for _ in prompts]
        sampling = {**rng.choice(SAMPLING), "max_new_tokens": rng.randint(2, 12)}
        order = rng.sample(range(ROWS), ROWS)
        plain: dict[int, list[int]] = {}
        for part in (order[: ROWS // 3], order[ROWS // 3 :]):
            spec = Speculator(target(number), rule="coupled")
            found = texts(spec, [prompts[i] for i in part], [seeds[i] for i in part], **sampling)
            plain |= dict(zip(part, found, strict=True))
        spec = Speculator(target(number), drafter(rng, number), rule="coupled")
        together = texts(spec, prompts, seeds, **sampling)
        assert [plain[i] for i in range(ROWS)] == together, (number, sampling)
        assert spec.report is not None
        compared += ROWS
        drafted += spec.report.num_draft_tokens
        accepted += spec.report.num_accepted_tokens
    return compared, accepted / drafted


def test_the_text_does_not_depend_on_the_draft_or_the_batch() -> None:
    compare(calls=16, seed=1)


@pytest.mark.slow
def test_ten_thousand_texts_do_not_depend_on_the_draft_or_the_batch() -> None:
    compared, rate = compare(calls=GENERATIONS // ROWS, seed=2)
    assert compared >= GENERATIONS
    assert 0.1 < rate < 0.9, "nothing or everything is accepted: equality would be cheap"


class KeyedByStep(RaceStream):
    """Takes the number of the step in place of the position: what other roles of noise are keyed by."""

    def __call__(self, rows: Sequence[int], positions: Sequence[int], depths: int) -> Tensor:
        step = self.__dict__.setdefault("steps", {}).setdefault(tuple(positions), len(self.__dict__["steps"]))
        return super().__call__(rows, [8 * step] * len(rows), depths)


class PaddedPositions(RaceStream):
    """Counts positions from the left edge of the batch."""

    def __call__(self, rows: Sequence[int], positions: Sequence[int], depths: int) -> Tensor:
        return super().__call__(rows, [max(positions)] * len(rows), depths)


class KeyedByPlace(RaceStream):
    """Rows are told apart by their place among the rows still running."""

    def __call__(self, rows: Sequence[int], positions: Sequence[int], depths: int) -> Tensor:
        return super().__call__(range(len(rows)), positions, depths)


@pytest.mark.parametrize("bug", [KeyedByStep, PaddedPositions, KeyedByPlace])
def test_noise_keyed_by_anything_else_is_caught(bug: type[RaceStream], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.batch.RaceStream", bug)
    with pytest.raises(AssertionError, match="top_k"):
        compare(calls=16, seed=1)


DRAFTERS: dict[str, Any] = {
    "none": lambda: None,
    "chain": lambda: ModelDrafter(draft(0, False), k=3),
    "tree": lambda: ModelDrafter(draft(0, False), tree=(2, 2)),
    "best first": lambda: ModelDrafter(draft(0, False), tree=BestFirst(3, 2, 5)),
    "unaware chain": lambda: Unaware(draft(0, False), k=3),
    "n-gram": lambda: NgramDrafter(k=3, branches=2),
}
PROMPT = torch.tensor([[3, 5, 2, 6, 3, 5]])


@pytest.mark.parametrize("name", list(DRAFTERS))
def test_the_text_is_the_one_a_loop_over_plain_forwards_writes(name: str) -> None:
    """The definition, one token at a time: the argmin of E / p at every position of the row's real text."""
    sampling: dict[str, Any] = {"top_k": 5, "temperature": 0.8, "repetition_penalty": 1.3}
    mask = torch.ones_like(PROMPT)
    spec = Speculator(target(0), DRAFTERS[name](), rule="coupled")
    out: Any = spec.generate(
        PROMPT.expand(4, -1), attention_mask=mask.expand(4, -1), do_sample=True, max_new_tokens=12, seed=9, **sampling
    )
    for request, row in enumerate(out[:, PROMPT.shape[1] :].tolist()):
        text: list[int] = []
        for position in range(PROMPT.shape[1], PROMPT.shape[1] + 12):
            p = next_laws(target(0), PROMPT, mask, torch.tensor([text], dtype=torch.int64), **sampling)[0].tolist()
            arrival = [scalar_race(9, request, position, token) / p[token] for token in range(8) if p[token] > 0]
            text.append([token for token in range(8) if p[token] > 0][arrival.index(min(arrival))])
        assert row == text
    assert len({tuple(row) for row in out.tolist()}) == 4


def test_a_text_goes_on_where_it_stopped() -> None:
    """Positions are absolute: decoding in two calls with one seed is decoding in one."""
    spec = Speculator(target(1), draft(1, False), rule="coupled")
    settings: dict[str, Any] = {"do_sample": True, "seed": 4, "top_k": 0}
    prompt = PROMPT.expand(3, -1)
    whole: Any = spec.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, **settings)
    half: Any = spec.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7, **settings)
    rest: Any = spec.generate(half, attention_mask=torch.ones_like(half), max_new_tokens=13, **settings)
    assert torch.equal(rest, whole)


def test_joint_law_of_first_tokens() -> None:
    check_joint_law(Speculator(target(0), DRAFTERS["chain"](), rule="coupled"), PROMPT, top_k=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "tree", "best first", "unaware chain", "n-gram"])
def test_joint_law_of_first_tokens_whatever_is_drafted(name: str) -> None:
    """Smaller samples: the text is the same function of the noise (see above) as the one judged there."""
    sampling: dict[str, Any] = {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.4}
    check_joint_law(Speculator(target(0), DRAFTERS[name](), rule="coupled"), PROMPT, samples=8_000, **sampling)


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_second_step_ignores_the_noise_of_the_first(name: str) -> None:
    check_second_step(Speculator(target(0), DRAFTERS[name](), rule="coupled"), PROMPT, 8_000, top_k=0)


def test_drafted_tokens_are_accepted_as_often_as_two_races_meet() -> None:
    """Through the real generate, against the laws of plain forwards of both models."""
    mask = torch.ones_like(PROMPT)
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    p, q = (next_laws(model, PROMPT, mask, nothing, top_k=0)[0] for model in (target(0), draft(0, True)))
    accepted: list[list[int]] = []
    spec = Speculator(target(0), ModelDrafter(draft(0, True), k=1), rule="coupled")
    spec.generate(
        PROMPT, attention_mask=mask, do_sample=True, max_new_tokens=2, num_return_sequences=8_000, seed=1, top_k=0,
        on_step=lambda trace: accepted.append(trace.accepted),
    )  # fmt: skip
    rate, tv = torch.tensor(accepted[0], dtype=torch.float64).numpy(), float((p - q).abs().sum() / 2)
    assert 0.1 < tv < 0.9
    judge_mean(rate - meeting(p, q), "accepted first drafts")
    assert (1 - tv) / (1 + tv) - 0.03 < rate.mean() < 1 - tv + 0.03
