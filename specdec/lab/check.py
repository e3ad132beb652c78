"""`specdec.check`: the whole exactness check of one pair with one way of drafting, within a time budget."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.arguments import Draft, Target, make_drafter, make_target
from specdec.drafters import Drafter, ModelDrafter
from specdec.kv import UnsupportedArgumentError
from specdec.kv.limits import MOST_THREADS, checked_count, checked_number
from specdec.kv.support import text_config
from specdec.lab.acceptance import NUM_SUMS, AcceptanceRecorder
from specdec.lab.findings import CheckReport, Finding
from specdec.lab.greedy import GreedyAudit
from specdec.lab.kv import KVAudit, LogitAudit
from specdec.lab.laws import NUM_TESTS, LawTests, draw
from specdec.lab.pace import Pace, one_thread_if_faster, timed
from specdec.lab.prompts import encode_prompts
from specdec.planner.options import Options
from specdec.speculator import Speculator
from specdec.verify.rules import RULES, make_rule

ALPHA = 1e-6
"""Chance that an exact pair fails any of the statistical tests of one check."""
MAX_ROWS, LEAST_ROWS = 40_000, 8
"""Sampled continuations after which more would not say much more; fewest of one call."""
MAX_LOGITS = 1 << 27
"""Rows of one sampling call times nodes times vocabulary."""
AUDIT_TOKENS, LEAST_TOKENS = 32, 6
"""New tokens of audited texts; on a machine too slow for the budget, as few as the least."""
AUDIT_TREE = (2, 2, 1)
"""Also audited when the draft model drafts chains: only trees have nodes that a commit must move."""
GREEDY_SHARE, AUDIT_SHARE, SAMPLING_SHARE = 0.15, 0.35, 0.9
"""Parts of the budget after which each stage gives way to the next; each does its least in any case."""
GREEDY_PASSES, AUDIT_PASSES = 3.0, 2.0
"""Cost of one prompt's greedy audit, and of one audited call, in that of writing as many tokens greedily."""

Progress = Callable[[float, str], None]


def check(
    target: Target,
    draft: Draft = None,
    *,
    prompts: Sequence[str | Sequence[int] | Tensor] | None = None,
    k: int | None = None,
    tree: Any = None,
    rule: str = "auto",
    exactness: str = "distribution",
    temperature: float = 1.0,
    budget_s: float = 100.0,
    seed: int = 0,
    tokenizer: Any = None,
    max_rows: int = MAX_ROWS,
    threads: int | None = None,
    progress: Progress | None = None,
    **sampling: Any,
) -> CheckReport:
    """Does this pair emit exactly the target's law, on this machine, drafted this way?

    Judges greedy text, K/V and logits against the plain `transformers` model; sampled tokens against its one-step laws
    (G-tests, ALPHA shared by all of them) and against plain sampling; acceptance and draft tokens against theory.
    How close acceptance is to the best possible is told, not judged.

    Args:
        target, draft, k, tree, rule, exactness, tokenizer: as in `Speculator`, but nothing is planned: a planner that
            decodes plainly would leave nothing to check.
        prompts: texts or token ids; default: a few short texts (without a tokenizer: random ids).
        temperature: of the sampled part.
        budget_s: seconds to spend, loading not included. What is drawn follows from what drawing costs on this machine
            at this moment; fewer seconds, or a busy machine, find only larger errors: see "see TV" in the findings.
        threads: torch threads of a check on a CPU; default: those torch has, or one where that is faster.
        seed: of prompts, noise and audits.
        max_rows: sampled continuations at most.
        progress: called with (share done, what is being done).
        sampling: more arguments of `generate` that choose the law, e.g. `top_p=0.9`; default: no filter.

    Raises:
        UnsupportedArgumentError: a lossy rule, a temperature or budget that is not positive, bad prompts.
    """
    temperature = checked_number("temperature (greedy text is checked too)", temperature, 0.0, above=True)
    budget_s = checked_number("budget_s", budget_s, 0.0, above=True)
    max_rows = checked_count("max_rows", max_rows, 1, sys.maxsize)
    if threads is not None:
        threads = checked_count("threads", threads, 1, MOST_THREADS)
    if rule != "auto":
        chosen = make_rule(rule)
        if not chosen.lossless:
            exact = [name for name, kind in RULES.items() if kind.lossless]
            raise UnsupportedArgumentError(
                f"rule {rule!r} is lossy by design: there is no law to check it against. Exact: {exact}"
            )
        if rule == "greedy":
            raise UnsupportedArgumentError("rule='greedy' does not sample: leave rule at 'auto'")
    target, tokenizer = make_target(target, tokenizer)
    drafter = _unplanned(make_drafter(draft, target, k, tree))
    embeddings: Any = target.get_input_embeddings()
    vocab = int(text_config(target).vocab_size)
    encoded = encode_prompts(prompts, tokenizer, vocab, seed, embeddings.weight.device)
    sampling = {"temperature": temperature, "top_k": 0, **sampling}
    options = {"rule": rule, "exactness": exactness}
    pace = Pace(budget_s)
    with one_thread_if_faster(partial(_pass, target, encoded[0]), encoded[0].device, threads):
        return _Run(target, drafter, options, encoded, sampling, pace, seed, max_rows, progress).report()


def _unplanned(drafter: Drafter | None) -> Drafter | None:
    """The drafter to check: where every step would be planned, the first option with chains of the usual length."""
    if not isinstance(drafter, Options):
        return drafter
    first = drafter.options[0].drafter
    chains = first.kind is not None and first.kind.shape == "chain"
    return first.shaped() if isinstance(first, ModelDrafter) and chains else first


@torch.no_grad()
def _pass(target: Any, prompt: Tensor) -> None:
    target(input_ids=prompt[:, -4:])


class _Run:
    """One check."""

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: Drafter | None,
        options: dict[str, Any],
        prompts: list[Tensor],
        sampling: dict[str, Any],
        pace: Pace,
        seed: int,
        max_rows: int,
        progress: Progress | None,
    ):
        self.target, self.drafter, self.options, self.prompts = target, drafter, options, prompts
        self.sampling, self.pace, self.seed, self.max_rows = sampling, pace, seed, max_rows
        self._progress = progress
        self._token_s = 0.0
        self.depth = 0 if drafter is None else drafter.max_depth
        self.width = 1 if drafter is None else drafter.max_nodes + 1
        self.faults: list[str] = []

    def report(self) -> CheckReport:
        findings: list[Finding] = []
        greedy = self._greedy()
        findings.append(greedy.finding())
        findings += self._audits(greedy.noise)
        recorder = AcceptanceRecorder()
        laws = LawTests(self.target, self.prompts, self.sampling, greedy.noise, self.seed)
        self._sample(laws, recorder)
        alpha = ALPHA / (NUM_TESTS + NUM_SUMS)
        rule = self.options["rule"]
        races = rule != "auto" and make_rule(rule).uses_race
        findings += laws.findings(alpha, step_law=not (races and self.drafter is not None and self.drafter.looks_ahead))
        findings += recorder.findings(alpha, self.pace.left(1.0))
        if self.faults:
            detail = f"{len(self.faults)} calls had faults, last: {self.faults[-1]}"
            findings.append(Finding("drafter", "FAIL", detail, {"faults": self.faults}))
        self._tell(1.0, "done")
        settings = {
            "drafter": "none" if self.drafter is None else self.drafter.name,
            **self.options,
            "max_depth": self.depth,
            "max_nodes": self.width - 1,
            "sampling": self.sampling,
            "num_prompts": len(self.prompts),
            "num_rows": laws.rows,
            "num_tokens": laws.tokens,
            "alpha": ALPHA,
            "alpha_per_test": alpha,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            "budget_s": self.pace.budget_s,
            "seconds": round(self.pace.spent, 2),
        }
        return CheckReport(tuple(findings), settings)

    def _greedy(self) -> GreedyAudit:
        spec = self._speculator()
        self._tell(None, "greedy text")
        self._token_s = self._time_of_a_token(spec)
        tokens = self.pace.fit(GREEDY_SHARE, GREEDY_PASSES * self._token_s, LEAST_TOKENS, AUDIT_TOKENS)
        audit = GreedyAudit(spec, self.width, tokens)
        for number, prompt in enumerate(self.prompts):
            if number and self.pace.left(GREEDY_SHARE) < 0:
                break
            self._tell(None, "greedy text")
            audit.add(number, prompt)
            self._note_faults(spec)
        return audit

    def _time_of_a_token(self, spec: Speculator) -> float:
        """Seconds of one greedy token, measured in a second call: the first one warms up."""
        prompt = self.prompts[0]

        def write(tokens: int) -> object:
            return spec.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=tokens,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip

        write(LEAST_TOKENS)
        return timed(lambda: write(LEAST_TOKENS)) / LEAST_TOKENS

    def _audits(self, noise: float) -> list[Finding]:
        drafters = list(self._audited_drafters())
        modes: tuple[dict[str, Any], ...] = ({"do_sample": True, **self.sampling}, {"do_sample": False})
        each = len(drafters) * len(modes) * AUDIT_PASSES * self._token_s
        tokens = self.pace.fit(AUDIT_SHARE, each, LEAST_TOKENS, AUDIT_TOKENS)
        kv, logits = KVAudit(self.seed, most=tokens // 4), LogitAudit()
        for number, prompt in enumerate(self.prompts):
            for drafter in drafters:
                for mode in modes:
                    if number and self.pace.left(AUDIT_SHARE) < 0:
                        break
                    self._tell(None, "K/V cache and logits")
                    options = self.options if drafter is self.drafter else {**self.options, "rule": "auto"}
                    spec = Speculator(self.target, drafter, monitor=kv, **options)
                    seed = {"seed": self.seed + number} if mode["do_sample"] else {}
                    logits.add(spec, prompt, 2, tokens, noise, **mode, **seed)
                    kv.compare()
                    self._note_faults(spec)
        return [kv.finding(), logits.finding()]

    def _audited_drafters(self) -> Iterator[Drafter | None]:
        yield self.drafter
        if isinstance(self.drafter, ModelDrafter) and self.drafter.max_nodes == self.drafter.max_depth:
            if self.drafter.shares_target_kv:
                yield self.drafter.shaped(tree=AUDIT_TREE)
            else:
                yield ModelDrafter(self.drafter.model, tree=AUDIT_TREE)

    def _sample(self, laws: LawTests, recorder: AcceptanceRecorder) -> None:
        """Alternate over the prompts; the size of a call follows from what calls cost, never from what they showed."""
        spec = self._speculator(recorder)
        new_tokens = min(self.depth + 3, 16)
        vocab = laws.references[0].vocab
        most = max(8, min(8192, MAX_LOGITS // (self.width * vocab)))
        rows, call, per_row = min(32, most), 0, new_tokens * self._token_s
        while laws.rows < self.max_rows:
            left = self.pace.left(SAMPLING_SHARE)
            if left < rows * per_row:
                rows = int(left / per_row) if call else max(LEAST_ROWS, int(left / per_row))
                if rows < LEAST_ROWS:
                    break
            rows = min(rows, most, self.max_rows - laws.rows)
            self._tell(laws.rows / self.max_rows, f"sampling, {laws.rows} continuations")
            number = call % len(self.prompts)
            per_row = timed(partial(self._draw, laws, spec, number, rows, new_tokens, (self.seed << 24) + call)) / rows
            call += 1
            wanted = max(1.0, min(4.0, left / (2 * len(self.prompts)))) / per_row
            rows = int(min(most, 4 * rows, max(LEAST_ROWS, wanted)))

    def _draw(self, laws: LawTests, spec: Speculator, number: int, rows: int, new_tokens: int, key: int) -> None:
        laws.add(number, draw(spec, self.prompts[number], rows, new_tokens, key, self.sampling))
        laws.add_plain(number, rows, key)
        self._note_faults(spec)

    def _speculator(self, monitor: AcceptanceRecorder | None = None) -> Speculator:
        return Speculator(self.target, self.drafter, monitor=monitor or False, **self.options)

    def _note_faults(self, spec: Speculator) -> None:
        if spec.report is not None and spec.report.num_drafter_faults:
            self.faults.append(str(spec.report.last_drafter_fault))

    def _tell(self, share: float | None, what: str) -> None:
        if self._progress is not None:
            self._progress(min(1.0, max(self.pace.spent / self.pace.budget_s, share or 0.0)), what)
