"""The decode loop: propose, forward, law, accept, commit, emit, observe."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from specdec.drafters import Budget, FallbackGuard, Session
from specdec.drafters.base import CACHE_NAME
from specdec.kv import SharedKVCache, TargetFaultError
from specdec.kv.exchange import adopt
from specdec.kv.shared import INITIAL_SLOTS
from specdec.kv.support import num_cache_layers, text_config
from specdec.monitor import Monitor
from specdec.outputs import Collector
from specdec.report import SpecReport, StepTrace, Stopwatch
from specdec.request import Request
from specdec.stopping import StopRules
from specdec.verify import DraftTree, Noise, NoiseStream, Rows, SamplingLaw, TreeForward, make_rule
from specdec.verify.forward import PREFILL_CHUNK, prepared
from specdec.verify.rules import auto_rule
from specdec.verify.tree import Verdict

TARGET = "target"
"""The target's name in the shared cache."""


class DecodeLoop:
    """Decodes one request to its end. State lives in `rows` (text), `cache` (K/V) and the drafter.

    Between steps, for every live row: `cache.lengths == num_tokens - 1` (the last token is the next root), and no
    row's output depends on the rows around it.
    """

    def __init__(
        self,
        request: Request,
        target: PreTrainedModel,
        drafter: FallbackGuard | None,
        rule: str,
        monitor: Monitor | None = None,
    ):
        self.request = request
        self.monitor = monitor
        self.target = target
        self.drafter = drafter
        self.rule_name = rule
        self.sampling = bool(request.config.do_sample)
        self.vocab = int(text_config(target).vocab_size)
        limit = request.criteria.max_length
        capacity = request.input_ids.shape[1] + 64 if limit is None else min(limit, request.input_ids.shape[1] + 4096)
        self.rows = Rows(request.input_ids, request.real, capacity)
        self.stop = StopRules(request.criteria, self.rows)
        self.collector = Collector(request, self.rows)
        self.law = SamplingLaw(request.processors, self.stop.ends)
        self.noise = NoiseStream(request.seeds, request.requests, self.rows.device)
        self.still = torch.zeros((), dtype=torch.float64, device=self.rows.device)
        self.forward = TreeForward(target, TARGET)
        self.watch = Stopwatch()
        self.report = SpecReport(num_rows=self.rows.batch_size, num_prompt_tokens=sum(self.rows.num_tokens))
        self.report.drafter = "none" if drafter is None else drafter.name
        self.report.rule = "greedy" if not self.sampling else rule
        self.final: dict[int, int] = {}
        self.storage: dict[int, int] = {}
        layers = {TARGET: num_cache_layers(target)}
        if drafter is not None and drafter.num_cache_layers:
            layers[CACHE_NAME] = drafter.num_cache_layers
        tail = 1 if drafter is None else drafter.max_nodes + 1
        most = None if limit is None else limit + tail
        slots = max(self.rows.num_tokens) + max(INITIAL_SLOTS, tail)  # room to speak before the first growth
        slots = slots if most is None else min(slots, most)
        self.cache = SharedKVCache(layers, self.rows.batch_size // request.repeats, slots, most)

    def run(self) -> Tensor | GenerateDecoderOnlyOutput:
        drafting = nullcontext() if self.drafter is None else self.drafter.running()
        with self.watch.phase("total"), prepared(self.target), drafting:
            with self.watch.phase("prefill"):
                self._prefill()
            if self.drafter is not None:
                self.drafter.start(Session(self.rows, self.cache, self.law, self.sampling, self.vocab))
            while self.rows.live:
                self.step()
            self._cut_at_finish_line()
            if self.request.wants_dict or self.request.cache_is_callers:
                self._fill_finished_rows()
        self.report.ms_prefill = self.watch.take("prefill")
        self.report.ms_total = self.watch.take("total")
        self.report.kv_bytes = self.cache.num_bytes()
        if self.drafter is not None:
            self.report.num_drafter_faults = self.drafter.num_faults
            self.report.last_drafter_fault = self.drafter.last_fault
        return self.collector.finish(self.cache, self.storage)

    def step(self) -> None:
        """One round for every live row. This is the algorithm; everything else serves it."""
        with self.watch.phase("step"):
            with self.watch.phase("draft"):
                tree = self._propose()
            with self.watch.phase("verify"):
                tree, logits = self._verify(tree)
            scores = self.law(logits, self.rows, tree.tokens, tree.parents, range(tree.tokens.shape[1]))
            # At temperature 0 every rule is greedy matching; the others read `law` as probabilities, which it is not.
            chosen = self.sampling and self.rule_name != "auto"
            rule = make_rule(self.rule_name) if chosen else auto_rule(tree, self.sampling)
            law = F.softmax(scores, dim=-1) if self.sampling else scores
            verdict = rule(tree, law, self._accept_noise(tree.tokens.shape[1]))
            if self.monitor is not None and self.sampling:
                self.monitor.decided(rule, tree, law, verdict)
            decision = self._read(tree, law, verdict)
            self.cache.commit(decision.paths)
            trace, reached = self._emit(decision, scores, logits)
            if self.drafter is not None:
                self.drafter.observe(verdict, logits)
            if self.monitor is not None:
                self.monitor.stepped(self)
        self._account(trace, reached)

    def _propose(self) -> DraftTree:
        if self.drafter is None:
            return DraftTree.root_only(self.rows.roots())
        # A row emits one token more than it accepts, so the last token of the limit needs no draft.
        deepest = self.drafter.max_depth
        left = [self.stop.remaining(row) for row in self.rows.live]
        depths = tuple(deepest if count is None else max(0, min(deepest, count - 1)) for count in left)
        budget = Budget(depths, self.drafter.max_nodes)
        count = self.drafter.num_uniforms
        if not self.sampling:
            return self.drafter.propose(budget, self.still.expand(len(left), count))
        return self.drafter.propose(budget, self.noise.draft(self.rows.live, self.report.num_steps, count))

    def _accept_noise(self, nodes: int) -> Noise:
        """Fresh uniforms for this step's rule; zeros in greedy decoding, where nothing is random."""
        if not self.sampling:
            rows = len(self.rows.live)
            return Noise(self.still.expand(rows, nodes), self.still.expand(rows))
        return self.noise.accept(self.rows.live, self.report.num_steps, nodes)

    def _verify(self, tree: DraftTree) -> tuple[DraftTree, Tensor]:
        """The target's logits of every node. Out of memory: once more without the draft, then a typed error."""
        try:
            try:
                return tree, self.forward.tree(self.cache, tree)[..., : self.vocab]
            except torch.OutOfMemoryError:
                if tree.tokens.shape[1] == 1:
                    raise
                self.report.notes.append(f"step {self.report.num_steps}: out of memory on the tree, decoded plainly")
                tree = DraftTree.root_only(tree.tokens[:, 0])
                return tree, self.forward.tree(self.cache, tree)[..., : self.vocab]
        except Exception as fault:
            raise self._fault(f"{type(fault).__name__}: {fault}") from fault

    def _fault(self, what: str) -> TargetFaultError:
        self.cache.rollback()
        start = self.rows.prompt_length
        emitted = [self.rows.ids[row, start:end].tolist() for row, end in enumerate(self.rows.ends)]
        step = self.report.num_steps
        return TargetFaultError(
            f"the target failed at step {step} ({what}); {sum(map(len, emitted))} tokens emitted before are in "
            ".emitted, one list per row",
            step,
            emitted,
        )

    def _read(self, tree: DraftTree, law: Tensor, verdict: Verdict) -> Decision:
        """Bring the verdict to the host: the one synchronisation of a step."""
        drafted = tree.num_nodes - 1
        if tree.topology is not None and tree.topology.is_chain:  # a path is a prefix of the nodes
            children = verdict.num_accepted < drafted
            tokens = tree.tokens
        else:
            node = verdict.path.gather(1, verdict.num_accepted[:, None])
            children = ((tree.parents == node) & tree.valid).any(1)
            tokens = tree.tokens.gather(1, verdict.path.clamp(min=0))
        sick = law.amax(-1).isnan().any(1)
        reached = verdict.num_accepted + children
        head = torch.stack([verdict.num_accepted, verdict.next_token, children, sick, drafted, reached], dim=1)
        packed = torch.cat([head, verdict.path, tokens], dim=1).tolist()
        if any(row[3] for row in packed):
            raise self._fault("NaN in its logits")
        return Decision(packed, verdict.path.shape[1])

    def _emit(self, decision: Decision, scores: Tensor, logits: Tensor) -> tuple[StepTrace, list[int]]:
        """Append each row's run, cut it where plain decoding stops, retire finished rows, feed the streamer."""
        live = list(self.rows.live)
        runs, kinds = decision.runs, decision.kinds
        self.rows.extend(runs)
        for i, row in enumerate(live):
            path = decision.paths[i]
            kept = self.collector.record(row, scores[i, path], logits[i, path]) if self.collector.keeps else None
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

    def _fill_finished_rows(self) -> None:
        """K/V of what plain decoding feeds rows that ended early: their last token, then padding.

        Only a returned cache shows them; a caller who continues from it may attend to them.
        """
        width = max(self.rows.ends)
        if min(self.rows.ends) == width:
            return
        padding = self.request.config._pad_token_tensor
        assert padding is not None, "rows end apart only where finished rows are padded"
        pad = int(padding)
        text = torch.full((self.rows.batch_size, width), pad, device=self.rows.device)
        stops = [0] * self.rows.batch_size
        for row, place in self.storage.items():
            count = self.rows.num_tokens[row]
            text[place, :count] = self.rows.text[row, :count]
            stops[place] = count + width - self.rows.ends[row] - 1
        self.cache.revive()
        self.forward.prefill(self.cache, text, self.cache.filled(TARGET), stops, PREFILL_CHUNK)
        for place, stop in enumerate(stops):
            self.cache.set_length(place, stop)

    def _prefill(self) -> None:
        """Everything but each row's last token goes into the target's K/V; equal prompts are run once."""
        request, cache = self.request, self.cache
        if request.cache is not None and request.cached:
            real = request.real
            if real is None:
                real = torch.ones_like(request.input_ids, dtype=torch.bool)
            adopt(cache, TARGET, request.cache, real[:, : request.cached])
        leaders = slice(None, None, request.repeats)
        lengths = [count - 1 for count in self.rows.num_tokens[leaders]]
        chunk = getattr(request.config, "prefill_chunk_size", None) or PREFILL_CHUNK
        try:
            self.forward.prefill(cache, self.rows.text[leaders], cache.filled(TARGET), lengths, chunk)
        except Exception as fault:
            raise self._fault(f"{type(fault).__name__} in the prefill: {fault}") from fault
        for row, length in enumerate(lengths):
            cache.set_length(row, length)
        if request.repeats > 1:
            cache.fork(request.repeats)


class Decision:
    """A verdict on the host: plain lists, one entry per live row."""

    def __init__(self, packed: list[list[int]], width: int):
        self.accepted = [row[0] for row in packed]
        self.drafted = [row[4] for row in packed]
        self.reached = [row[5] for row in packed]
        self.paths = [row[6 : 7 + row[0]] for row in packed]
        self.runs = [[*row[7 + width : 7 + width + row[0]], row[1]] for row in packed]
        self.kinds = [["accepted"] * row[0] + ["recovered" if row[2] else "bonus"] for row in packed]
