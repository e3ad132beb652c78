"""The decode loop: propose, forward, law, accept, commit, emit, observe."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from specdec.deciding import Decided, Decider
from specdec.drafters import Budget, FallbackGuard, Session
from specdec.drafters.base import CACHE_NAME, depth_limits
from specdec.kv import KVCache, PagedKVCache, SharedKVCache, UnsupportedArgumentError
from specdec.kv.shared import INITIAL_SLOTS
from specdec.kv.support import num_cache_layers, text_config
from specdec.monitor import Monitor
from specdec.outputs import Collector
from specdec.plain_order import NOTHING_LEFT, PlainBatch, PlainOrder
from specdec.report import SpecReport
from specdec.request import Request
from specdec.stopping import StopRules
from specdec.target import TARGET, TargetPasses
from specdec.trace import StepTrace, Stopwatch
from specdec.verify import DraftTree, NoiseStream, Rows, SamplingLaw
from specdec.verify.draft_kind import NO_DRAFTS
from specdec.verify.passes.strict_mode import StrictMode
from specdec.verify.purity import in_plain_order
from specdec.verify.race import RaceStream
from specdec.verify.rules import choose_rule

if TYPE_CHECKING:
    from specdec.planner.base import Planner


class DecodeLoop:
    """Decodes one request to its end. State lives in `rows` (text), `cache` (K/V) and the drafter.

    Between steps, for every live row: `cache.lengths == num_tokens - 1` (the last token is the next root), and no
    row's output depends on the rows around it (in plain order a sampled row's law does not, its text does).
    """

    def __init__(
        self,
        request: Request,
        target: PreTrainedModel,
        drafter: FallbackGuard | None,
        rule: str,
        monitor: Monitor | None = None,
        strict: StrictMode | None = None,
        page_size: int | None = None,
        planner: Planner | None = None,
    ):
        self.request = request
        self.monitor = monitor
        self.planner = planner
        self.target = target
        self.drafter = drafter
        self.sampling = bool(request.config.do_sample)
        limit = request.criteria.max_length
        capacity = request.input_ids.shape[1] + 64 if limit is None else min(limit, request.input_ids.shape[1] + 4096)
        self.rows = Rows(request.input_ids, request.real, capacity)
        self.stop = StopRules(request.criteria, self.rows)
        self.collector = Collector(request, self.rows)
        if request.streamer is not None:
            self.stop.stream = self.collector.put
        self.law = SamplingLaw(request.processors, self.stop.ends)
        self.plain = self._plain_batch()
        self.watch = Stopwatch()
        self.report = SpecReport(num_rows=self.rows.batch_size, num_prompt_tokens=sum(self.rows.num_tokens))
        self.report.drafter = "none" if drafter is None else drafter.name
        kind = NO_DRAFTS if drafter is None else drafter.kind
        self.rule = choose_rule(rule, self.sampling, kind, top_down=self.plain is not None)
        self.report.rule = rule if self.rule is None else self.rule.name
        self.report.lossless = self.rule is None or self.rule.lossless
        self.final: dict[int, int] = {}
        self.storage: dict[int, int] = {}
        layers = {TARGET: num_cache_layers(target)}
        if drafter is not None and drafter.num_cache_layers:
            layers[CACHE_NAME] = drafter.num_cache_layers
        tail = 1 if drafter is None else drafter.max_nodes + 1
        tail = tail if strict is None else max(tail, strict.width)
        vocab = int(text_config(target).vocab_size)
        noise = NoiseStream(request.seeds, request.requests, self.rows.device)
        races = self.rule is not None and self.rule.uses_race
        race = RaceStream(request.seeds, request.requests, vocab, self.rows.device) if races else None
        order = None
        if self.plain is not None:
            order = PlainOrder(self.rows, self.sampling, isolates=False)
            order.join(self.plain)
        self.decider = Decider(self.rows, self.law, drafter, self.rule, self.sampling, noise, race, order)
        most = None if limit is None else limit + tail
        slots = max(self.rows.num_tokens) + max(INITIAL_SLOTS, tail)  # room to speak before the first growth
        slots = slots if most is None else min(slots, most)
        leaders = self.rows.batch_size // request.repeats
        self.cache: KVCache = (
            SharedKVCache(layers, leaders, slots, most)
            if page_size is None
            else PagedKVCache.fresh(layers, leaders, page_size)
        )
        self.passes = TargetPasses(request, target, self.rows, self.cache, self.report, strict)

    def _plain_batch(self) -> PlainBatch | None:
        """What must be called in plain order, if anything must."""
        request, rows = self.request, self.rows.batch_size
        if not in_plain_order(request.processors, request.criteria, rows):
            return None
        pad = request.config._pad_token_tensor
        return PlainBatch(
            request.processors,
            self.stop,
            range(rows),
            request.input_ids,
            0 if pad is None else int(pad),
            request.keeps_scores,
        )

    def run(self) -> Tensor | GenerateDecoderOnlyOutput:
        drafting = nullcontext() if self.drafter is None else self.drafter.running()
        with self.watch.phase("total"), self.passes.prepared(), drafting:
            with self.watch.phase("prefill"):
                self.passes.prefill()
            if self.drafter is not None:
                vocab, race = self.passes.vocab, self.decider.race
                self.drafter.start(Session(self.rows, self.cache, self.law, self.sampling, vocab, race))
            try:
                while self.rows.live:
                    self.step()
            finally:
                if self.drafter is not None:
                    self.drafter.finish()
            self._cut_at_finish_line()
            if self.request.wants_dict or self.request.cache_is_callers:
                self.passes.fill_finished(self.storage)
        self.report.ms_prefill = self.watch.take("prefill")
        self.report.ms_total = self.watch.take("total")
        self.report.kv_bytes = self.cache.num_bytes()
        if self.plain is not None:
            self.report.processor_calls, self.report.processor_ms = self.plain.num_calls, self.plain.ms
        if self.drafter is not None:
            self.report.num_drafter_faults = self.drafter.num_faults
            self.report.last_drafter_fault = self.drafter.last_fault
            self.report.notes += self.drafter.notes
        return self.collector.finish(self.cache, self.storage)

    def step(self) -> None:
        """One round for every live row. This is the algorithm; everything else serves it."""
        with self.watch.phase("step"):
            with self.watch.phase("draft"):
                tree = self._propose()
            with self.watch.phase("verify"):
                tree, logits = self.passes.tree(tree)
            decided = self.decider.decide(tree, logits, self.report.num_steps)
            if any(decided.decision.sick):
                tree, logits = self.passes.healthy_part(tree)
                decided = self.decider.decide(tree, logits, self.report.num_steps, again=True)
                if any(decided.decision.sick_path):
                    if not bool(logits.isnan().any()):
                        raise UnsupportedArgumentError(NOTHING_LEFT)
                    raise self.passes.fault("NaN in its logits")
            if self.monitor is not None and self.sampling and not decided.in_order:
                self.monitor.decided(decided.rule, tree, decided.law, decided.verdict)
            self.cache.commit(decided.decision.paths)
            trace, reached = self._emit(decided, tree, logits)
            if self.drafter is not None:
                self.drafter.observe(decided.verdict, logits)
            if self.monitor is not None:
                self.monitor.stepped(self)
        self._account(trace, reached)

    def _propose(self) -> DraftTree:
        live = self.rows.live
        if self.drafter is None:
            return self.decider.propose(Budget((0,) * len(live), 0), self.report.num_steps)
        left = [self.stop.remaining(row) for row in live]
        if self.planner is None:  # k or tree was given
            budget = Budget(depth_limits(self.drafter.max_depth, left), self.drafter.max_nodes)
        else:
            budget = self.planner.budget(live, left, self.rows.lengths())
        return self.decider.propose(budget, self.report.num_steps)

    def _emit(self, decided: Decided, tree: DraftTree, logits: Tensor) -> tuple[StepTrace, list[int]]:
        """Append each row's run, cut it where plain decoding stops, retire finished rows, feed the streamer."""
        if self.rule is None and (tree.tokens.shape[1] > 1 or self.report.rule == "auto"):
            self.report.rule = decided.rule.name
        decision, scores = decided.decision, decided.scores
        live = list(self.rows.live)
        runs, kinds = decision.runs, decision.kinds
        self.rows.extend(runs)
        for i, row in enumerate(live):
            path = decision.paths[i]
            kept = self.collector.record(row, scores[i, path], logits[i, path]) if self.collector.keeps else None
            if not decided.in_order:
                self.stop.scan(row, runs[i], kept)
        for i in reversed(range(len(live))):
            row = live[i]
            columns = self.stop.final_columns(row)
            if columns is None:
                continue
            extra = self.rows.ends[row] - columns
            if extra:
                self.rows.ends[row] -= extra
                self.rows.num_tokens[row] -= extra
                runs[i], kinds[i] = runs[i][: max(0, len(runs[i]) - extra)], kinds[i][: max(0, len(kinds[i]) - extra)]
            self.cache.truncate(i, self.rows.num_tokens[row] - 1)
            self.final[row] = columns
            self._retire(i, row)
        self.collector.stream(self.final, self.stop.finish_line())
        trace = StepTrace(self.report.num_steps, live, decision.drafted, decision.accepted, runs, kinds, 0.0, 0.0, 0.0)
        return trace, decision.reached

    def _retire(self, i: int, row: int) -> None:
        """Storage row `i` leaves the batch: the last live row moves into its place, `row` behind the live ones."""
        last = len(self.rows.live) - 1
        self.storage[row] = last
        self.cache.retire(i)
        self.rows.retire(i)
        if self.drafter is not None:
            self.drafter.stop([row])

    def _account(self, trace: StepTrace, reached: list[int]) -> None:
        draft, verify, whole = (self.watch.take(name) for name in ("draft", "verify", "step"))
        trace = trace._replace(ms_draft=draft, ms_verify=verify, ms_rest=whole - draft - verify)
        self.report.add(trace, reached)
        if self.planner is not None:
            self.planner.learn(trace, reached)
        if self.request.on_step is not None:
            self.request.on_step(trace)

    def _cut_at_finish_line(self) -> None:
        """Rows extended up to the length limit while others were still running end where the last one stopped."""
        line = self.stop.finish_line()
        for row, end in enumerate(self.rows.ends):
            if line is not None and end > line:
                self.rows.ends[row] = line
                self.rows.num_tokens[row] -= end - line
                self.cache.truncate(self.storage[row], self.rows.num_tokens[row] - 1)
