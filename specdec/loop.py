"""The decode loop of one `generate` call: propose, forward, law, accept, commit, emit, observe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, wraps
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from specdec.batch import Batch
from specdec.call_cache import fill_finished, make_cache, read_prompts
from specdec.decision import Decided
from specdec.drafters import Budget, FallbackGuard
from specdec.drafters.base import depth_limits
from specdec.kv import TargetFaultError, UnsupportedArgumentError
from specdec.kv.wrappers import bytes_moved_by_a_pass
from specdec.monitor import Monitor
from specdec.outputs import Collector
from specdec.plain_order import NOTHING_LEFT, PlainBatch
from specdec.planner.base import Planner
from specdec.report import SpecReport
from specdec.request import Request
from specdec.stopping import StopRules
from specdec.target import TargetModel, TargetPasses
from specdec.trace import StepTrace
from specdec.verify import DraftTree, Rows, SamplingLaw
from specdec.verify.passes.forward import observing
from specdec.verify.purity import in_plain_order
from specdec.verify.strict_mode import StrictMode

P = ParamSpec("P")
T = TypeVar("T")


def timed(phase: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Around a method: its object's `ms[phase]` grows by what a call takes. The algorithm itself holds no clock."""

    def wrap(method: Callable[P, T]) -> Callable[P, T]:
        @wraps(method)
        def clocked(*args: P.args, **kwargs: P.kwargs) -> T:
            owner: Any = args[0]
            start = perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                owner.ms[phase] = owner.ms.get(phase, 0.0) + 1e3 * (perf_counter() - start)

        return clocked

    return wrap


class DecodeLoop(Batch):
    """Decodes one request to its end: a batch whose rows all start together, and which raises what fails.

    Attributes:
        ms: milliseconds by phase.
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
        self.request, self.target, self.monitor, self.planner = request, target, monitor, planner
        self.ms: dict[str, float] = {}
        self._final: dict[int, int] = {}
        self._storage: dict[int, int] = {}
        limit = request.criteria.max_length
        capacity = request.input_ids.shape[1] + 64 if limit is None else min(limit, request.input_ids.shape[1] + 4096)
        rows = Rows(request.input_ids, request.real, capacity)
        self.stop = StopRules(request.criteria, rows)
        self.collector = Collector(request, rows)
        if request.streamer is not None:
            self.stop.stream = self.collector.put
        tail = 1 if drafter is None else drafter.max_nodes + 1
        tail = tail if strict is None else max(tail, strict.width)
        cache = make_cache(request, target, drafter, rows, tail, page_size)
        law = SamplingLaw(request.processors, self.stop.ends)
        model = TargetModel(target, strict)
        ordered = in_plain_order(request.processors, request.criteria, rows.batch_size)
        super().__init__(
            rows, cache, law, drafter, rule, bool(request.config.do_sample), model.vocab, request.seeds,
            request.requests, in_order=bool(ordered), isolates=False,
        )  # fmt: skip
        self.stops = dict.fromkeys(rows.live, self.stop)
        self.record = self._record if self.collector.keeps else None
        self.report = SpecReport(num_rows=rows.batch_size, num_prompt_tokens=sum(rows.num_tokens))
        self.report.num_cached_tokens = request.num_cached_tokens
        self.report.drafter = "none" if drafter is None else drafter.name
        self.report.rule = rule if self.rule is None else self.rule.name
        self.report.lossless = self.rule is None or self.rule.lossless
        self.plain: PlainBatch | None = None
        if self.order is not None:
            pad = request.config._pad_token_tensor
            self.plain = PlainBatch(
                request.processors, self.stop, rows.live, request.input_ids, 0 if pad is None else int(pad),
                request.keeps_scores,
            )  # fmt: skip
            self.order.join(self.plain)
        chunk = getattr(request.config, "prefill_chunk_size", None)
        fault = partial(_target_fault, rows, self.report)  # not of `self`: a cycle would keep the K/V alive
        self.passes = TargetPasses(model, cache, rows, fault, self.report.note, chunk)
        if self.collector.hidden is not None:
            model.forward.features = None  # all of them
            self.passes.reader = self.collector.hidden.read

    def run(self) -> Tensor | GenerateDecoderOnlyOutput:
        self._decode()
        self._close_report()
        return self.collector.finish(self.cache, self._storage)

    @timed("total")
    def _decode(self) -> None:
        drafting = nullcontext() if self.drafter is None else self.drafter.running()
        moved = bytes_moved_by_a_pass(self.target)
        counting = observing(partial(self._count_moved, moved)) if moved else nullcontext()
        with self.passes.target.prepared(), drafting, counting:
            self._prefill()
            self.open(self.law)
            try:
                while self.rows.live:
                    self._account(*self.step())
            finally:
                self.close()
            self.report.passes = self.passes.target.forward.account()
            self._cut_at_finish_line()
            if self.request.wants_dict or self.request.cache_is_callers:
                hidden = self.collector.hidden
                reader = None if hidden is None else partial(hidden.finished, self._storage)
                fill_finished(self.passes, self.rows, self.request, self._storage, reader)

    @timed("prefill")
    def _prefill(self) -> None:
        read_prompts(self.passes, self.rows, self.request)

    @timed("step")
    def step(self) -> tuple[StepTrace, list[int]]:
        """One round for every live row. This is the algorithm; everything else serves it.

        Returns:
            its trace, without times; and per row, levels of its tree that a decision was taken at.
        """
        live, step = list(self.rows.live), self.report.num_steps
        tree, logits = self._verify(self._draft(step))
        decided = self.decide(tree, logits, step, self._healthy_part)
        if any(decided.decision.sick_path):
            raise self._error_of(decided)
        if self.monitor is not None and self.sampling and not decided.in_order:
            self.monitor.decided(decided.rule, decided.tree, decided.law, decided.verdict)
        ended = self.advance(decided).ended
        if ended:
            self._retire(ended)
        if self.request.streamer is not None:
            self.collector.stream(self._final, self.stop.finish_line())
        if self.monitor is not None:
            self.monitor.stepped(self)
        if self.rule is None and (decided.tree.tokens.shape[1] > 1 or self.report.rule == "auto"):
            self.report.rule = decided.rule.name
        made = decided.decision
        return StepTrace(step, live, made.drafted, made.accepted, made.runs, made.kinds, 0.0, 0.0, 0.0), made.reached

    @timed("draft")
    def _draft(self, step: int) -> DraftTree:
        live = self.rows.live
        if self.drafter is None:
            return self.propose(Budget((0,) * len(live), 0), step)
        left = [self.stop.remaining(row) for row in live]
        if self.planner is None:  # k or tree was given
            budget = Budget(depth_limits(self.drafter.max_depth, left), self.drafter.max_nodes)
        else:
            budget = self.planner.budget(live, left, self.rows.lengths())
        if step < self.first_draft:
            budget = replace(budget, depths=(0,) * len(live))
        return self.propose(budget, step)

    @timed("verify")
    def _verify(self, tree: DraftTree) -> tuple[DraftTree, Tensor]:
        return self.passes.tree(tree)

    def _record(self, row: int, place: int, decided: Decided) -> list[tuple[Tensor, ...]] | None:
        path = decided.decision.paths[place]
        if self.collector.hidden is not None:
            self.collector.hidden.emitted(row, [layer[place, path] for layer in self.passes.features])
        return self.collector.record(row, decided.scores[place, path], decided.logits[place, path])

    def _healthy_part(self, tree: DraftTree, logits: Tensor, sick: list[int]) -> tuple[DraftTree, Tensor]:
        return self.passes.healthy_part(tree)

    def _count_moved(self, moved: int, model: PreTrainedModel, seconds: float) -> None:
        self.report.bytes_moved += moved * (model is self.target)

    def _error_of(self, decided: Decided) -> Exception:
        """To be raised where rows cannot go on."""
        if any(decided.faulty.values()):
            return self.passes.fault("NaN in its logits")
        return UnsupportedArgumentError(NOTHING_LEFT)

    def _retire(self, ended: Mapping[int, int]) -> None:
        """Finished rows leave the batch: the last live row moves into their place, they lie behind the live ones."""
        for place in sorted(ended, reverse=True):
            row = self.rows.live[place]
            self._final[row], self._storage[row] = ended[place], len(self.rows.live) - 1
            self.cache.retire(place)
            self.rows.retire(place)
            if self.drafter is not None:
                self.drafter.stop([row])

    def _account(self, trace: StepTrace, reached: list[int]) -> None:
        draft, verify, whole = (self.ms.pop(phase, 0.0) for phase in ("draft", "verify", "step"))
        trace = trace._replace(ms_draft=draft, ms_verify=verify, ms_rest=whole - draft - verify)
        self.report.add(trace, reached)
        if self.planner is not None:
            self.planner.learn(trace, reached)
        if self.request.on_step is not None:
            self.request.on_step(trace)

    def _close_report(self) -> None:
        report = self.report
        report.ms_prefill, report.ms_total = self.ms.pop("prefill"), self.ms.pop("total")
        report.kv_bytes = self.cache.num_bytes()
        report.kv_models = 1 + (self.drafter is not None and self.drafter.keeps_kv)
        if self.plain is not None:
            report.processor_calls, report.processor_ms = self.plain.num_calls, self.plain.ms
        if self.drafter is not None:
            report.num_drafter_faults = self.drafter.num_faults
            report.last_drafter_fault = self.drafter.last_fault
            report.notes += self.drafter.notes

    def _cut_at_finish_line(self) -> None:
        """Rows extended up to the length limit while others were still running end where the last one stopped."""
        line = self.stop.finish_line()
        for row, end in enumerate(self.rows.ends):
            if line is not None and end > line:
                self.rows.ends[row] = line
                self.rows.num_tokens[row] -= end - line
                self.cache.truncate(self._storage[row], self.rows.num_tokens[row] - 1)


def _target_fault(rows: Rows, report: SpecReport, what: str) -> TargetFaultError:
    """What a call raises when its target fails."""
    emitted = [rows.ids[row, rows.prompt_length : end].tolist() for row, end in enumerate(rows.ends)]
    return TargetFaultError(
        f"the target failed at step {report.num_steps} ({what}); {sum(map(len, emitted))} tokens emitted before are in "
        ".emitted, one list per row",
        report.num_steps,
        emitted,
    )
