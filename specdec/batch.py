"""Requests that are decoded together, and the verbs of their steps: `propose`, the target's pass, `decide`, `advance`.

A batch knows all about its rows but the target: their text and K/V, law and rule, noise, drafts, and where they end.
Whoever runs the target owns the batch: a `DecodeLoop`, whose rows all start together and which raises what fails; or an
engine, whose `Lane` is a batch that rows join and leave, and which ends the request that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.decision import Decided, read_verdict, undrafted
from specdec.drafters import Budget, FallbackGuard, Session
from specdec.drafters.base import NodeLaw
from specdec.kv import KVCache
from specdec.kv.faults import from_outside
from specdec.plain_order import PlainOrder
from specdec.stopping import StopRules
from specdec.verify import DraftTree, Noise, NoiseStream, Rows
from specdec.verify.draft_kind import NO_DRAFTS, DraftKind
from specdec.verify.race import RaceStream
from specdec.verify.rules import AcceptanceRule, auto_rule, choose_rule
from specdec.verify.tree import Verdict

Rerun = Callable[[DraftTree, Tensor, list[int]], tuple[DraftTree, Tensor]]
"""The target's pass once more, for trees some of whose rows (by place) have NaN in their logits: what is left of the
trees without the nodes that bring it, and logits."""
Record = Callable[[int, int, Decided], list[tuple[Tensor, ...]] | None]
"""Told a row, its place among the live ones and what was decided, before that is cut; gives what its criteria are shown
of the scores."""


class Advanced(NamedTuple):
    """What became of the rows, by their place among those that were live.

    ended: columns of `Rows.ids` that finished rows keep. raised: what a row's own stop rules raised.
    """

    ended: dict[int, int]
    raised: dict[int, BaseException]


class Batch:
    """The live rows' state, and the verbs of a step.

    Between steps, for every live row: `cache.lengths == num_tokens - 1` (the last token is the next root), and no
    row's output depends on the rows around it (in plain order a sampled row's law does not, its text does).

    Args:
        law: logits -> scores. sampling: False means greedy decoding. vocab: the target's.
        seeds, requests: under which keys the rows there are draw their noise.
        in_order: processors must be called as plain decoding calls them (see `PlainOrder`); `law` is one to draft by.
        isolates: what a row's own processors and stop rules raise is told (`Decided.failed`, `Advanced.raised`) instead
            of raised.

    Attributes:
        rule: None where it depends on each tree, because the drafter does not say what it proposes.
        stops: the stop rules by row.
        first_draft: the first step of a row that it may be drafted for in. A drafter that reads the target's K/V waits
            for the second: the first one's pass is what reads the prompt in `generate`, and a sampled text is the same
            wherever its request is served.
        record: where a caller wants scores, logits or hidden states.
    """

    record: Record | None = None

    def __init__(
        self,
        rows: Rows,
        cache: KVCache,
        law: NodeLaw,
        drafter: FallbackGuard | None,
        rule: str,
        sampling: bool,
        vocab: int,
        seeds: Sequence[int],
        requests: Sequence[int],
        *,
        in_order: bool,
        isolates: bool,
    ):
        self.rows, self.cache, self.law, self.drafter, self.sampling = rows, cache, law, drafter, sampling
        kind = NO_DRAFTS if drafter is None else drafter.kind
        self.first_draft = int(drafter is not None and drafter.shares_target_kv)
        self.rule: AcceptanceRule | None = choose_rule(rule, sampling, kind, top_down=in_order)
        self.noise = NoiseStream(seeds, requests, rows.device)
        self.races = None
        if self.rule is not None and self.rule.uses_race:
            self.races = RaceStream(seeds, requests, vocab, rows.device)
        self.order = PlainOrder(rows, sampling, isolates) if in_order else None
        self.stops: dict[int, StopRules] = {}
        self._vocab, self._isolates = vocab, isolates
        self._still = torch.zeros((), dtype=torch.float64, device=rows.device)

    def open(self, law: NodeLaw) -> None:
        """The drafter's session begins, with a law to draft by."""
        if self.drafter is not None:
            race = None if self.races is None else self.next_race
            self.drafter.start(Session(self.rows, self.cache, law, self.sampling, self._vocab, race))

    def close(self) -> None:
        """The drafter's session ends. Repeating it is no error."""
        if self.drafter is not None:
            self.drafter.finish()

    def next_race(self, depths: int) -> Tensor:
        """The noise of the next `depths` positions of each live row's real text (see `Session.race`)."""
        assert self.races is not None
        return self.races(self.rows.live, self.rows.lengths(), depths)

    def propose(self, budget: Budget, steps: int | Sequence[int]) -> DraftTree:
        """The drafter's trees; bare roots without a drafter.

        Args:
            steps: the number of this step, for all live rows or one for each of them: it keys their noise.
        """
        if self.drafter is None or budget.max_depth <= 0:  # no noise is computed for drafts that are not asked for
            return DraftTree.root_only(self.rows.roots())
        count = self.drafter.num_uniforms
        if not self.sampling:
            return self.drafter.propose(budget, self._still.expand(len(self.rows.live), count))
        return self.drafter.propose(budget, self.noise.draft(self.rows.live, steps, count))

    def decide(self, tree: DraftTree, logits: Tensor, steps: int | Sequence[int], rerun: Rerun) -> Decided:
        """What the rule keeps of the trees. Rows with NaN in their logits are run and judged once more: drafts may lead
        where plain decoding never goes. A repeated decision may use the same noise: nothing of the first was emitted.

        Args:
            logits: the target's, `[rows, nodes, vocab]`; steps: as given to `propose`.

        Returns:
            the decision; `Decided.faulty` and `Decided.failed` say which rows cannot go on.
        """
        decided = self._judged(tree, logits, steps, again=False)
        sick = decided.decision.sick
        if any(sick):
            nan = logits.amax((1, 2)).isnan().tolist()  # what processors make of numbers is no fault of the target
            rows = [i for i, flag in enumerate(sick) if flag and nan[i]]
            if rows:
                decided = self._judged(*rerun(tree, logits, rows), steps, again=True)
        return decided

    def advance(self, decided: Decided, left_out: Collection[int] = ()) -> Advanced:
        """Commit what is kept, append what it emits, cut it where plain decoding stops, tell the drafter. All rows
        stay, the finished included; the decision's runs and kinds become what was emitted.

        Args:
            left_out: places of rows that get nothing.
        """
        decision, live, raised = decided.decision, self.rows.live, {}
        for i in left_out:
            decision.paths[i], decision.runs[i] = [], []
        self.cache.commit(decision.paths)
        self.rows.extend(decision.runs)
        for i, row in enumerate(live):
            if i not in left_out:
                try:
                    self._look_for_stops(i, row, decided)
                except BaseException as fault:
                    if from_outside(fault) or not self._isolates:
                        raise
                    raised[i] = fault
        ended = {}
        for i, row in enumerate(live):
            columns = None if i in left_out or i in raised else self.stops[row].final_columns(row)
            if columns is not None:
                ended[i] = columns
                self._cut(i, row, self.rows.ends[row] - columns, decided)
        if self.drafter is not None:
            self.drafter.observe(decided.verdict, decided.logits)
        return Advanced(ended, raised)

    def _look_for_stops(self, place: int, row: int, decided: Decided) -> None:
        shown = None if self.record is None else self.record(row, place, decided)
        if not decided.in_order:
            self.stops[row].scan(row, decided.decision.runs[place], shown)

    def _cut(self, place: int, row: int, extra: int, decided: Decided) -> None:
        """Take back the last tokens of a row that is finished."""
        if extra > 0:
            runs, kinds = decided.decision.runs, decided.decision.kinds
            runs[place], kinds[place] = runs[place][:-extra], kinds[place][:-extra]
            self.rows.ends[row] -= extra
            self.rows.num_tokens[row] -= extra
            self.cache.truncate(place, self.rows.num_tokens[row] - 1)

    def _judged(self, tree: DraftTree, logits: Tensor, steps: int | Sequence[int], again: bool) -> Decided:
        """Args:
        again: the tree was already run again because of NaN in it. In plain order the first decision of such a tree
            asks nobody, and says only which rows are sick.
        """
        rule = self.rule
        if rule is None:
            kind = NO_DRAFTS if tree.tokens.shape[1] == 1 else DraftKind.of(tree)
            rule = auto_rule(kind, top_down=self.order is not None)
        noise = self._accept_noise(tree, steps)

        def judge(law: Tensor) -> Verdict:
            if tree.tokens.shape[1] == 1 and rule.lossless and not rule.uses_race:
                return undrafted(law, noise if self.sampling else None)
            return rule(tree, law, noise)

        if self.order is not None:
            return self._judged_in_order(self.order, tree, logits, rule, judge, again)
        scores = self.law(logits, self.rows, tree.tokens, tree.parents, range(tree.tokens.shape[1]))
        if self.sampling:
            law = F.softmax(scores, dim=-1)
            sick = law[..., 0].isnan()  # NaN anywhere in a row is NaN in its sum, hence everywhere
        else:
            law, sick = scores, scores.amax(-1).isnan()
            if scores is not logits:  # NaN that processors make is taken as it comes, as plain greedy decoding does
                sick = sick & logits.amax(-1).isnan()
        verdict = judge(law)
        failed = self._failed_laws() if self._isolates else {}
        return Decided(tree, logits, scores, law, verdict, rule, read_verdict(tree, sick, verdict), failed=failed)

    def _judged_in_order(
        self,
        order: PlainOrder,
        tree: DraftTree,
        logits: Tensor,
        rule: AcceptanceRule,
        judge: Callable[[Tensor], Verdict],
        again: bool,
    ) -> Decided:
        sick = logits.amax(-1).isnan()
        if not again and bool(sick.any()):
            verdict = undrafted(torch.zeros_like(logits[:, :1], dtype=torch.float32), None)
            decision = read_verdict(tree, sick, verdict)
            return Decided(tree, logits, logits, logits, verdict, rule, decision, in_order=True)
        walk = order.walk(tree, logits, sick, judge)
        decision = read_verdict(tree, sick, walk.verdict, walk.kept_end)
        decision.sick_path = walk.sick
        return Decided(tree, logits, walk.scores, walk.law, walk.verdict, rule, decision, True, walk.failed)

    def _failed_laws(self) -> dict[int, BaseException]:
        """By place, what the processors of rows raised, where the law keeps that apart."""
        return {}

    def _accept_noise(self, tree: DraftTree, steps: int | Sequence[int]) -> Noise:
        """Fresh uniforms for this step's rule; zeros where it uses none (greedy decoding, races)."""
        rows, nodes = tree.tokens.shape
        if self.sampling and self.races is None:
            return self.noise.accept(self.rows.live, steps, nodes)
        race = None if self.races is None else self.next_race(tree.max_depth + 1)
        return Noise(self._still.expand(rows, nodes), self._still.expand(rows), race)
