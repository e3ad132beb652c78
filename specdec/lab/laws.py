"""The law tests: what the real loop emits against the reference's one-step laws, and against plain sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.versions import CACHE_KEYWORD, cache_of
from specdec.lab.findings import Finding
from specdec.lab.reference import MAX_ENTRIES, Position, Reference, places
from specdec.lab.stats import GTest, detectable_tv, g_test_strata, g_test_two_samples, uniform_bins
from specdec.speculator import Speculator
from specdec.trace import StepTrace

STRATA = 16
"""First tokens, the likeliest of each prompt, after which the second token is judged cell by cell."""
BINS = 20
"""Cells of the tests that pool all contexts."""


class Draws(NamedTuple):
    """What one call emitted. tokens: int64 `[rows, new]`, zeros behind a row's end; lengths: int64 `[rows]`; first_run:
    int64 `[rows]`, tokens of the first step."""

    tokens: Tensor
    lengths: Tensor
    first_run: Tensor


def draw(spec: Speculator, prompt: Tensor, rows: int, new_tokens: int, seed: int, sampling: Mapping[str, Any]) -> Draws:
    """`rows` continuations of one prompt (int64 `[1, tokens]`) in one call of the real `generate`."""
    emitted: list[list[int]] = [[] for _ in range(rows)]
    first = [0] * rows

    def keep(trace: StepTrace) -> None:
        for row, run in zip(trace.rows, trace.emitted, strict=True):
            if trace.step == 0:
                first[row] = len(run)
            emitted[row] += run

    spec.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=new_tokens,
        num_return_sequences=rows, seed=seed, on_step=keep, **sampling,
    )  # fmt: skip
    emitted = [run[:new_tokens] for run in emitted]
    padded = [run + [0] * (new_tokens - len(run)) for run in emitted]
    device = prompt.device
    lengths = torch.tensor([len(run) for run in emitted], device=device)
    return Draws(torch.tensor(padded, device=device), lengths, torch.tensor(first, device=device))


class LawTests:
    """Accumulates draws and judges them.

    Args:
        prompts: int64 `[1, tokens]` each.
        noise: of the logits; a token that the reference excludes is excused when a bump of its logit by some times this
            would let it in (the edge of top-k or top-p fell between two equal scores).
    """

    def __init__(
        self, target: PreTrainedModel, prompts: Sequence[Tensor], sampling: Mapping[str, Any], noise: float, seed: int
    ):
        self.target: Any = target
        self.sampling = dict(sampling)
        self.references = [Reference(target, prompt, sampling) for prompt in prompts]
        self.bump = 16 * noise
        self.rows = self.tokens = self.impossible = self.excused = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._laws = [reference.first() for reference in self.references]
        self._tops = [law.topk(min(STRATA, int((law > 0).sum()))).indices.tolist() for law in self._laws]
        self._second = [self._second_laws(number) for number in range(len(prompts))]
        vocab = self.references[0].vocab
        self._first_counts = np.zeros((len(prompts), vocab))
        self._second_counts: dict[tuple[int, int], np.ndarray] = {
            (number, token): np.zeros(vocab) for number, tops in enumerate(self._tops) for token in tops
        }
        self._all_places = np.zeros(BINS)
        self._step_places = np.zeros(BINS)
        self._ours: Counter[tuple[int, int, int]] = Counter()
        self._plain: Counter[tuple[int, int, int]] = Counter()

    def _second_laws(self, number: int) -> Tensor:
        tails = torch.tensor([[token, 0] for token in self._tops[number]], device=self._laws[number].device)
        found = [position.law.cpu() for position in self.references[number].along(tails) if position.place == 1]
        return torch.cat(found)

    def add(self, number: int, draws: Draws) -> None:
        """Count one call's draws after prompt `number`."""
        self.rows += len(draws.tokens)
        chunk = max(1, MAX_ENTRIES // (draws.tokens.shape[1] * self.references[number].vocab))
        for part in zip(*(tensor.split(chunk) for tensor in draws), strict=True):
            tokens, lengths, first_run = part
            for position in self.references[number].along(tokens):
                self._place(number, position, tokens, lengths, first_run)
        second = torch.where(draws.lengths > 1, draws.tokens[:, min(1, draws.tokens.shape[1] - 1)], -1)
        self._ours.update((number, a, b) for a, b in zip(draws.tokens[:, 0].tolist(), second.tolist(), strict=True))

    def _place(self, number: int, position: Position, tokens: Tensor, lengths: Tensor, first_run: Tensor) -> None:
        at = position.place
        token = tokens[:, at]
        random = torch.rand(len(tokens), generator=self._generator, dtype=torch.float64).to(tokens.device)
        found = places(position.law, token, random)
        real = lengths > at
        outside = real & (found >= 1)
        if bool(outside.any()):
            excused = outside & self._excused(number, position, token)
            self.excused += int(excused.sum())
            self.impossible += int((outside & ~excused).sum())
            real = real & ~excused
        self.tokens += int(real.sum())
        self._all_places += uniform_bins(found[real].cpu(), BINS)[0]
        self._step_places += uniform_bins(found[real & (first_run == at)].cpu(), BINS)[0]
        if at == 0:
            self._first_counts[number] += np.bincount(token[real].cpu(), minlength=self._first_counts.shape[1])
        if at == 1:
            for first in self._tops[number]:
                seen = token[real & (tokens[:, 0] == first)].cpu()
                counts = self._second_counts[number, first]
                counts += np.bincount(seen, minlength=len(counts))

    def _excused(self, number: int, position: Position, token: Tensor) -> Tensor:
        bumped = position.logits.float().clone()
        bumped.scatter_add_(1, token[:, None], torch.full_like(bumped[:, :1], self.bump))
        return self.references[number].law(position.prefix, bumped).gather(1, token[:, None])[:, 0] > 0

    def add_plain(self, number: int, rows: int, seed: int) -> None:
        """Two tokens of `rows` continuations by plain `generate`, from a prompt that is already on its cache."""
        prompt = self.references[number].prompt
        ids = prompt.expand(rows, -1)
        arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": True, "max_new_tokens": 2}
        if prompt.shape[1] > 1:
            with torch.no_grad():
                cache = cache_of(self.target(input_ids=prompt[:, :-1], use_cache=True))
            cache.batch_repeat_interleave(rows)
            arguments[CACHE_KEYWORD] = cache
        devices = [prompt.device] if prompt.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            out = type(self.target).generate(self.target, ids, **arguments, **self.sampling)[:, prompt.shape[1] :]
        ends = self.sampling.get("eos_token_id", self.target.generation_config.eos_token_id)
        ends = set() if ends is None else set(ends) if isinstance(ends, (list, tuple)) else {ends}
        pairs = [(row[0], row[1] if len(row) > 1 and row[0] not in ends else -1) for row in out.tolist()]
        self._plain.update((number, a, b) for a, b in pairs)

    def findings(self, alpha: float, step_law: bool = True) -> list[Finding]:
        """All law tests, each judged at `alpha`. step_law: whether the law must hold given where a step ended (see
        `Drafter.looks_ahead`)."""
        firsts = g_test_strata(list(self._first_counts), [law.cpu().numpy() for law in self._laws])
        keys = [(n, i, token) for n, tops in enumerate(self._tops) for i, token in enumerate(tops)]
        seconds = g_test_strata(
            [self._second_counts[n, token] for n, _, token in keys], [self._second[n][i].numpy() for n, i, _ in keys]
        )
        level = np.full(BINS, 1 / BINS)
        every = g_test_strata([self._all_places], [level])
        steps = g_test_strata([self._step_places], [level])
        cells = sorted(self._ours.keys() | self._plain.keys())
        counts = [np.array([side[cell] for cell in cells], dtype=np.float64) for side in (self._ours, self._plain)]
        both = g_test_two_samples(*counts) if min(side.sum() for side in counts) > 0 else GTest(0.0, 0, 1.0)
        effective = int(counts[0].sum() * counts[1].sum() / max(1.0, counts[0].sum() + counts[1].sum()))
        found = [
            _finding("law of token 1", firsts, self.rows, alpha),
            _finding("law of token 2 | 1", seconds, int(sum(c.sum() for c in self._second_counts.values())), alpha),
            _finding("law after step 1", steps, int(self._step_places.sum()), alpha) if step_law else UNPROMISED,
            _finding("law of every token", every, self.tokens, alpha),
            _finding("same as plain sampling", both, effective, alpha),
        ]
        figures = {"impossible": self.impossible, "excused": self.excused}
        detail = f"{self.impossible} emitted tokens that the target's law rules out"
        if self.excused:
            detail += f" ({self.excused} more lay on the edge of a filter, within rounding)"
        return [*found, Finding("impossible tokens", "FAIL" if self.impossible else "pass", detail, figures)]


UNPROMISED = Finding(
    "law after step 1",
    "skipped",
    "not promised: this drafter withdraws nodes after a look at deeper ones, so in a race the end of a step says "
    "something about the next token; the text itself is the target's",
)
NUM_TESTS = 5
"""Statistical tests among `LawTests.findings`."""


def _finding(name: str, test: GTest, samples: int, alpha: float) -> Finding:
    if test.df == 0 and test.p_value > 0:
        return Finding(name, "skipped", f"{samples} samples are too few to judge")
    tv = detectable_tv(max(1, test.df), samples, alpha)
    detail = f"p = {test.p_value:.2g} (G = {test.statistic:.1f}, {test.df} df), {samples} samples see TV {tv:.3f}"
    figures = {**test._asdict(), "samples": samples, "alpha": alpha, "detectable_tv": tv}
    return Finding(name, "FAIL" if test.p_value < alpha else "pass", detail, figures, sees=tv)
