"""One of two processes that hold a target together: makes calls, writes what came of each as JSON.

python rank_worker.py MODEL OUT          with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set, as torchrun sets them
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.distributed import DistributedConfig

import specdec
from specdec import Drafter, Speculator
from specdec.kv import SpecdecError
from specdec.planner.factory import PlannerFactory
from specdec.verify import DraftTree, Topology

POISON = 3
"""Whoever reads this token answers NaN (in the calls that say so)."""
PROMPT = torch.tensor([[5, 9, 12, 7, 5, 9]])
BATCH = torch.tensor([[0, 0, 12, 7, 5, 9], [5, 11, 23, 7, 5, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
GREEDY: dict[str, Any] = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
SAMPLED: dict[str, Any] = dict(max_new_tokens=20, do_sample=True, seed=11, eos_token_id=None)


class Turns(LogitsProcessor):
    """Keeps a state: what it does depends on how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls % 5 :: 5] -= 2.0
        return scores


class Fails(LogitsProcessor):
    """On the first rank only."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if dist.get_rank() == 0 and input_ids.shape[1] > 9:
            raise KeyError("a caller's own mistake")
        return scores


class Until(StoppingCriteria):
    """Stops at a length that the ranks do not agree on."""

    def __init__(self, columns: int):
        self.columns = columns + 4 * dist.get_rank()

    def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.columns)


class Strays(Drafter):
    """A root's two children, one of them a token that brings NaN."""

    name, max_depth, max_nodes = "strays", 1, 2

    def start(self, session: Any) -> None:
        self._rows = session.rows

    def propose(self, budget: Any, uniforms: Tensor) -> DraftTree:
        roots = self._rows.roots()
        drafted = torch.tensor([[POISON, 7]]).expand(len(roots), -1)
        return DraftTree.build(Topology((-1, 0, 0)), torch.cat([roots[:, None], drafted], dim=1))


class Streamed:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class Parted(Exception):
    """Ends a call whose ranks may wait for each other for ever."""


class Worker:
    def __init__(self, folder: str):
        self.rank = dist.get_rank()
        self.target: Any = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
        self.whole: Any = LlamaForCausalLM.from_pretrained(folder)
        torch.manual_seed(0)
        self.draft: Any = LlamaForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for weight in self.draft.parameters():
                weight.add_(0.1 * weight.std() * torch.randn_like(weight))
        self.found: dict[str, Any] = {}
        self.broadcasts = 0
        broadcast: Any = dist.broadcast

        def counted(*given: Any, **named: Any) -> Any:
            self.broadcasts += 1
            return broadcast(*given, **named)

        dist.broadcast = counted

    def call(self, name: str, draft: Any, how: dict[str, Any], **call: Any) -> Any:
        """One call on the sharded target, and on the first rank the same on a whole one."""
        ids = call.pop("ids", PROMPT)
        self.broadcasts = 0
        spec = Speculator(self.target, draft, **how)
        out: Any = spec.generate(ids, **call)
        report: Any = spec.report
        found = self.found[name] = {
            "text": (out if isinstance(out, Tensor) else out.sequences).tolist(),
            "steps": report.num_steps,
            "broadcasts": self.broadcasts,
            "drafted": report.num_draft_tokens,
            "rule": report.rule,
            "notes": report.notes,
        }
        return found, out

    def both(self, name: str, draft: Any, how: dict[str, Any], **call: Any) -> None:
        found, out = self.call(name, draft, how, **call)
        if self.rank == 0:
            again = {key: _renewed(value) for key, value in call.items() if key != "ids"}
            whole: Any = Speculator(self.whole, draft, **how).generate(call.get("ids", PROMPT), **again)
            found["wanted"] = (whole if isinstance(whole, Tensor) else whole.sequences).tolist()
            if not isinstance(out, Tensor):
                pairs = zip(out.scores, whole.scores, strict=True)
                found["apart"] = max(float((one - other).abs().max()) for one, other in pairs)

    def refused(self, name: str, attempt: Any) -> None:
        try:
            attempt()
        except (SpecdecError, KeyError) as fault:
            self.found[name] = f"{type(fault).__name__}: {fault}"

    def run(self) -> None:
        draft, rank = self.draft, self.rank
        plain = self.target.generate(PROMPT, **GREEDY)
        self.found["plain"] = {"text": plain.tolist()}
        self.both("nothing drafted", None, {}, **GREEDY)
        self.both("n-grams", "ngram", {"k": 3}, **GREEDY)
        self.both("a draft model", draft, {"k": 3}, **GREEDY)
        self.both("a drafted tree", draft, {"tree": (3, 2)}, **SAMPLED)
        self.both("sampled", draft, {"k": 3}, **SAMPLED, top_p=0.9)
        self.both("coupled", draft, {"k": 3, "rule": "coupled"}, **SAMPLED)
        self.both("a batch", draft, {"k": 3}, ids=BATCH, attention_mask=MASK, **{**SAMPLED, "eos_token_id": [2, 9]})
        self.both("pages", draft, {"k": 3, "cache": "paged", "page_size": 8}, ids=BATCH, attention_mask=MASK, **GREEDY)
        self.both("sequences", draft, {"k": 2}, num_return_sequences=2, **SAMPLED)
        asked = dict(return_dict_in_generate=True, output_scores=True)
        self.both("scores", draft, {"k": 3}, repetition_penalty=1.2, **GREEDY, **asked)
        turns = Turns()
        self.both("own processor", draft, {"k": 3}, logits_processor=LogitsProcessorList([turns]), **GREEDY, **asked)
        self.found["own processor"]["calls"] = turns.calls
        streamer = Streamed()
        self.call("streamed", draft, {"k": 3}, streamer=streamer, **GREEDY)
        self.found["streamed"] |= {"streamed": streamer.tokens, "ended": streamer.ended}
        self.planned()
        self.planted()
        self.refusals()
        self.alone()
        self.poisoned()

    def planned(self) -> None:
        """Costs are measured on the first rank, whose table of them is the only one there is."""
        asked = [0]
        planner_for: Any = PlannerFactory.planner_for

        def counted(*given: Any, **named: Any) -> Any:
            asked[0] += 1
            return planner_for(*given, **named)

        PlannerFactory.planner_for = counted  # type: ignore[method-assign]
        self.both("planned", [self.draft, "ngram"], {}, **GREEDY)
        self.call("planned again", [self.draft, "ngram"], {}, **GREEDY)
        self.found["planned again"]["asked"] = asked[0]
        PlannerFactory.planner_for = planner_for  # type: ignore[method-assign]

    def planted(self) -> None:
        """What differs between ranks: seeds, the global generator, drafters, the last bits of logits, stop rules."""
        self.call("another seed", self.draft, {"k": 3}, **{**SAMPLED, "seed": 11 + self.rank})
        torch.manual_seed(self.rank)
        self.call("global generator", self.draft, {"k": 3}, **{**SAMPLED, "seed": None})
        self.call(
            "drafter on one rank", self.draft if self.rank == 0 else None, {"k": 3} if self.rank == 0 else {}, **SAMPLED
        )
        noise = self.target.lm_head.register_forward_hook(_noisy(self.rank))
        self.call("other logits", self.draft, {"k": 3}, **SAMPLED)
        noise.remove()
        self.call(
            "other stop rules", self.draft, {"k": 3}, stopping_criteria=StoppingCriteriaList([Until(12)]), **GREEDY
        )

    def alone(self) -> None:
        """The control: every rank decides by itself, with its own seed."""
        from specdec import speculator

        emitted: list[int] = []

        def seen(trace: Any) -> None:
            emitted.extend(trace.emitted[0])
            if trace.step == 3:
                raise Parted

        kept, speculator.ranks_of = speculator.ranks_of, lambda model: None
        try:
            spec = Speculator(self.target, self.draft, k=3)
            spec.generate(PROMPT, on_step=seen, **{**SAMPLED, "seed": 11 + self.rank})
        except Parted:
            pass
        speculator.ranks_of = kept
        self.found["alone"] = emitted

    def poisoned(self) -> None:
        """NaN at a node: the pass is repeated without it, on all ranks."""
        for model in (self.target, self.whole):
            with torch.no_grad():
                weight = model.model.embed_tokens.weight
                local = weight.to_local() if hasattr(weight, "to_local") else weight
                if self.rank == 0 or model is self.whole:  # the first shard of the vocabulary
                    local[POISON] = float("nan")
        self.both("NaN", Strays(), {}, suppress_tokens=[POISON], **GREEDY)
        self.both("NaN in a batch", Strays(), {}, ids=BATCH, attention_mask=MASK, suppress_tokens=[POISON], **GREEDY)

    def refusals(self) -> None:
        self.refused("other arguments", lambda: self.call("", None, {}, **{**GREEDY, "max_new_tokens": 5 + self.rank}))
        fails = LogitsProcessorList([Fails()])
        self.refused("one fails", lambda: self.call("", self.draft, {"k": 3}, logits_processor=fails, **GREEDY))
        self.refused("self", lambda: Speculator(self.target, "self"))
        self.refused("sharded draft", lambda: Speculator(self.target, self.target, k=2))
        self.refused("strict", lambda: Speculator(self.target, exactness="strict"))
        self.refused("engine", lambda: specdec.Engine(self.target))
        self.found.pop("", None)


def _renewed(value: Any) -> Any:
    if isinstance(value, LogitsProcessorList):
        return LogitsProcessorList([type(one)() for one in value])
    return value


def _noisy(rank: int) -> Any:
    def hook(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        return out + 0.5 * rank * torch.sin(torch.arange(out.shape[-1]))

    return hook


def main(folder: str, out: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    os.environ["SPECDEC_CACHE"] = str(Path(out) / f"cache-{rank}")
    dist.init_process_group("gloo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        worker = Worker(folder)
        worker.run()
    (Path(out) / f"{rank}.json").write_text(json.dumps(worker.found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
